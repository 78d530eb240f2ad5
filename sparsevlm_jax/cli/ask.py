"""The command `sparsevlm ask`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import jax
import typer

from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.cli.options import (
    Aspect,
    ImageFiles,
    Json,
    MaxNewTokens,
    ModelOptions,
    PruningOptions,
    Seed,
    VideoOptions,
    note,
    require_readable,
    spread_options,
)
from sparsevlm_jax.cli.plan import plan_report
from sparsevlm_jax.cli.waiting import compilation_notice
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.api import pieces, require_processor, settings_for, stream_ids
from sparsevlm_jax.generation.request import Generation


@spread_options
def ask(
    *,
    question: Annotated[
        list[str], typer.Option(metavar="TEXT", help="Repeat it for a batch of questions about the same images.")
    ],
    image: ImageFiles = None,
    videos: VideoOptions,
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
    """Answers a question about images or a video."""
    sparsity = pruning.sparsity(seed=seed, ladder=ladder or None)
    if stream and (len(question) > 1 or as_json):
        raise UserError("--stream prints one answer as text: give one --question and no --json")
    require_readable(image or [], question)
    videos.require_readable()
    loaded = source.load()
    processor = require_processor(loaded)
    inputs = processor([image or []], question, aspect, [videos.files], videos.rule)
    chunks = stream_ids(
        loaded.params,
        loaded.config,
        inputs.ids,
        inputs.images,
        every=None if stream else max_new_tokens,
        **settings_for(loaded, sparsity, max_new_tokens, temperature, top_p, seed),
    )
    result = None
    with compilation_notice():
        for piece, chunk in pieces(chunks, processor, loaded.params):
            result = chunk
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


def _ask_report(answers: list[str], result: Generation, model: Model) -> dict[str, Any]:
    return {
        "answers": answers,
        "tokens": result.tokens,
        "model": model.name,
        "method": result.plan.sparsity.method,
        "plan": plan_report(result.plan),
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
