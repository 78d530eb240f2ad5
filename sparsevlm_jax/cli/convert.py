"""The commands `sparsevlm convert` and `sparsevlm inspect`. What they need is imported when they run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsevlm_jax.cli.options import note
from sparsevlm_jax.errors import UserError

_HELP = "SRC DST, with --to-hf CKPT OUT, with --check CKPT"


def convert(
    paths: Annotated[list[str], typer.Argument(metavar="SRC DST", help=_HELP)],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the source's own.")] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Store the weights of the decoder's layers in eight bits.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="CLIP model of a checkpoint in the original layout.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Run both and compare; needs torch.")] = False,
    to_hf: Annotated[bool, typer.Option("--to-hf", help="The way back: a Hugging Face folder.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare a checkpoint with its manifest's digests.")] = False,
) -> None:
    """Converts Hugging Face PyTorch weights to orbax, or back. Interrupted, the same command goes on."""
    if to_hf and check:
        raise UserError("--to-hf and --check: give one of them")
    wanted = ["CKPT"] if check else ["CKPT", "OUT"] if to_hf else ["SRC", "DST"]
    if len(paths) != len(wanted):
        raise UserError(f"expected {' '.join(wanted)}, found {len(paths)} arguments")
    own = {"dtype": dtype, "quantize": quantize, "revision": revision, "vision_tower": vision_tower}
    given = {"--" + name.replace("_", "-"): value for name, value in own.items()} | {"--verify": verify or None}
    refused = [name for name, value in given.items() if value is not None]
    if (to_hf or check) and refused:
        raise UserError(f"{refused[0]} goes with SRC DST only")
    _on_host()
    if check:
        from sparsevlm_jax.checkpoints.check import check as run_check

        with _progress("checking") as watch:
            count = run_check(Path(paths[0]), watch)
        note(f"{paths[0]}: {count} tensors and all files are as they were written")
    elif to_hf:
        from sparsevlm_jax.checkpoints.export import to_hf as run_to_hf

        with _progress("writing") as watch:
            files = run_to_hf(Path(paths[0]), Path(paths[1]), watch)
        note(f"{paths[1]}: complete, {files} weight file{'s' if files > 1 else ''}")
    else:
        from sparsevlm_jax.checkpoints.convert import convert as run_convert

        with _progress("converting") as watch:
            result = run_convert(*paths, **own, watch=watch)
        resumed = f", {result.resumed} of them already there" if result.resumed else ""
        note(f"{paths[1]}: complete, {result.nbytes / 1e9:.2f} GB in {result.groups} groups{resumed}")
        if verify:
            from sparsevlm_jax.checkpoints.verify import verify as run_verify

            report = run_verify(paths[0], Path(paths[1]), revision=revision, vision_tower=vision_tower)
            print(report.text())
            if not report.passed:
                raise UserError(f"{paths[1]}: differs from its source by more than {report.dtype} explains")


def inspect(
    path: Annotated[Path, typer.Argument(help="A converted checkpoint or a Hugging Face folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Shows what a checkpoint holds: parameters by part, dtype, bytes, configuration, origin."""
    from sparsevlm_jax.checkpoints.describe import describe, print_description

    _on_host()
    found = describe(path)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_description(found)


def _on_host() -> None:
    """Converting is work for the host: leave accelerators alone, and their memory to others."""
    import jax

    jax.config.update("jax_platforms", "cpu")


@contextmanager
def _progress(verb: str) -> Iterator[Any]:
    """A bar on stderr: bytes, rate, time left, memory. Yields what to call with bytes done and bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from sparsevlm_jax.process import memory

    columns = (
        TextColumn(verb),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )

    progress = Progress(*columns, console=Console(stderr=True))
    tasks: list[Any] = []

    def watch(done: int, total: int) -> None:
        now = memory()
        text = f"{now['VmRSS'] / 1e9:.2f} GB (peak {now['VmHWM'] / 1e9:.2f})"
        if not tasks:  # what an earlier run has done does not count for the rate
            tasks.append(progress.add_task(verb, total=total, completed=done, memory=text))
            progress.start()
        progress.update(tasks[0], completed=done, memory=text)

    try:
        yield watch
    finally:
        if tasks:
            progress.stop()
