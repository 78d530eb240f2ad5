"""Which patch of an image stands at which visual token: the host's side of packing. NumPy only.

Axis letters: v visual tokens, k patches that a token is the weighted sum of.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Size = tuple[int, int]  # height and width, in pixels or patches
NEWLINE = -1  # in `ImageLayout.index`: not a patch but the newline token


class ImageLayout(NamedTuple):
    """The visual tokens of one image, or of one video, in the order of the prompt.

    Attributes:
      tiles: squares of pixels that the vision tower sees.
      index: the patches of each token, counted through all tiles in order, or `NEWLINE`.
      weight: what share of each of them is in it; None where a token is one patch.
      line: of each token the newline that closes its line; of a newline, and of a token in no such line, itself.
      places: tile, y and x of each token, in patches. Where tiles are parts of one canvas, tile is the first of them
        and y and x count through the canvas. A class token stands at y = x = -1.
      is_video: the tiles are the frames of a video.
    """

    tiles: int
    index: Int[np.ndarray, "v k"]
    weight: Float[np.ndarray, "v k"] | None
    line: Int[np.ndarray, "v"]
    places: Int[np.ndarray, "v 3"]
    is_video: bool = False

    @property
    def tokens(self) -> int:
        return len(self.index)


def one_tile(grid: int, class_tokens: int, dropped: int) -> ImageLayout:
    """A square image, patch by patch behind the tower's class token, which stands at y = x = -1; without the first
    `dropped` of all these."""
    class_token = np.array([[0, -1, -1]] * class_tokens, np.int64).reshape(-1, 3)
    places = np.concatenate([class_token, square(0, grid, grid)])[dropped:]
    order = np.arange(len(places))
    return ImageLayout(1, order[:, None], None, order, places)


def whole_frames(frames: int, grid: int, class_tokens: int) -> ImageLayout:
    """The frames of a video one after the other, each patch by patch behind its class token."""
    one = one_tile(grid, class_tokens, 0)
    order = np.arange(frames * one.tokens)
    places = np.tile(one.places, (frames, 1)) + np.array([1, 0, 0]) * (order // one.tokens)[:, None]
    return ImageLayout(frames, order[:, None], None, order, places, is_video=True)


def square(tile: int, height: int, width: int) -> Int[np.ndarray, "v 3"]:
    """The places of a rectangle of patches, row by row."""
    y, x = np.divmod(np.arange(height * width), width)
    return np.stack([np.full_like(y, tile), y, x], axis=1)
