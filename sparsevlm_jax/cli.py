"""The command `sparsevlm`. Answers and tables go to stdout, everything about the run to stderr."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsevlm_jax.errors import UserError

app = typer.Typer(
    help="LLaVA in JAX with SparseVLM: visual tokens are dropped and recycled while the decoder runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Method = Annotated[str, typer.Option(help="dense, v1, v1.5, v2.0, or a rival: see the README's table.")]
Keep = Annotated[int | None, typer.Option(metavar="N", help="Equivalent visual tokens, as the authors count them.")]
KeepAt = Annotated[
    str | None,
    typer.Option(metavar="L:K,...", help="After layer L (from 0; -1: before the first) keep K visual tokens."),
]
FlopsShare = Annotated[float | None, typer.Option(help="Budget as a share of the dense decoder's FLOPs.")]
CacheBytes = Annotated[int | None, typer.Option(help="Budget as bytes of keys and values, at two bytes a value.")]
Scale = Annotated[float | None, typer.Option(help="v1 keeps int(rank * scale + bias) tokens.")]
Bias = Annotated[float | None, typer.Option(help="See --scale.")]
Heads = Annotated[int | None, typer.Option(help="Heads that v2.0 selects; 14 in the released code.")]
Json = Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")]


@app.command()
def ask(
    question: Annotated[list[str], typer.Option(help="Repeat it for a batch of questions about the same pictures.")],
    image: Annotated[list[Path] | None, typer.Option(help="Picture file; repeat it for several.")] = None,
    model: Annotated[str | None, typer.Option(metavar="DIR_OR_HF_ID", help="Default: the embedded demo model.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    method: Method = "v1.5",
    keep: Keep = None,
    keep_at: KeepAt = None,
    flops_share: FlopsShare = None,
    cache_bytes: CacheBytes = None,
    scale: Scale = None,
    bias: Bias = None,
    heads: Heads = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling, and of --method random.")] = 0,
    aspect: Annotated[str | None, typer.Option(help="pad or crop; default: as the checkpoint says.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is made.")] = False,
    as_json: Json = False,
) -> None:
    """Answers a question about pictures."""
    from sparsevlm_jax import demo
    from sparsevlm_jax.checkpoint import load
    from sparsevlm_jax.generate import pieces, require_processor, stream_ids
    from sparsevlm_jax.methods import sparsity as settings

    sparsity = settings(
        method,
        keep=keep,
        keep_at=_parse_keep_at(keep_at),
        flops_share=flops_share,
        cache_bytes=cache_bytes,
        scale=scale,
        bias=bias,
        heads=heads,
        seed=seed,
    )
    if stream and (len(question) > 1 or as_json):
        raise UserError("--stream prints one answer as text: give one --question and no --json")
    loaded = load(demo.path() if model is None else model, revision=revision, dtype=dtype)
    if model is None and not demo.IS_TRAINED:
        _note("the embedded model has random weights: its answer is noise")
    processor = require_processor(loaded)
    inputs = processor([image or []] * len(question), question, aspect)
    instalments = stream_ids(
        loaded.params,
        loaded.config,
        inputs.ids,
        inputs.pixel_values,
        sparsity=sparsity,
        max_new_tokens=max_new_tokens,
        end_tokens=loaded.generation.eos_token_ids,
        temperature=temperature,
        top_p=top_p,
        key=_key(seed),
        every=1 if stream else max_new_tokens,
    )
    result = None
    for piece, instalment in pieces(instalments, processor):
        result = instalment
        if stream:
            print(piece, end="", flush=True)
    assert result is not None
    answers = [processor.decode(tokens) for tokens in result.tokens]
    if as_json:
        print(json.dumps(_ask_report(answers, result, loaded), indent=2))
    else:
        print("" if stream else "\n".join(answers))
    _note(_summary(result, loaded))


@app.command()
def plan(
    model: Annotated[str, typer.Option(metavar="NAME_OR_DIR", help="llava-1.5-7b, llava-1.5-13b, tiny, or a folder.")],
    method: Method = "v1.5",
    keep: Keep = None,
    keep_at: KeepAt = None,
    flops_share: FlopsShare = None,
    cache_bytes: CacheBytes = None,
    scale: Scale = None,
    bias: Bias = None,
    heads: Heads = None,
    images: Annotated[int, typer.Option(help="Pictures in the prompt.")] = 1,
    text_tokens: Annotated[int, typer.Option(help="All tokens that are not visual.")] = 118,
    as_json: Json = False,
) -> None:
    """Shows what a schedule keeps and what it costs, against dense. Needs no weights."""
    from sparsevlm_jax import cost
    from sparsevlm_jax.config import PRESETS, LlavaConfig
    from sparsevlm_jax.methods import sparsity as settings
    from sparsevlm_jax.schedule import Sparsity, make_plan

    if images < 1 or text_tokens < 1:
        raise UserError(f"--images {images} and --text-tokens {text_tokens} must be at least 1")
    if model not in PRESETS and not Path(model).exists():
        raise UserError(f"--model {model}: neither a folder nor one of {', '.join(PRESETS)}")
    config = PRESETS[model]() if model in PRESETS else LlavaConfig.from_file(model)
    sparsity = settings(
        method,
        keep=keep,
        keep_at=_parse_keep_at(keep_at),
        flops_share=flops_share,
        cache_bytes=cache_bytes,
        scale=scale,
        bias=bias,
        heads=heads,
    )
    visual = images * config.tokens_per_image
    plans = {
        "dense": make_plan(Sparsity.dense(), config, visual, text_tokens),
        "pruned": make_plan(sparsity, config, visual, text_tokens),
    }
    costs = {name: cost.cost(config, p, text_tokens) for name, p in plans.items()}
    tower = cost.tower_xla_flops(config, plans["pruned"]) * images
    if as_json:
        report = {
            "model": model,
            "method": method,
            "text_tokens": text_tokens,
            **{name: _plan_report(p) | asdict(costs[name]) for name, p in plans.items()},
            "tower_xla_flops": tower,
        }
        print(json.dumps(report, indent=2))
        return
    _print_plan(plans["pruned"], plans["dense"], costs["pruned"], costs["dense"], tower, text_tokens)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it advises to install torch
    _set_up_jax()
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False)
    except UserError as error:
        code = _fail(str(error))
    except typer.Exit as stop:
        code = stop.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        # Typer's usage errors know how to say what is wrong; what else arrives here is a bug and keeps its traceback.
        say = getattr(error, "format_message", None)
        if say is None:
            raise
        code = _fail(say())
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    print("sparsevlm: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _note(message: str) -> None:
    print(f"sparsevlm: {message}", file=sys.stderr)


def _set_up_jax() -> None:
    """Keeps compiled programs between calls of the command, unless the user has chosen where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsevlm_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _key(seed: int) -> Any:
    import jax

    return jax.random.key(seed)


def _parse_keep_at(text: str | None) -> tuple[tuple[int, int], ...] | None:
    if text is None:
        return None
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(layer), int(count)) for layer, count in pairs)
    except ValueError:
        raise UserError(f'--keep-at "{text}": expected LAYER:COUNT,LAYER:COUNT,... as in 2:300,6:200,15:110') from None


def _stages(p: Any) -> list[dict[str, Any]]:
    return [
        {"layers": [s.start, s.stop - 1], "entering": s.visual, "standing": s.standing, "kept": s.keep}
        for s in p.stages
        if s.start < s.stop or s.keep is not None
    ]


def _plan_report(p: Any) -> dict[str, Any]:
    return {
        "stages": _stages(p),
        "equivalent_tokens": p.equivalent_tokens(),
        "entering_tokens": p.entering_tokens(),
    }


def _ask_report(answers: list[str], result: Any, model: Any) -> dict[str, Any]:
    import jax

    return {
        "answers": answers,
        "tokens": result.tokens,
        "model": model.name,
        "method": result.plan.sparsity.method,
        "plan": _plan_report(result.plan),
        "prompt_tokens": result.packed.lengths.tolist(),
        "compile_seconds": result.compile_seconds,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "decode_steps": result.steps,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def _summary(result: Any, model: Any) -> str:
    import jax

    plan = result.plan
    counts = [plan.visual_tokens] + [stage.standing for stage in plan.stages if stage.keep is not None]
    at_most = "at most " if plan.sparsity.scale is not None else ""
    return (
        f"{plan.sparsity.method}: {at_most}{' > '.join(map(str, counts))} visual tokens "
        f"({plan.equivalent_tokens():.1f} equivalent, {plan.entering_tokens():.1f} entering a layer on average); "
        f"prefill {result.prefill_seconds:.3f} s, {result.steps} decoding steps {result.decode_seconds:.3f} s, "
        f"compile {result.compile_seconds:.1f} s on {jax.devices()[0].device_kind}"
    )


def _print_plan(plan: Any, dense: Any, cost: Any, dense_cost: Any, tower: float, text_tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    def against(what: str, scale: float, unit: str) -> str:
        value, whole = getattr(cost, what), getattr(dense_cost, what)
        return f"{value / scale:,.2f} {unit} (dense {whole / scale:,.2f}, {1 - value / whole:.1%} saved)"

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    stages = Table("layers", "visual tokens entering", "kept", "merged", "standing after", title=None)
    for stage in plan.stages:
        if stage.start == stage.stop and stage.keep is None:
            continue
        layers = f"{stage.start} to {stage.stop - 1}" if stage.start < stage.stop else "before the first"
        kept, merged = ("-", "-") if stage.keep is None else (str(stage.keep), str(stage.standing - stage.keep))
        stages.add_row(layers, str(stage.visual), kept, merged, str(stage.standing))
    console.print(stages)
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("equivalent tokens (standing after a layer)", f"{plan.equivalent_tokens():.2f} of {dense.visual_tokens}"),
        ("tokens entering a layer, which is what costs", f"{plan.entering_tokens():.2f} of {dense.visual_tokens}"),
        ("FLOPs by the paper's formula", against("paper_flops", 1e12, "T multiply-adds")),
        (
            "FLOPs of the program, by XLA",
            against("xla_flops", 1e12, "T, two per multiply-add"),
        ),
        ("vision tower and projector, by XLA", f"{tower / 1e12:,.2f} T, in addition"),
        ("keys and values, 16 bit", against("cache_bytes", 2**20, "MiB")),
        ("other tokens in the prompt", str(text_tokens)),
    ):
        facts.add_row(name, value)
    console.print(facts)
