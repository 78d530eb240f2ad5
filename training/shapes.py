"""The task of the easy-vqa model: one coloured shape in each image, asked about in 13 answers.

Images and questions are those of the training split of the PyPI package `easy-vqa`, which has to be installed; nothing
of its test split is read here. What the patches show is not in the package: the colour and the shape of an image follow
from its own questions' answers, and its patches are those whose pixels are not the background's.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sparsevlm_jax.errors import UserError
from training.batches import Batch, normalise, pack, thin
from training.model import llava_config
from training.stages import Stage, Task
from training.words import number_words

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
NEGATIONS = ("no", "not")
ASKING = (
    *("what", "is", "does", "the", "a", "there", "in", "of", "image", "contain", "present"),
    *("color", "shape", "not"),
)
IDS = number_words((*ASKING, *COLOURS, *SHAPES, "yes", "no"))
PIXELS, PATCH = 72, 6  # images of 64 pixels are resized: 144 visual tokens
GRID = PIXELS // PATCH
LAYERS = 8
LONGEST = 12  # ids of the longest question with "assistant:", its answer and the end
HELD_OUT = 400  # the last of the 4,000 training images: not learned from
BACKGROUND_NOISE = 40  # of 255: a pixel that differs more from the corners' colour is the shape's
COVERED = 0.25  # of a patch's pixels, for it to be the shape's
MEASURED = 96  # images


class Sample(NamedTuple):
    """An image of the training split.

    Attributes:
      pixels: uint8 [PIXELS, PIXELS, 3].
      said: words that hold for its shape.
      mask: bool [v], the shape's patches.
      questions: each with its answer.
    """

    pixels: np.ndarray
    said: tuple[str, ...]
    mask: np.ndarray
    questions: tuple[tuple[str, str], ...]


STAGES = (
    Stage("see", 500, 16, 0, rate=4e-3, warm_up=50, seeing=(1.0, 1.0), alignment=1.0, presence=0.1),
    Stage(
        "answer",
        1000,
        5,
        12,
        rate=1.5e-3,
        warm_up=40,
        seeing=(0.0, 0.4),
        alignment=0.3,
        presence=0.03,
        wired=True,
        thin=True,
    ),
)


def package() -> Any:
    """The module of the package `easy-vqa`, which has images and questions in it.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("easy_vqa")
    except ImportError:
        raise UserError("its images and questions are in a package of their own: pip install easy-vqa") from None


@cache
def samples() -> tuple[Sample, ...]:
    """The training split in the package's order."""
    paths, asked = package().get_train_image_paths(), defaultdict(list)
    for text, answer, image in zip(*package().get_train_questions(), strict=True):
        asked[image].append((text, answer))
    return tuple(read_sample(Image.open(paths[number]), asked[number]) for number in sorted(paths))


@cache
def learned_from() -> tuple[Sample, ...]:
    """What is not held out and whose answers tell both colour and shape: nine tenths."""
    return tuple(sample for sample in samples()[:-HELD_OUT] if len(sample.said) == 2)


def read_sample(image: Image.Image, questions: Sequence[tuple[str, str]]) -> Sample:
    """An image and its questions as they are learned from."""
    pixels = resized(image)
    return Sample(pixels, holding(questions), shape_mask(pixels), tuple(questions))


def resized(image: Image.Image) -> np.ndarray:
    """uint8 [PIXELS, PIXELS, 3], as the checkpoint's processor resizes it."""
    return np.asarray(image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


def holding(questions: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Words that hold for an image by the answers to its questions: what is named, and what is affirmed."""
    found = set()
    for text, answer in questions:
        words = text.rstrip("?").split()
        if answer in COLOURS + SHAPES:
            found |= {answer} | {word for word in words if word in COLOURS + SHAPES}
        elif (answer == "yes") != any(word in NEGATIONS for word in words):
            found |= {word for word in words if word in COLOURS + SHAPES}
    return tuple(sorted(found))


def shape_mask(pixels: np.ndarray) -> np.ndarray:
    """Which patches are the shape's, bool [v]: the background is one colour, which most of the edge has."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).astype(int)
    differs = np.abs(pixels.astype(int) - np.median(edge, axis=0)).max(axis=2) > BACKGROUND_NOISE
    patches = differs.reshape(GRID, PATCH, GRID, PATCH).mean(axis=(1, 3))
    return (patches > COVERED).reshape(-1)


def mirrored(sample: Sample) -> Sample:
    """Left for right; no question asks for a side."""
    mask = sample.mask.reshape(GRID, GRID)[:, ::-1].reshape(-1)
    return sample._replace(pixels=sample.pixels[:, ::-1], mask=mask)


def make_batch(drawn: Sequence[Sample], random: np.random.Generator, questions: int, *, thinned: int = 0) -> Batch:
    """A batch of these images, with so many of each one's questions."""
    asked = [sample.questions[i] for sample in drawn for i in random.integers(len(sample.questions), size=questions)]
    ids, ends = zip(*(pack(text, answer, IDS, LONGEST) for text, answer in asked), strict=True) if asked else ((), ())
    masks = np.stack([sample.mask for sample in drawn])
    words = np.zeros((len(drawn), GRID**2, len(IDS)), bool)
    for found, sample in zip(words, drawn, strict=True):
        found[:, [IDS[word] for word in sample.said]] = sample.mask[:, None]
    return Batch(
        pixels=np.stack([normalise(sample.pixels) for sample in drawn]),
        words=words,
        present=words.any(axis=1),
        questions=np.asarray(ids, np.int32).reshape(len(drawn), questions, LONGEST),
        ends=np.asarray(ends, np.int32).reshape(len(drawn), questions),
        blind=random.random((len(drawn), questions)) < 0.5,
        kept=thin(random, masks, thinned) if thinned else None,
    )


def _batch(stage: Stage, seed: int, step: int, of_stage: int) -> Batch:
    random, learned = np.random.default_rng((seed, step)), learned_from()
    numbers = random.choice(len(learned), stage.scenes, replace=False)
    drawn = [mirrored(learned[number]) if random.random() < 0.5 else learned[number] for number in numbers]
    return make_batch(drawn, random, stage.questions, thinned=LAYERS if stage.thin else 0)


def _measured(seed: int) -> np.ndarray:
    return np.stack([normalise(sample.pixels) for sample in samples()[:MEASURED]])


EASY_VQA = Task(
    config=llava_config(pixels=PIXELS, patch=PATCH, words=len(IDS), layers=LAYERS),
    ids=IDS,
    spellings=(("colour", "color"),),
    said=COLOURS + SHAPES,
    told=SHAPES,
    stages=STAGES,
    batch=_batch,
    measured=_measured,
    packages=("easy-vqa", "pillow"),
)
