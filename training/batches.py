"""Batches of scenes and questions as arrays. A batch is a function of seed and step, so training can stop anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.inputs.images import CLIP_MEAN, CLIP_STD
from training.questions import ask_some
from training.scenes import CELLS, GRID, PLACES, Scene, draw_scene, patch_mask
from training.words import END, ID, PAD, VOCABULARY, encode

Arrays = Any  # NumPy's on the host, JAX's in a program
LONGEST = 11  # ids of the longest question with "assistant:", its answer and the end


class Batch(NamedTuple):
    """Scenes and questions. m scenes, q questions of each, t ids, v patches, w words."""

    pixels: Arrays  # float32 [m, 3, PIXELS, PIXELS], normalised
    words: Arrays  # bool [m, v, w]: what can be said of each patch
    present: Arrays  # bool [m, w]: what can be said of the scene
    questions: Arrays  # int32 [m, q, t]: question, "assistant:", answer, end, padding
    ends: Arrays  # int32 [m, q]: where "assistant:" stands
    blind: Arrays  # bool [m, q]: "assistant:" and what follows cannot see the scene, only the question can
    kept: Arrays = None  # bool [m, layers, v]: patches that are still there in a decoder layer; None: all


def make_batch(
    seed: int,
    step: int,
    scenes: int,
    questions: int,
    digits: tuple[int, int],
    *,
    thinned: int = 0,
) -> Batch:
    """The training batch of a step.

    Args:
      seed, step: decide everything.
      scenes, questions: how many scenes, and questions about each.
      digits: the fewest and the most in a scene.
      thinned: decoder layers that get ever fewer of the patches without digits, in half of the scenes; 0 for none.
    """
    random = np.random.default_rng((seed, step))
    drawn = [draw_scene(random, "train", int(random.integers(digits[0], digits[1] + 1))) for _ in range(scenes)]
    asked = [question for scene in drawn for question in ask_some(scene, random, questions)]
    ids, ends = zip(*(pack(q.text, q.answer, ID, LONGEST) for q in asked), strict=True) if asked else ((), ())
    words = np.stack([patch_words(scene) for scene in drawn])
    return Batch(
        pixels=np.stack([normalise(scene.pixels) for scene in drawn]),
        words=words,
        present=words.any(axis=1),
        questions=np.asarray(ids, np.int32).reshape(scenes, questions, LONGEST),
        ends=np.asarray(ends, np.int32).reshape(scenes, questions),
        blind=random.random((scenes, questions)) < 0.5,
        kept=thin(random, np.stack([patch_mask(s.digits) for s in drawn]), thinned) if thinned else None,
    )


def thin(random: np.random.Generator, told: np.ndarray, layers: int) -> np.ndarray:
    """Which patches every layer gets, bool [m, layers, v]: in half of the scenes all, in the others what is told and
    ever fewer more.

    Args:
      told: patches of what can be asked about, bool [m, v].
    """
    count = len(told)
    # Few are left in some scenes from the first layers on: else the model reads early, where there are many.
    shares = random.uniform(0.0, 1.0, (count, 1)) * np.sort(random.uniform(0.0, 1.0, (count, layers)), axis=1)[:, ::-1]
    left = random.uniform(0.0, 1.0, (count, 1, told.shape[1])) < shares[:, :, None]
    whole = random.random((count, 1, 1)) < 0.5
    return whole | left | told[:, None]


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] to float32 [3, h, w] as the checkpoint's processor does."""
    scaled = (pixels.astype(np.float32) / 255 - np.asarray(CLIP_MEAN, np.float32)) / np.asarray(CLIP_STD, np.float32)
    return scaled.transpose(2, 0, 1)


def patch_words(scene: Scene) -> np.ndarray:
    """Which words of the vocabulary hold for each patch, bool [GRID², w].

    A digit's patches are its value and its colour; every patch is its place.
    """
    words = np.zeros((GRID**2, len(VOCABULARY)), bool)
    for digit in scene.digits:
        mask = patch_mask((digit,))
        words[mask, ID[str(digit.value)]] = True
        words[mask, ID[digit.colour]] = True
    centres = (np.arange(GRID) + 0.5) * CELLS / GRID
    row, column = (axis.reshape(-1).astype(int) for axis in np.meshgrid(centres, centres, indexing="ij"))
    for patch, cell in enumerate(row * CELLS + column):
        words[patch, ID[PLACES[cell]]] = True
    return words


def pack(text: str, answer: str, ids: Mapping[str, int], longest: int) -> tuple[list[int], int]:
    """Ids of a question, "assistant:", its answer and the end, padded, and where "assistant:" stands."""
    asked = encode(text, ids)
    row = [*asked, ids["assistant:"], ids[answer], END]
    return row + [PAD] * (longest - len(row)), len(asked)
