"""Images of any size as tiles, and which patch stands where in the prompt.

LLaVA-NeXT looks at an image twice: scaled to one tile, and scaled into a canvas of several tiles, whose patches are
written row by row, without those that show the canvas' padding, each row closed by a newline token. Everything is
Python ints and NumPy on the host; sizes are (height, width) throughout. Source: LLaVA's `process_anyres_image` and
`unpad_image`, whose order of floating-point operations is kept: it decides single patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

Size = tuple[int, int]
BASE_TILE = 0  # the whole image; the canvas' tiles follow, row by row
NEWLINE = -1  # in `Layout.rows`: not a patch but the newline token


class Layout(NamedTuple):
    """The visual tokens of one image, in the order of the prompt.

    Attributes:
      tiles: how many the tower sees, the base tile included.
      rows: of each visual token its patch, counted through all tiles in order, or `NEWLINE`.
      places: tile, and y and x in patches: in the base tile, or for the others (tile 1) in the canvas without its
        padding, where a newline stands at x = the row's width.
    """

    tiles: int
    rows: Int[np.ndarray, "v"]
    places: Int[np.ndarray, "v 3"]

    @property
    def tokens(self) -> int:
        return len(self.rows)


def best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that shows most pixels of an image; of equal ones that which wastes least, then the first."""
    height, width = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    return max(canvases, key=merit)  # max keeps the first of equals


def fitted_size(size: Size, canvas: Size) -> Size:
    """The image's size when it is scaled into the canvas, sides in proportion."""
    (height, width), (most_height, most_width) = size, canvas
    across, down = most_width / width, most_height / height
    if across < down:
        return min(math.ceil(height * across), most_height), most_width
    return most_height, min(math.ceil(width * down), most_width)


def cut_tiles(image: Image.Image, tile: int, canvases: Sequence[Size], resample: Image.Resampling) -> list[Image.Image]:
    """The base tile and the canvas' tiles, row by row, each `tile` × `tile` pixels; padding is black."""
    size = (image.height, image.width)
    canvas_size = best_canvas(size, canvases)
    height, width = fitted_size(size, canvas_size)
    canvas = Image.new("RGB", (canvas_size[1], canvas_size[0]))
    scaled = image.resize((width, height), resample)
    canvas.paste(scaled, ((canvas_size[1] - width) // 2, (canvas_size[0] - height) // 2))
    corners = [(x, y) for y in range(0, canvas_size[0], tile) for x in range(0, canvas_size[1], tile)]
    return [image.resize((tile, tile), resample), *(canvas.crop((x, y, x + tile, y + tile)) for x, y in corners)]


def lay_out(size: Size, tile: int, grid: int, canvases: Sequence[Size]) -> Layout:
    """Where the patches of an image of this size go.

    Args:
      size: of the image, before anything is scaled.
      tile: pixels per side of a tile.
      grid: patches per side of a tile.
      canvases: what the model may scale it to.
    """
    canvas = best_canvas(size, canvases)
    down, across = canvas[0] // tile, canvas[1] // tile
    y, x = (np.arange(count * grid) for count in (down, across))
    # Patches are counted tile by tile: tile (row, column), then y and x within it.
    tile_of = 1 + (y[:, None] // grid) * across + x[None, :] // grid
    patch = tile_of * grid**2 + (y[:, None] % grid) * grid + x[None, :] % grid
    patch = _without_padding(patch, size)
    rows = np.concatenate([patch, np.full((len(patch), 1), NEWLINE)], axis=1)
    base = np.arange(grid**2)
    return Layout(
        tiles=1 + down * across,
        rows=np.concatenate([base, rows.reshape(-1)]),
        places=np.concatenate([_places(BASE_TILE, grid, grid), _places(1, *rows.shape)]),
    )


def _without_padding(patches: np.ndarray, size: Size) -> np.ndarray:
    """The patches [h, w] of a canvas without the borders that an image of this size leaves empty."""
    (height, width), (rows, columns) = size, patches.shape
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return patches[border : rows - border]
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return patches[:, border : columns - border]


def _places(tile: int, height: int, width: int) -> Int[np.ndarray, "v 3"]:
    y, x = np.divmod(np.arange(height * width), width)
    return np.stack([np.full_like(y, tile), y, x], axis=1)
