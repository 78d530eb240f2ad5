"""The held-out questions: scenes of unseen handwriting over unseen regions of the photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparsevlm_jax.config import ModelConfig
from training.questions import KINDS, Question, ask
from training.scenes import CELLS, Scene, draw_scene
from training.words import BEGIN, IMAGE, PAD, encode

SEED = 2026


class HeldOut(NamedTuple):
    """Scenes and questions about them."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]
    scene_of: np.ndarray  # int64 [questions]: index of each question's scene


def held_out(scenes: int, seed: int = SEED) -> HeldOut:
    """Scenes with 1 to 9 digits, and one question of each kind that a scene allows: nearly nine a scene.

    The first scenes are the same whatever their number.
    """
    drawn, asked, scene_of = [], [], []
    for number in range(scenes):
        random = np.random.default_rng((seed, number))
        scene = draw_scene(random, "held-out", int(random.integers(1, CELLS**2 + 1)))
        found = [question for kind in KINDS if (question := ask(scene, random, kind)) is not None]
        drawn.append(scene)
        asked += found
        scene_of += [number] * len(found)
    return HeldOut(tuple(drawn), tuple(asked), np.asarray(scene_of))


def prompts(
    texts: Sequence[str], config: ModelConfig, numbers: Mapping[str, int], longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as the processor makes them, all of one padded length.

    Args:
      texts: questions.
      numbers: ids of the model's words.
      longest: ids of the longest question with "assistant:", its answer and the end.

    Returns:
      Ids, int32 [n, l], and lengths, int32 [n].
    """
    prefix = [BEGIN, numbers["user:"], *[IMAGE] * config.tokens_per_image]
    rows = [[*prefix, *encode(text, numbers), numbers["assistant:"]] for text in texts]
    room = len(prefix) + longest - 2  # an answer and an end are never part of a prompt
    ids = np.asarray([row + [PAD] * (room - len(row)) for row in rows], np.int32)
    return ids, np.asarray([len(row) for row in rows], np.int32)
