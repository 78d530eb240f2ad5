"""The command `sparsevlm answer`: a file of questions to a file of answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsevlm_jax import files
from sparsevlm_jax.checkpoints.load import Model
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
from sparsevlm_jax.evaluate.engines import Engine, Local
from sparsevlm_jax.evaluate.run import Job, run
from sparsevlm_jax.generation.batches import BATCH_SIZE, Batcher
from sparsevlm_jax.text import count, in_si

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class EngineOptions:
    """What answers."""

    engine: Annotated[
        str, typer.Option(metavar="|".join(ENGINES), help="This process, or workers on a Ray cluster.")
    ] = "local"
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With ray: how many; default: one for each GPU, or one."),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="With ray: of a cluster; default: RAY_ADDRESS, or one on this machine."),
    ] = None

    def require_known(self) -> None:
        """Looks at the options before a model is loaded.

        Raises:
          UserError: no such engine, or options of another one.
        """
        if self.engine not in ENGINES:
            raise UserError(f"--engine {self.engine}: expected {' or '.join(ENGINES)}")
        if self.engine == "local" and (self.workers is not None or self.address is not None):
            raise UserError("--workers and --address go with --engine ray")

    @contextmanager
    def started(self, load: Callable[[], Model], settings: dict[str, Any]) -> Iterator[Engine]:
        """The engine with its model.

        Raises:
          UserError: Ray or its cluster is not there, or the model cannot be loaded.
        """
        if self.engine == "local":
            yield Local(Batcher(load(), **settings))
            return
        from sparsevlm_jax.evaluate.ray_engine import Recipe, connected

        with connected(Recipe.here(load, settings), self.workers, self.address) as started:
            yield started


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
    engine: EngineOptions,
    as_json: Json = False,
) -> None:
    """Answers a file of questions, greedily. Interrupted at any moment, the same command goes on."""
    sparsity = pruning.sparsity(seed=seed)
    sampling = frames.rule
    engine.require_known()
    answers = files.require_writable(answers)
    job = Job(files.user_path(questions), files.user_path(images), answers, limit, _shard(shard), suffix, strict)
    asked = job.read()
    if source.model is None:
        note("no --model is given: the embedded demo model answers")
    settings = {
        "sparsity": sparsity,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "aspect": aspect,
        "sampling": sampling,
    }
    try:
        with engine.started(source.load, settings) as started:
            summary = run(started, job, asked, show=True)
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
