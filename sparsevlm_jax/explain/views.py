"""The rectangles in which the patches of an image are drawn, with what the model saw there. NumPy only.

An image of one tile is one view. Where a family shows an image as a whole and as the tiles of a canvas, both are views,
and the newline tokens are a last column of the canvas.

Axis letters: o original visual tokens of the prompt, t tiles, S pixels per side of a tile, h rows and w columns of a
view, p pixels per side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.explain.provenance import ABSENT
from sparsevlm_jax.layout import NEWLINE, ImageLayout
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan

BASE, CANVAS = "base", "canvas"
BLANK, LINE_END = (255, 255, 255), (70, 78, 96)  # what is drawn of a patch without a token, and of a newline


class View(NamedTuple):
    """A rectangle of visual tokens of one image.

    Attributes:
      image: its number in the prompt.
      name: `BASE` or `CANVAS`; empty where the image has one view.
      tokens: the number of the original visual token in each place; `ABSENT` where a patch has none.
      newlines: the last column is no patches but the newline tokens that close the rows.
      pixels: as the model saw them, scaled by nothing.
    """

    image: int
    name: str
    tokens: Int[np.ndarray, "h w"]
    newlines: bool
    pixels: UInt8[np.ndarray, "height width 3"]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.tokens.shape
        return rows, columns - self.newlines

    def of(self, values: Shaped[np.ndarray, "o"], absent: float | int = 0) -> Shaped[np.ndarray, "h w"]:
        """What a value of every original visual token is in each place of the view."""
        return np.where(self.tokens == ABSENT, np.asarray(absent, values.dtype), values[self.tokens])


def views_of(
    layouts: Sequence[ImageLayout], tiles: UInt8[np.ndarray, "t S S 3"], plan: Plan, config: ModelConfig
) -> list[View]:
    """The views of all images of a prompt, in order.

    Args:
      tiles: from `as_seen`, as many for each image.
    """
    found, before, each = [], 0, config.most_tiles
    for image, layout in enumerate(layouts):
        own = tiles[image * each : (image + 1) * each]
        if plan.grid is None:
            found += _views(image, layout, before, own, config)
            before += layout.tokens
        else:  # the method shrinks images, which are one tile each then
            numbers = before + np.arange(plan.grid**2).reshape(plan.grid, plan.grid)
            found.append(View(image, "", numbers, False, own[0]))
            before += numbers.size
    return found


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
    """Of one image, whose tokens are counted from `before` on."""
    firsts = np.unique(layout.places[:, 0]).tolist()
    names = ("",) if len(firsts) == 1 else (BASE, CANVAS)
    squares, index = _patches(tiles, config), _patch_numbers(layout, config)
    found = []
    for name, first in zip(names, firsts, strict=True):
        inside = np.flatnonzero((layout.places[:, 0] == first) & (layout.places[:, 1] >= 0))
        place = tuple(layout.places[inside, 1:].T)
        tokens = np.full([axis.max() + 1 for axis in place], ABSENT)
        tokens[place] = inside
        pixels = np.full((*tokens.shape, *squares.shape[1:]), BLANK, np.uint8)
        pixels[place] = np.where((index[inside] == NEWLINE)[:, None, None, None], LINE_END, squares[index[inside]])
        numbers = np.where(tokens == ABSENT, ABSENT, before + tokens)
        found.append(View(image, name, numbers, bool(np.any(index[inside] == NEWLINE)), _joined(pixels)))
    return found


def _patches(tiles: UInt8[np.ndarray, "t S S 3"], config: ModelConfig) -> UInt8[np.ndarray, "n p p 3"]:
    """All patches of all tiles; what a tile has beyond its last whole patch, no tower sees."""
    grid, side = config.vision.grid, config.vision.patch_size
    cut = tiles[:, : grid * side, : grid * side].reshape(len(tiles), grid, side, grid, side, 3)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 3)


def _patch_numbers(layout: ImageLayout, config: ModelConfig) -> Int[np.ndarray, "v"]:
    """Of each token its patch, counted through all tiles, or `NEWLINE`: `index` counts class tokens too."""
    index, patches = layout.index[:, 0], config.vision.grid**2
    tile, inside = np.divmod(index, config.tile_tokens)
    patch = tile * patches + inside - (config.tile_tokens - patches)
    return np.where(index == NEWLINE, NEWLINE, patch)


def _joined(squares: UInt8[np.ndarray, "h w p p 3"]) -> UInt8[np.ndarray, "height width 3"]:
    """Patches side by side."""
    rows, columns, side = squares.shape[:3]
    return squares.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
