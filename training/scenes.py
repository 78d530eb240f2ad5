"""Scenes: handwritten digits in colour over photographs, with everything that is in them known.

Digits are real (scikit-learn's `load_digits`: UCI's optical recognition set, 1797 samples of 8 × 8, 17 grey levels),
photographs too (scikit-learn's two sample images). The held-out split shares neither a handwriting sample nor a
region of a photograph with the one that is trained on.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

PIXELS = 112
PATCH = 8
GRID = PIXELS // PATCH  # patches along an edge
CELLS = 3  # digits stand in a CELLS × CELLS grid
SIZES = (17, 24)  # edge of a digit, pixels
COLOURS = {
    "red": (230, 35, 35),
    "green": (40, 200, 60),
    "blue": (60, 110, 255),
    "yellow": (250, 230, 50),
    "white": (255, 255, 255),
    "orange": (255, 140, 0),
    "purple": (190, 70, 225),
}
PLACES = (
    *("top-left", "top-centre", "top-right"),
    *("middle-left", "centre", "middle-right"),
    *("bottom-left", "bottom-centre", "bottom-right"),
)
HELD_OUT_SAMPLES = 297  # of 1797 handwriting samples
HELD_OUT_WIDTH = 0.3  # the right part of each photograph
SPLITS = ("train", "held-out")


class Digit(NamedTuple):
    """One digit of a scene."""

    value: int
    colour: str
    place: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels, exclusive


class Scene(NamedTuple):
    """An image and what is in it."""

    pixels: np.ndarray  # uint8 [PIXELS, PIXELS, 3]
    digits: tuple[Digit, ...]


@cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Handwriting samples of a split: opacity, float32 [n, 8, 8] in [0, 1], and values, int64 [n]."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[:-HELD_OUT_SAMPLES] if split == "train" else order[-HELD_OUT_SAMPLES:]
    return (data.images[chosen] / 16).astype(np.float32), data.target[chosen]


@cache
def photographs(split: str) -> tuple[np.ndarray, ...]:
    """The split's region of each photograph at half its size, uint8 [height, width, 3]."""
    regions = []
    for photo in whole_photographs():
        border = round(photo.shape[1] * (1 - HELD_OUT_WIDTH))
        region = photo[:, :border] if split == "train" else photo[:, border:]
        regions.append(np.asarray(Image.fromarray(region).reduce(2)))
    return tuple(regions)


def whole_photographs() -> list[np.ndarray]:
    """scikit-learn's sample images, uint8 [height, width, 3]."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def draw_scene(random: np.random.Generator, split: str, count: int) -> Scene:
    """Draws a scene.

    Args:
      random: decides everything; the same state gives the same scene.
      split: "train" or "held-out".
      count: number of digits, at most CELLS².
    """
    if split not in SPLITS:
        raise ValueError(f'split "{split}": expected one of {", ".join(SPLITS)}')
    canvas = _background(random, split)
    samples, values = handwriting(split)
    digits = []
    for cell in random.choice(CELLS**2, size=count, replace=False):
        sample = random.integers(len(values))
        colour = list(COLOURS)[random.integers(len(COLOURS))]
        box = _paint(canvas, samples[sample], COLOURS[colour], int(cell), random)
        digits.append(Digit(int(values[sample]), colour, PLACES[cell], box))
    canvas += 4 * random.standard_normal(canvas.shape, np.float32)
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), tuple(digits))


def patch_mask(digits: tuple[Digit, ...]) -> np.ndarray:
    """Which patches the digits' boxes touch, bool [GRID²] in raster order."""
    mask = np.zeros((GRID, GRID), bool)
    for digit in digits:
        left, top, right, bottom = digit.box
        mask[top // PATCH : -(-bottom // PATCH), left // PATCH : -(-right // PATCH)] = True
    return mask.reshape(-1)


def _background(random: np.random.Generator, split: str) -> np.ndarray:
    """A crop of a photograph, mirrored or not, darkened so that every colour stands out from it."""
    photo = photographs(split)[random.integers(2)]
    size = int(random.integers(3 * PIXELS // 4, min(photo.shape[:2]) + 1))
    top, left = (int(random.integers(edge - size + 1)) for edge in photo.shape[:2])
    box = (left, top, left + size, top + size)
    crop = Image.fromarray(photo).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(crop, np.float32) * random.uniform(0.3, 0.55)
    return pixels[:, ::-1].copy() if random.random() < 0.5 else pixels


def _paint(
    canvas: np.ndarray, sample: np.ndarray, colour: tuple[int, int, int], cell: int, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Paints a digit somewhere in its cell, slightly turned and sheared; returns the box of what is visible."""
    size = int(random.integers(SIZES[0], SIZES[1] + 1))
    opacity = _warp(sample, size, random)
    tint = np.asarray(colour, np.float32) + random.uniform(-15, 15, 3)
    corner = []
    for index in divmod(cell, CELLS):
        start, stop = PIXELS * index // CELLS, PIXELS * (index + 1) // CELLS
        corner.append(int(random.integers(start, stop - size + 1)))
    top, left = corner
    area = canvas[top : top + size, left : left + size]
    area += opacity[..., None] * (tint - area)
    rows, columns = (np.flatnonzero((opacity > 0.3).any(axis=axis)) for axis in (1, 0))
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _warp(sample: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """The sample at another size, turned by up to 12 degrees, sheared and stretched by up to a tenth."""
    turn, shear = random.uniform(-0.21, 0.21), random.uniform(-0.1, 0.1)
    stretch = random.uniform(0.9, 1.1, 2)
    back = np.array([[np.cos(turn), np.sin(turn) + shear], [-np.sin(turn), np.cos(turn)]]) * stretch[:, None] * 8 / size
    shift = 4 - back @ [size / 2, size / 2]
    coefficients = (*back[0], shift[0], *back[1], shift[1])
    image = Image.fromarray(sample * 255)  # mode F
    warped = image.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(warped) / 255 * 1.3, 0, 1)
