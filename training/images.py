"""The images that come with the demo model: `python -m training.images MODEL OUT`.

Held-out scenes of a seed of their own, neither trained on nor in the retention study. Those are shown whose questions
the model answers rightly, dense and with the default pruning; how often it does not is in the study's results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np
from PIL import Image

import sparsevlm_jax as sv
from sparsevlm_jax.checkpoints.load import Model
from training.questions import KINDS, Question, ask
from training.scenes import Scene, draw_scene

SEED = 7
IMAGES = 5
QUESTIONS = 3  # about each image, of kinds that take turns
DIGITS = (5, 9)


def candidates() -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes that allow their three kinds of question."""
    kinds = list(KINDS)
    turn = 0
    for number in count():
        random = np.random.default_rng((SEED, number))
        scene = draw_scene(random, "held-out", int(random.integers(DIGITS[0], DIGITS[1] + 1)))
        asked = [ask(scene, random, kinds[(turn + step) % len(kinds)]) for step in range(QUESTIONS)]
        found = [question for question in asked if question is not None]
        if len(found) == QUESTIONS:
            turn += QUESTIONS
            yield scene, found


def is_right(model: Model, scene: Scene, questions: Sequence[Question]) -> bool:
    """Whether all questions are answered rightly, dense and with the default pruning."""
    texts, truth = [question.text for question in questions], [question.answer for question in questions]
    images = [[scene.pixels] for _ in questions]
    settings = (sv.Sparsity.dense(), sv.Sparsity.v15())
    return all(sv.generate(model, images, texts, sparsity=s, max_new_tokens=4) == truth for s in settings)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.images", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model = sv.load(options.model, dtype="float32")
    listed = {}
    right = ((scene, asked) for scene, asked in candidates() if is_right(model, scene, asked))
    for number, (scene, asked) in enumerate(islice(right, IMAGES), start=1):
        name = f"scene_{number}.png"
        Image.fromarray(scene.pixels).save(options.out / name, optimize=True)
        listed[name] = [{"question": question.text, "answer": question.answer} for question in asked]
    (options.out / "questions.json").write_text(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main()
