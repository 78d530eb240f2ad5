"""A small set of questions on disk, and a model that answers it, alive or killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsevlm_jax import Model, Sparsity, load
from sparsevlm_jax.evaluate.answers_file import AnswersFile
from sparsevlm_jax.evaluate.engines import Local
from sparsevlm_jax.evaluate.run import Job, run
from sparsevlm_jax.generation.batches import Batcher

LETTERS = 259  # the first ids of `hf.llama_tokenizer` are special ones and bytes
SPARSITY, NEW, BATCH = Sparsity.v15(keep_at=((0, 5),)), 3, 2
LONG = "which of all the many things that are shown here is the one on the left"


def speaking(checkpoint: Path) -> Model:
    """A `tiny_llava` whose answers are letters: single bytes would all print as U+FFFD."""
    model = load(checkpoint)
    head = model.params["language_model"]["lm_head"]["weight"].at[:LETTERS].set(0)
    decoder = {**model.params["language_model"], "lm_head": {"weight": head}}
    return replace(model, params={**model.params, "language_model": decoder})


def questions() -> list[dict[str, Any]]:
    """Of two buckets and without an image, in no order of buckets; the same id twice, the same images often."""
    rows = [
        {"question_id": 7, "image": "a.png", "text": "what is it"},
        {"question_id": 7, "image": "a.png", "text": "what is it and why"},
        {"question_id": "b/1", "image": "b.png", "text": "what is it", "category": "count"},
        {"question_id": "t", "text": "what"},
        {"question_id": 2, "image": "a.png", "text": "where is it"},
        {"question_id": 3, "image": "c.png", "text": "where is it now"},
        {"question_id": 4, "image": "a.png", "text": "who is it"},
        {"question_id": 4, "image": "a.png", "text": "who is it"},
        {"question_id": 5, "image": "a.png", "text": "when"},
    ]
    return rows


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_images(folder: Path, names: str = "abc", size: tuple[int, int] = (56, 56)) -> Path:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def batcher(model: Model, **settings: Any) -> Batcher:
    return Batcher(model, **({"sparsity": SPARSITY, "batch_size": BATCH, "max_new_tokens": NEW} | settings))


def answer(model: Model, job: Job, **settings: Any) -> dict[str, Any]:
    return run(Local(batcher(model, **settings)), job, job.read())


def victim(checkpoint: Path, job: Job, batches: int) -> None:
    """Answers some batches, writes half of the next, and dies as of `kill -9`; does not return."""
    append, left = AnswersFile.append, batches

    def dying(self: AnswersFile, answered: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            return append(self, answered)
        text = "".join(f"{json.dumps(row)}\n" for row in answered.values()).encode()
        self._stream.write(text[: len(text) * 3 // 4])
        self._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    AnswersFile.append = dying
    answer(speaking(checkpoint), job)
