"""The command `sparsevlm answer`: a file of questions to a file of answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsevlm_jax import files
from sparsevlm_jax.cli.options import (
    Aspect,
    FrameOptions,
    Json,
    MaxNewTokens,
    ModelOptions,
    PruningOptions,
    Seed,
    note,
    spread_options,
)
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.evaluate.run import Job, run
from sparsevlm_jax.generation.batches import BATCH_SIZE, Batcher
from sparsevlm_jax.text import count, in_si


@spread_options
def answer(
    *,
    questions: Annotated[
        Path,
        typer.Option(
            metavar="Q.jsonl",
            help="Questions as LLaVA's evaluation has them; ScienceQA's .json, MMBench's .tsv.",
        ),
    ],
    images: Annotated[Path, typer.Option(metavar="DIR", help="The folder of their images and videos.")],
    answers: Annotated[Path, typer.Option(metavar="A.jsonl", help="The file to write, or to go on with.")],
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Questions answered together.")] = BATCH_SIZE,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N questions.")] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only the I-th of N parts, from 0: for N processes or machines.")
    ] = "0/1",
    suffix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A line behind every question, such as how to answer it.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first question that has no answer.")] = False,
    source: ModelOptions,
    pruning: PruningOptions,
    max_new_tokens: MaxNewTokens = 128,
    seed: Seed = 0,
    aspect: Aspect = None,
    frames: FrameOptions,
    as_json: Json = False,
) -> None:
    """Answers a file of questions, greedily. Interrupted at any moment, the same command goes on."""
    sparsity = pruning.sparsity(seed=seed)
    sampling = frames.rule
    answers = files.require_writable(answers)
    job = Job(files.user_path(questions), files.user_path(images), answers, limit, _shard(shard), suffix, strict)
    asked = job.read()
    if source.model is None:
        note("no --model is given: the embedded demo model answers")
    batcher = Batcher(
        source.load(),
        sparsity=sparsity,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        aspect=aspect,
        sampling=sampling,
    )
    try:
        summary = run(batcher, job, asked, show=True)
    except KeyboardInterrupt:
        note("interrupted; the same command goes on with what is missing")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(summary, indent=2))
    note(_in_words(summary, sparsity.method))
    if summary["errors"]:
        note(f"{count(summary['errors'], 'question')} without an answer: see `metadata` in {answers}")
        raise typer.Exit(1)


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None:
        raise UserError(f"--shard {text}: expected I/N, as in 0/8 for the first of eight parts")
    return int(found[1]), int(found[2])


def _in_words(summary: dict[str, Any], method: str) -> str:
    whole = max(summary["answers"] - summary["errors"], 1)
    saved = 1 - summary["flops"] / summary["dense_flops"] if summary["dense_flops"] else 0.0
    seconds = max(summary["seconds"], 1e-9)
    return (
        f"{count(summary['answers'], 'answer')}, {summary['answered']} of them now; {method}: of "
        f"{summary['visual_in_prompt'] / whole:.1f} visual tokens {summary['entering_tokens'] / whole:.1f} entered a "
        f"layer on average, {in_si(summary['flops'])} multiply-adds ({saved:.1%} less than dense); {seconds:.1f} s: "
        f"compile {summary['compile_seconds']:.1f}, prefill {summary['prefill_seconds']:.1f}, decode "
        f"{summary['decode_seconds']:.1f}; {summary['answered'] / seconds:.2f} answers a second"
    )
