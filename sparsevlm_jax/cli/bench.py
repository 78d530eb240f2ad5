"""The command `sparsevlm bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsevlm_jax.cli.options import note
from sparsevlm_jax.errors import UserError

QUICK_SIDES = ("jax:dense", "jax:v1.5@192", "sdpa:dense", "faithful:v1.5@192")
DEFAULT_SHAPES = ("small",)
PHASES = ("tower", "prefill", "products", "prefill_given", "generate")


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="small (default), llava-1.5-7b, llava-1.5-13b, llava-next-7b, video."),
    ] = None,
    sides: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE:METHOD[@N|@P%][/int8][/MESH]",
            help="Repeat it. Engines: jax; eager, sdpa, compile (PyTorch); faithful, best, batched (SparseVLM in "
            "PyTorch). The first is what the others are compared with.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1",
    text_tokens: Annotated[str | None, typer.Option(metavar="N,...", help="Tokens that are not visual.")] = None,
    visual_tokens: Annotated[str | None, typer.Option(metavar="N,...", help="Visual tokens of a prompt.")] = None,
    dtype: Annotated[str, typer.Option(metavar="D,...", help="float32, bfloat16, float16.")] = "float32",
    new_tokens: Annotated[str, typer.Option(metavar="N,...", help="Lengths of the answers.")] = "16,128",
    mesh: Annotated[
        str | None, typer.Option(metavar="tensor=N", help="Several devices for every JAX side; see ask --mesh.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="int8", help="For every JAX side, and no other; see ask --quantize."),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Turns of every side that count.")] = 7,
    device: Annotated[str, typer.Option(metavar="auto|cpu|gpu", help="Where all sides run.")] = "auto",
    at_once: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Processes alive together; default: as memory holds.")
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Of tower, prefill, products, prefill_given, generate; default: all."),
    ] = None,
    gate_rows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rows of a 16-bit batch whose float32 answers are compared.")
    ] = 2,
    break_even: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD", help="Repeat it. Find from how many visual tokens on the method pays."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Results and report; what is there is not run again.")
    ] = Path("out/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A small model, four sides: about two minutes.")] = False,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Trace one answer of every JAX side instead of timing.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html and report.md to DIR.")] = True,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing.")] = False,
    readme: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --report-only: put the table between the file's markers.")
    ] = None,
) -> None:
    """Measures JAX against PyTorch on this machine: prefill, end to end, memory; dense and pruned."""
    _require_packages(["jinja2", "matplotlib"] * report + ["torch"] * (not report_only))
    if report_only:
        _write_report(out, readme)
        return
    if mesh is not None and break_even:
        raise UserError(f"--mesh {mesh}: has no effect with --break-even, whose sides run on one device")
    import jax

    jax.config.update("jax_platforms", "cpu")  # this process only counts: accelerators are for the workers
    from sparsevlm_jax.bench.machine import find_device
    from sparsevlm_jax.bench.matrix import run_cell
    from sparsevlm_jax.bench.shapes import SHAPES, Side, default_sides
    from sparsevlm_jax.bench.sitting import Settings

    lengths = _numbers("--new-tokens", new_tokens)
    settings = Settings(find_device(device), (1, *lengths), rounds=rounds, at_once=at_once, gate_rows=gate_rows)
    if phases is not None:
        settings = replace(settings, phases=_phases(phases))
    names = shape or list(DEFAULT_SHAPES)
    if quick:
        names, sides = ["quick"], list(sides or QUICK_SIDES)
        # So few rounds would not show what pruning itself costs: the prefill with given indices is left out.
        timed = settings.phases or ("tower", "prefill", "generate")
        settings = replace(settings, marks=(1, 16), warm_ups=1, rounds=min(rounds, 3), phases=timed)
    try:
        for cell in _cells(names, batch, text_tokens, visual_tokens, dtype):
            wanted = [Side.parse(text, cell.visual_tokens) for text in sides or default_sides(SHAPES[cell.shape])]
            wanted = [_with_defaults(side, mesh, quantize) for side in wanted]
            if profile is not None:
                _profile(cell, wanted, settings, profile)
            elif break_even:
                _sweep(cell, break_even, settings, out)
            else:
                run_cell(cell, wanted, settings, out, note)
    except KeyboardInterrupt:
        note("interrupted; the same command goes on with what is missing")
        raise typer.Exit(130) from None
    if report and profile is None:
        _write_report(out, None)


def _with_defaults(side: Any, mesh: str | None, quantize: str | None) -> Any:
    """A JAX side on the devices, and with the kernels, that are for all that name none."""
    if side.engine != "jax":
        return side
    side = side if side.mesh else side.on(mesh or "")
    return side if side.quantize else side.held_in(quantize)


def _cells(names: Sequence[str], batch: str, text: str | None, visual: str | None, dtype: str) -> list[Any]:
    """The product of all axes.

    Raises:
      UserError: an unknown shape or dtype, or something that is not a number.
    """
    from sparsevlm_jax.bench.shapes import SHAPES, Cell
    from sparsevlm_jax.config import DTYPES

    dtypes = dtype.split(",")
    for option, given, known in (("--shape", names, SHAPES), ("--dtype", dtypes, DTYPES)):
        for name in given:
            if name not in known:
                raise UserError(f"{option} {name}: expected one of {', '.join(known)}")
    cells = []
    for name in names:
        texts = _numbers("--text-tokens", text) if text else [SHAPES[name].text_tokens]
        visuals = _numbers("--visual-tokens", visual) if visual else [SHAPES[name].visual_tokens]
        axes = product(dtypes, _numbers("--batch", batch), visuals, texts)
        cells += [Cell(name, b, t, v, d) for d, b, v, t in axes]
    for cell in cells:
        assert cell.config  # says now, not after an hour, that no images give so many tokens
    return cells


def _sweep(cell: Any, methods: Sequence[str], settings: Any, out: Path) -> None:
    """Runs the cell at several numbers of visual tokens, end to end only."""
    from sparsevlm_jax.bench.break_even import VISUAL_TOKENS, break_even_sides
    from sparsevlm_jax.bench.matrix import run_cell
    from sparsevlm_jax.bench.shapes import Side

    settings = replace(settings, phases=("generate",))
    for count in VISUAL_TOKENS:
        sides = [Side.parse(text, count) for text in break_even_sides(methods)]
        run_cell(replace(cell, visual_tokens=count), sides, settings, out / "break-even", note)


def _profile(cell: Any, sides: Sequence[Any], settings: Any, folder: Path) -> None:
    from sparsevlm_jax.bench.tables import phases
    from sparsevlm_jax.bench.worker import Worker

    for side in sides:
        if side.engine == "jax":
            place = folder / cell.key / side.name.replace(":", "-")
            place.mkdir(parents=True, exist_ok=True)
            with Worker(cell, side, settings.marks[-1], settings.device) as worker:
                found = worker.ask("profile", folder=str(place), new_tokens=settings.marks[-1])
            table = phases(side.name, found)
            print(f"{table.title}\n\n{table.markdown()}\n\n{place}\n")


def _write_report(out: Path, readme: Path | None) -> None:
    from sparsevlm_jax.bench.files import put_between
    from sparsevlm_jax.bench.report import read_results, readme_table, write_report

    for file in write_report(out):
        note(str(file))
    if readme is not None:
        put_between(readme, "bench", readme_table(read_results(out)))
        note(str(readme))


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise UserError(f"{option} {text}: expected numbers above 0, as in 1,8")
    return found


def _phases(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PHASES:
            raise UserError(f"--phases {name}: expected some of {','.join(PHASES)}")
    return names


def _require_packages(names: Sequence[str]) -> None:
    from importlib.util import find_spec

    absent = [name for name in names if find_spec(name) is None]
    if absent:
        raise UserError(f"sparsevlm bench needs {' and '.join(absent)}: pip install 'sparsevlm_jax[bench]'")
