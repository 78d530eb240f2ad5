"""The command `sparsevlm`. Answers and tables go to stdout, everything about the run to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import jax
import typer

from benchmarks.command import bench
from convert import commands
from sparsevlm_jax import __version__
from sparsevlm_jax.checkpoint import Model
from sparsevlm_jax.config import PRESETS, LlavaConfig
from sparsevlm_jax.cost import Cost, cost, tower_xla_flops
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.explain.command import explain
from sparsevlm_jax.files import user_path
from sparsevlm_jax.generate import Generation, pieces, require_processor, settings_for, stream_ids
from sparsevlm_jax.options import (
    Aspect,
    Images,
    MaxNewTokens,
    ModelOptions,
    PruningOptions,
    Seed,
    note,
    require_readable,
    spread_options,
)
from sparsevlm_jax.pictures import silence_pillow
from sparsevlm_jax.schedule import Plan, Sparsity, make_plan
from sparsevlm_jax.store import silence_orbax
from sparsevlm_jax.units import in_bytes, in_si
from sparsevlm_jax.walkthrough import walk_through

app = typer.Typer(
    help="LLaVA in JAX with SparseVLM: visual tokens are dropped and recycled while the decoder runs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What `plan` counts: far beyond any model's context, and well within what XLA can count.
MOST_IMAGES, MOST_TEXT_TOKENS = 100, 100_000
_LOST = (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO)

Json = Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")]


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"sparsevlm {__version__}")
        raise typer.Exit()
    return wanted


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@spread_options
def ask(
    *,
    question: Annotated[
        list[str], typer.Option(metavar="TEXT", help="Repeat it for a batch of questions about the same pictures.")
    ],
    image: Images = None,
    source: ModelOptions,
    pruning: PruningOptions,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; above, it samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the smallest set of tokens of this probability.")
    ] = 1.0,
    seed: Seed = 0,
    aspect: Aspect = None,
    ladder: Annotated[
        bool,
        typer.Option("--ladder", help="v1 only: run stages as programs of their own, as short as this prompt needs."),
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is made.")] = False,
    as_json: Json = False,
) -> None:
    """Answers a question about pictures."""
    sparsity = pruning.sparsity(seed=seed, ladder=ladder or None)
    if stream and (len(question) > 1 or as_json):
        raise UserError("--stream prints one answer as text: give one --question and no --json")
    require_readable(image or [], question)
    loaded = source.load()
    processor = require_processor(loaded)
    inputs = processor([image or []], question, aspect)
    instalments = stream_ids(
        loaded.params,
        loaded.config,
        inputs.ids,
        inputs.pixel_values,
        every=1 if stream else max_new_tokens,
        **settings_for(loaded, sparsity, max_new_tokens, temperature, top_p, seed),
    )
    result = None
    for piece, instalment in pieces(instalments, processor, loaded.params):
        result = instalment
        if stream:
            print(piece, end="", flush=True)
    assert result is not None
    answers = [processor.decode(tokens) for tokens in result.tokens]
    if as_json:
        print(json.dumps(_ask_report(answers, result, loaded), indent=2))
    else:
        print("" if stream else "\n".join(answers))
    # After the answer, so that a run that fails says one thing only.
    note(_summary(result))


@app.command()
@spread_options
def plan(
    *,
    model: Annotated[str, typer.Option(metavar="NAME_OR_DIR", help=f"{', '.join(PRESETS)}, or a folder.")],
    pruning: PruningOptions,
    images: Annotated[int, typer.Option(metavar="N", min=1, max=MOST_IMAGES, help="Pictures in the prompt.")] = 1,
    text_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOST_TEXT_TOKENS, help="All tokens that are not visual.")
    ] = 118,
    as_json: Json = False,
) -> None:
    """Shows what a schedule keeps and what it costs, against dense. Needs no weights."""
    sparsity = pruning.sparsity()
    if model not in PRESETS and not user_path(model).exists():
        raise UserError(f"--model {model}: neither a folder nor one of {', '.join(PRESETS)}")
    config = PRESETS[model]() if model in PRESETS else LlavaConfig.from_file(user_path(model))
    visual = images * config.tokens_per_image
    dense, pruned = (make_plan(s, config, visual, text_tokens) for s in (Sparsity.dense(), sparsity))
    dense_cost, pruned_cost = (cost(config, p, text_tokens) for p in (dense, pruned))
    tower = tower_xla_flops(config, pruned) * images
    if as_json:
        report = {
            "model": model,
            "method": pruning.method,
            "text_tokens": text_tokens,
            "dense": _plan_report(dense) | asdict(dense_cost),
            "pruned": _plan_report(pruned) | asdict(pruned_cost),
            "tower_xla_flops": tower,
        }
        print(json.dumps(report, indent=2))
    else:
        _print_plan(pruned, pruned_cost, dense, dense_cost, tower, text_tokens)


app.command()(explain)
app.command("demo")(walk_through)
app.command()(commands.convert)
app.command()(commands.inspect)
app.command()(bench)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it misses torch, and finds long prompts too long
    _keep_compiled_programs()
    silence_pillow()
    silence_orbax()
    sys.exit(_run())


def _run() -> int:
    """The command's exit code."""
    try:
        if sys.stdout is None:
            raise UserError("stdout is closed: there is nowhere to print to")
        code = typer.main.get_command(app).main(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error))
    except Exception as error:
        return _explained(error)


def _explained(error: Exception) -> int:
    """What else goes wrong outside of this program in one line; a bug keeps its traceback."""
    lost = _lost_stdout(error)
    if isinstance(lost, BrokenPipeError):
        return 1  # who reads it has seen enough
    if lost is not None:
        return _fail(f"stdout cannot be written: {lost.strerror or lost}")
    # Typer's usage errors know how to say what is wrong.
    say = getattr(error, "format_message", None)
    if say is not None:
        return _fail(f"{say().rstrip('.')} (--help lists the options)")
    reason = _missing_backend()
    if reason is not None:
        return _fail(reason)
    raise error


def _lost_stdout(error: Exception) -> OSError | None:
    """Why stdout takes no more; Python would try again at exit, and complain, so it leads nowhere from here on."""
    # Files that cannot be written are UserErrors: what fails in writing and names no file is stdout.
    lost = error if isinstance(error, OSError) and error.filename is None and error.errno in _LOST else None
    try:
        sys.stdout.flush()
    except OSError as late:
        lost = late
    if lost is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return lost


def _missing_backend() -> str | None:
    """What is wrong where jax finds no device to run on; None if it does."""
    try:
        jax.devices()
    except Exception as error:  # which ones depends on the backend
        wanted = os.environ.get("JAX_PLATFORMS")
        if not wanted:
            return f"jax finds no device: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return (
            f"JAX_PLATFORMS={wanted}: jax has no such backend here; install it (on NVIDIA "
            'pip install "sparsevlm_jax[cuda12]") or unset the variable'
        )
    return None


def _fail(message: str) -> int:
    note("error: " + " ".join(message.split()))
    return 2


def _keep_compiled_programs() -> None:
    """Keeps compiled programs between calls of the command, unless the user has chosen where or has no home."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(folder):  # without HOME and an entry in passwd it stays "~/.cache"
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "sparsevlm_jax", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _plan_report(plan: Plan) -> dict[str, Any]:
    stages = [
        {"layers": [s.start, s.stop - 1], "entering": s.visual, "standing": s.standing, "kept": s.keep}
        for s in plan.stages
        if s.start < s.stop or s.keep is not None
    ]
    return {
        "stages": stages,
        "equivalent_tokens": plan.equivalent_tokens(),
        "entering_tokens": plan.entering_tokens(),
        "counts_are_upper_bounds": _counts_are_upper_bounds(plan),
    }


def _counts_are_upper_bounds(plan: Plan) -> bool:
    """Whether data decides how many tokens stay."""
    return plan.sparsity.scale is not None


def _ask_report(answers: list[str], result: Generation, model: Model) -> dict[str, Any]:
    return {
        "answers": answers,
        "tokens": result.tokens,
        "model": model.name,
        "method": result.plan.sparsity.method,
        "plan": _plan_report(result.plan),
        "visual_tokens": result.visual_tokens,
        "prompt_tokens": result.packed.lengths.tolist(),
        "compile_seconds": result.compile_seconds,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "decode_steps": result.steps,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def _summary(result: Generation) -> str:
    plan, rows = result.plan, result.visual_tokens
    counts = [f"{min(n)}" if min(n) == max(n) else f"{min(n)}-{max(n)}" for n in zip(*rows, strict=True)]
    standing, entering = (sum(map(f, rows)) / len(rows) for f in (plan.equivalent_tokens, plan.entering_tokens))
    tokens = (
        f"{plan.sparsity.method}: {' > '.join(counts)} visual tokens "
        f"({standing:.1f} equivalent, {entering:.1f} entering a layer on average)"
    )
    return (
        f"{tokens if plan.visual_tokens else 'text only, nothing to prune'}; "
        f"prefill {result.prefill_seconds:.3f} s, {result.steps} decoding steps {result.decode_seconds:.3f} s, "
        f"compile {result.compile_seconds:.1f} s on {jax.devices()[0].device_kind}"
    )


def _print_plan(plan: Plan, cost: Cost, dense: Plan, dense_cost: Cost, tower: float, text_tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    def against(what: str, scaled: Callable[[float | int], str], of: str = "") -> str:
        value, whole = getattr(cost, what), getattr(dense_cost, what)
        change = f"{abs(1 - value / whole):.1%} {'more' if value > whole else 'less'}"
        return f"{scaled(value)}{of} (dense {scaled(whole)}, {change})"

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    stages = Table("layers", "visual tokens entering", "kept", "merged", "standing after")
    for stage in plan.stages:
        if stage.start == stage.stop and stage.keep is None:
            continue
        layers = f"{stage.start} to {stage.stop - 1}" if stage.start < stage.stop else "before the first"
        kept, merged = ("-", "-") if stage.keep is None else (str(stage.keep), str(stage.standing - stage.keep))
        stages.add_row(layers, str(stage.visual), kept, merged, str(stage.standing))
    console.print(stages)
    if _counts_are_upper_bounds(plan):
        console.print("All counts are upper bounds: the prompt and the picture decide how many tokens stay.")
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("equivalent tokens (standing after a layer)", f"{plan.equivalent_tokens():.2f} of {dense.visual_tokens}"),
        ("tokens entering a layer, which is what costs", f"{plan.entering_tokens():.2f} of {dense.visual_tokens}"),
        ("FLOPs by the paper's formula", against("paper_flops", in_si, " multiply-adds")),
        ("FLOPs of the program, by XLA", against("xla_flops", in_si, ", two per multiply-add")),
        ("vision tower and projector, by XLA", f"{in_si(tower)}, in addition"),
        ("keys and values, 16 bit", against("cache_bytes", in_bytes)),
        ("other tokens in the prompt", str(text_tokens)),
    ):
        facts.add_row(name, value)
    console.print(facts)
