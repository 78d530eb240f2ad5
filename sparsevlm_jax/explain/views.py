"""The rectangles in which patches are drawn, with what the model saw there. NumPy only.

An image of one tile is one view. Where a family shows an image as a whole and as the tiles of a canvas, both are views,
and the newline tokens are a last column of the canvas. Each frame of a video is one. A class
token belongs to a view and has no place in it.

Axis letters: o original visual tokens of the prompt, t tiles, f frames, S pixels per side of either, h rows and w
columns of a view, p pixels per side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, groupby
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.explain.provenance import ABSENT
from sparsevlm_jax.layout import NEWLINE, ImageLayout
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan

Drawn = TypeVar("Drawn")
BASE, CANVAS = "base", "canvas"
BLANK, LINE_END = (255, 255, 255), (70, 78, 96)  # what is drawn of a patch without a token, and of a newline


class View(NamedTuple):
    """A rectangle of visual tokens of one image or frame.

    Attributes:
      image: its number among the images of the prompt; of a frame, that of its video among the videos.
      name: `BASE` or `CANVAS`, or which frame it is; empty where the image has one view.
      tokens: the number of the original visual token in each place; `ABSENT` where a patch has none.
      newlines: the last column is no patches but the newline tokens that close the rows.
      pixels: as the model saw them, scaled by nothing.
      class_token: the number of the visual token that stands for all of it; `ABSENT` where there is none.
      is_frame: it is a frame of a video.
    """

    image: int
    name: str
    tokens: Int[np.ndarray, "h w"]
    newlines: bool
    pixels: UInt8[np.ndarray, "height width 3"]
    class_token: int = ABSENT
    is_frame: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.tokens.shape
        return rows, columns - self.newlines

    def of(self, values: Shaped[np.ndarray, "o"], absent: float | int = 0) -> Shaped[np.ndarray, "h w"]:
        """What a value of every original visual token is in each place of the view."""
        return values_at(self.tokens, values, absent)

    @property
    def numbers(self) -> Int[np.ndarray, "n"]:
        """All its visual tokens, the class token and newlines among them."""
        placed = self.tokens[self.tokens != ABSENT]
        return placed if self.class_token == ABSENT else np.append(placed, self.class_token)


def values_at(
    tokens: Int[np.ndarray, "h w"], values: Shaped[np.ndarray, "o"], absent: float | int = 0
) -> Shaped[np.ndarray, "h w"]:
    """What a value of every original visual token is where tokens of these numbers lie."""
    return np.where(tokens == ABSENT, np.asarray(absent, values.dtype), values[tokens])


def views_of(
    layouts: Sequence[ImageLayout],
    tiles: UInt8[np.ndarray, "t S S 3"],
    frames: UInt8[np.ndarray, "f S S 3"],
    plan: Plan,
    config: ModelConfig,
) -> list[View]:
    """The views of all images and videos of a prompt, in order.

    Args:
      tiles: from `as_seen`, as many for each image.
      frames: from there, of all videos.
    """
    found, before, left, numbers_of = [], 0, {False: tiles, True: frames}, {False: count(), True: count()}
    for layout in layouts:
        kind = layout.is_video
        image, each = next(numbers_of[kind]), layout.tiles if kind else config.most_tiles
        own, left[kind] = left[kind][:each], left[kind][each:]
        if plan.grid is None:
            found += _views(image, layout, before, own, config)
            before += layout.tokens
        else:  # the method shrinks images, which are one tile each then
            numbers = before + np.arange(plan.grid**2).reshape(plan.grid, plan.grid)
            found.append(View(image, "", numbers, False, own[0]))
            before += numbers.size
    return found


def in_rows(views: Sequence[View], drawn: Sequence[Drawn]) -> list[list[Drawn]]:
    """What was made of each view: the frames of a video together, all others by themselves."""
    keys = [(view.is_frame, view.image, "" if view.is_frame else view.name) for view in views]
    rows = groupby(zip(keys, drawn, strict=True), lambda pair: pair[0])
    return [[each for _, each in row] for _, row in rows]


def as_seen(
    pixels: Float[np.ndarray, "t 3 S S"], image_processor: Any, plan: Plan, config: ModelConfig
) -> UInt8[np.ndarray, "t s s 3"]:
    """The processor's last steps undone, from what the tower takes back to colours."""
    shrink = METHODS[plan.sparsity.method].shrink_images
    if plan.grid is not None and shrink is not None:
        pixels = np.asarray(shrink(jnp.asarray(pixels), plan.grid * config.vision.patch_size))
    if getattr(image_processor, "do_normalize", False):
        mean, std = (np.asarray(x)[:, None, None] for x in (image_processor.image_mean, image_processor.image_std))
        pixels = pixels * std + mean
    if getattr(image_processor, "do_rescale", False):
        pixels = pixels / image_processor.rescale_factor
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _views(
    image: int, layout: ImageLayout, before: int, tiles: UInt8[np.ndarray, "t S S 3"], config: ModelConfig
) -> list[View]:
    """Of one image or video, whose tokens are counted from `before` on."""
    firsts = np.unique(layout.places[:, 0]).tolist()
    names = ("",) if len(firsts) == 1 else (BASE, CANVAS)
    if layout.is_video:
        names = [f"frame {number + 1}" for number in firsts]
    squares, index = _patches(tiles, config), _patch_numbers(layout, config)
    found = []
    for name, first in zip(names, firsts, strict=True):
        own, patch = layout.places[:, 0] == first, layout.places[:, 1] >= 0
        inside, apart = np.flatnonzero(own & patch), np.flatnonzero(own & ~patch)
        place = tuple(layout.places[inside, 1:].T)
        tokens = np.full([axis.max() + 1 for axis in place], ABSENT)
        tokens[place] = inside
        pixels = np.full((*tokens.shape, *squares.shape[1:]), BLANK, np.uint8)
        pixels[place] = np.where((index[inside] == NEWLINE)[:, None, None, None], LINE_END, squares[index[inside]])
        numbers = np.where(tokens == ABSENT, ABSENT, before + tokens)
        newlines, class_token = bool(np.any(index[inside] == NEWLINE)), before + int(apart[0]) if len(apart) else ABSENT
        found.append(View(image, name, numbers, newlines, _joined(pixels), class_token, layout.is_video))
    return found


def _patches(tiles: UInt8[np.ndarray, "t S S 3"], config: ModelConfig) -> UInt8[np.ndarray, "n p p 3"]:
    """All patches of all tiles; what a tile has beyond its last whole patch, no tower sees."""
    grid, side = config.vision.grid, config.vision.patch_size
    cut = tiles[:, : grid * side, : grid * side].reshape(len(tiles), grid, side, grid, side, 3)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 3)


def _patch_numbers(layout: ImageLayout, config: ModelConfig) -> Int[np.ndarray, "v"]:
    """Of each token its patch, counted through all tiles, or `NEWLINE`: `index` counts class tokens too."""
    index, patches = layout.index[:, 0], config.vision.grid**2
    tokens = layout.tokens // layout.tiles if layout.is_video else config.tile_tokens
    tile, inside = np.divmod(index, tokens)
    patch = tile * patches + inside - (tokens - patches)
    return np.where(index == NEWLINE, NEWLINE, patch)


def _joined(squares: UInt8[np.ndarray, "h w p p 3"]) -> UInt8[np.ndarray, "height width 3"]:
    """Patches side by side."""
    rows, columns, side = squares.shape[:3]
    return squares.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
