"""Whose words choose: one cut after the first layer, under a question's own text, another question's, or no text.

The command takes no choice from outside, so these runs are the retention study's, in Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from benchmarks.easy_vqa.data import Asked, image_paths, split
from benchmarks.easy_vqa.variants import cuts
from benchmarks.retention.run import Outcome, Questions, Study
from benchmarks.retention.variants import Variant
from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.config import ModelConfig
from training.batches import normalise
from training.heldout import prompts
from training.shapes import HELD_OUT, IDS, LONGEST, resized, shape_mask


def run(model: Model, asked: Sequence[Asked]) -> list[tuple[Variant, Outcome]]:
    """Every cut over all questions of the test split."""
    study = Study(model, questions(asked, image_paths("test"), model.config))
    return [(variant, study.run(variant)) for variant in track(cuts(), "cuts")]


def held_out_accuracy(model: Model) -> float:
    """Dense, over the images of the training split that are not learned from."""
    paths = dict(list(image_paths("train").items())[-HELD_OUT:])
    asked = [row for row in split("train") if row.image in paths]
    return float(Study(model, questions(asked, paths, model.config)).run(cuts()[0]).right.mean())


def questions(asked: Sequence[Asked], paths: Mapping[int, Path], config: ModelConfig) -> Questions:
    """A split as the retention study takes questions; an answer depends on the patches of the shape."""
    images = [resized(Image.open(path)) for path in paths.values()]
    order = {number: place for place, number in enumerate(paths)}
    image_of = np.asarray([order[row.image] for row in asked])
    ids, lengths = prompts([row.text for row in asked], config, IDS, LONGEST)
    return Questions(
        pixels=np.stack([normalise(pixels) for pixels in images]),
        image_of=image_of,
        ids=ids,
        lengths=lengths,
        answers=np.asarray([IDS[row.answer] for row in asked]),
        masks=np.stack([shape_mask(pixels) for pixels in images])[image_of],
    )
