"""Whose words choose: one cut after the first layer, under a question's own text, another question's, or no text.

The command takes no choice from outside, so these runs are the retention study's, in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

import sparsevlm_jax as sv
from benchmarks.easy_vqa.data import Asked, image_paths
from benchmarks.easy_vqa.variants import cuts
from benchmarks.retention.run import Outcome, Questions, Study
from benchmarks.retention.variants import Variant
from sparsevlm_jax.config import ModelConfig
from training.batches import normalise
from training.heldout import prompts
from training.shapes import IDS, LONGEST, resized, shape_mask


def run(model: Path, asked: Sequence[Asked]) -> list[tuple[Variant, Outcome]]:
    """Every cut over all questions."""
    loaded = sv.load(str(model), dtype="float32")
    study = Study(loaded, questions(asked, loaded.config))
    return [(variant, study.run(variant)) for variant in track(cuts(), "cuts")]


def questions(asked: Sequence[Asked], config: ModelConfig) -> Questions:
    """The test split as the retention study takes questions; an answer depends on the patches of the shape."""
    images = [resized(Image.open(path)) for path in image_paths().values()]
    image_of = np.asarray([row.image for row in asked])
    ids, lengths = prompts([row.text for row in asked], config, IDS, LONGEST)
    return Questions(
        pixels=np.stack([normalise(pixels) for pixels in images]),
        image_of=image_of,
        ids=ids,
        lengths=lengths,
        answers=np.asarray([IDS[row.answer] for row in asked]),
        masks=np.stack([shape_mask(pixels) for pixels in images])[image_of],
    )
