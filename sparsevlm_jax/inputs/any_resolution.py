"""Images of any size as tiles, and which patch stands where in the prompt.

LLaVA-NeXT looks at an image twice: scaled to one tile, and scaled into a canvas of several tiles, whose patches are
written row by row, without those that show the canvas' padding, each row closed by a newline token. Everything is
Python ints and NumPy on the host; the tiles themselves are cut by transformers. Source: LLaVA's
`select_best_resolution` and `unpad_image`, whose order of floating-point operations is kept: it decides single patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsevlm_jax.layout import NEWLINE, ImageLayout, Size, square

BASE_TILE = 0  # the whole image; the canvas' tiles follow, row by row


def best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that shows most pixels of an image; of equal ones that which wastes least, then the first."""
    height, width = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    return max(canvases, key=merit)  # max keeps the first of equals


def lay_out(size: Size, tile: int, grid: int, canvases: Sequence[Size]) -> ImageLayout:
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
    lines = np.concatenate([patch, np.full((len(patch), 1), NEWLINE)], axis=1)
    base = np.arange(grid**2)
    newline = len(base) + np.arange(lines.size).reshape(lines.shape)[:, -1:]
    return ImageLayout(
        tiles=1 + down * across,
        index=np.concatenate([base, lines.reshape(-1)])[:, None],
        weight=None,
        line=np.concatenate([base, np.broadcast_to(newline, lines.shape).reshape(-1)]),
        places=np.concatenate([square(BASE_TILE, grid, grid), square(1, *lines.shape)]),
    )


def _without_padding(patches: np.ndarray, size: Size) -> np.ndarray:
    """The patches [h, w] of a canvas without the borders that an image of this size leaves empty."""
    (height, width), (rows, columns) = size, patches.shape
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return patches[border : rows - border]
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return patches[:, border : columns - border]
