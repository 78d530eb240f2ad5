"""Weights, pixels and token ids drawn from an integer hash of name and index.

Processes that share nothing make the same bits, with NumPy, JAX or PyTorch, on any device: everything is int32 until
one exact conversion and one rounding. Names are the canonical ones of `sparsevlm_jax.models.names`, indices count the
elements of the tensor as a Hugging Face checkpoint stores it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.bench.shapes import PREFIX, Cell
from sparsevlm_jax.inputs.packing import TiledImages, pack_images

UNIT = 2.0**-23  # of the integers that `numbers` draws
STD_OF_UNIFORM = 3**-0.5  # of numbers in [-1, 1)


class Draw(NamedTuple):
    """How a tensor is drawn: `scale` times a uniform number in [-1, 1), or one in [7/8, 9/8) for norms."""

    seed: int
    scale: float  # exact in float32
    norm: bool


def numbers(index: Any, seed: Any) -> Any:
    """Integers in [-2^23, 2^23) for int32 indices: an int32 array of NumPy, JAX or PyTorch, which must wrap around."""
    return mix(mix(index) + seed) >> 8


def mix(x: Any) -> Any:
    """A bijection of int32 that scrambles all bits ("lowbias32", C. Wellons' hash prospector, 2018)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as int32
    return x ^ ((x >> 16) & 0xFFFF)


def seed_of(name: str) -> int:
    """A seed for a name, as a Python int that fits int32."""
    return zlib.crc32(name.encode()) - 2**31


def draw_of(name: str, shape: tuple[int, ...]) -> Draw:
    """How the tensor of a canonical name is drawn.

    Weights keep the size of their input; queries, keys and the head are wider, so that attention is far from uniform
    and logits are well apart: what is chosen then does not hang on the last bit of a float32.
    """
    if len(shape) == 1:
        norm = name.endswith(".weight")
        return Draw(seed_of(name), 0.125 if name.endswith(".bias") else 0.5, norm)
    std = 0.5 if "embed" in name and "patch" not in name else math.prod(shape[1:]) ** -0.5
    wider = {"q_proj": 2.0, "k_proj": 2.0, "lm_head": 4.0}.get(name.split(".")[-2], 1.0)
    return Draw(seed_of(name), float(np.float32(std * wider / STD_OF_UNIFORM)), norm=False)


def values(integers: Any, scale: Any, norm: bool, to_float: Callable[[Any], Any]) -> Any:
    """Integers of `numbers` to float32 values, as `Draw` says; `to_float` casts an integer array to float32."""
    if norm:
        return to_float((integers >> 3) + 2**23) * UNIT
    return to_float(integers) * UNIT * scale


def pixels(cell: Cell) -> np.ndarray:
    """Images of all rows, in order: float32 [batch * images, 3, S, S], about as wide as normalised photographs; of
    a family with tiles, all tiles of each; of videos, their frames."""
    vision, tiles = cell.config.vision, cell.config.most_tiles
    shape = (cell.batch * cell.images * tiles, vision.num_channels, vision.image_size, vision.image_size)
    return values(_host_numbers("pixels", shape), 1.75, False, lambda x: x.astype(np.float32))


def images(cell: Cell) -> np.ndarray | TiledImages:
    """The same as `embed` takes them."""
    config, layouts = cell.config, cell.layouts
    if not config.packs_images:
        return pixels(cell)
    each = len(layouts) // cell.batch
    packing = pack_images([layouts[row * each : (row + 1) * each] for row in range(cell.batch)], config)
    if cell.video:
        frames = pixels(cell)
        return TiledImages(frames[:0], packing, frames)
    return TiledImages(pixels(cell), packing)


def input_ids(cell: Cell) -> np.ndarray:
    """A row of ids per prompt, int32 [batch, l]: words, the image markers from place `PREFIX` on, and words again."""
    config = cell.config
    ids = _host_numbers("ids", (cell.batch, cell.length)) % config.image_token_id
    prefix = min(PREFIX, cell.text_tokens // 2)
    ids[:, prefix : prefix + cell.visual_tokens] = config.image_token_id
    return ids


def _host_numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return numbers(np.arange(math.prod(shape), dtype=np.int32), seed_of(name)).reshape(shape)
