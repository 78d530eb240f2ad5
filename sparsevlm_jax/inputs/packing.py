"""Ragged rows of token ids into one rectangle, its sides taken from buckets so that few shapes are compiled.

Images go the same way: their tiles and visual tokens are padded to sizes that depend on no single image.

Axis letters: b batch, l packed sequence length, m images, t tiles, n visual tokens, k patches that one is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.layout import NEWLINE, ImageLayout

TEXT_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
NEW_TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Packed(NamedTuple):
    """Rows of ids in one rectangle: padding at the end, `text` + `visual` columns."""

    input_ids: Int[np.ndarray, "b l"]
    lengths: Int[np.ndarray, "b"]
    text: int
    visual: int

    @property
    def valid(self) -> Bool[np.ndarray, "b l"]:
        return np.arange(self.input_ids.shape[1])[None, :] < self.lengths[:, None]


class ImagePacking(NamedTuple):
    """Where every visual token of a batch comes from: its patches among those of all tiles, and their shares.

    Rows of the family's own, such as the newline token, are counted from -1 downwards. The first sum(rows) tokens are
    real.
    """

    index: Any  # int32 [n, k]
    weight: Any  # float32 [n, k]; None where every token is one patch
    line: Any  # int32 [n], see `ImageLayout`
    rows: Any  # int32 [r]: visual tokens in each row of the batch, or in one row that stands for all
    frame: Any  # int32 [n]: a number for each frame, and for each image


class TiledImages(NamedTuple):
    """Images as the tower and the packer of a family with tiles take them: on the host, on a device, or traced."""

    pixel_values: Any  # float32 [t, 3, S, S]
    packing: ImagePacking
    frames: Any = None  # float32 [f, 3, S, S], of videos, whose patches are counted behind those of all tiles

    @property
    def tiles(self) -> int:
        """With the frames of videos."""
        return len(self.pixel_values) + (0 if self.frames is None else len(self.frames))


def pack_images(layouts: Sequence[Sequence[ImageLayout]], config: ModelConfig) -> ImagePacking:
    """The packing of images and videos in the order of their visual tokens.

    Every row is padded to the bucket of the one with most tokens, so that no single image decides a size; the padding
    repeats patch 0.

    Args:
      layouts: of each row's images and videos.
    """
    index, line, weight, frame, before = [], [], [], [np.zeros(1, np.int64)], 0
    flat = [layout for row in layouts for layout in row]
    tokens = len(layouts) * config.visual_bucket(max(sum(layout.tokens for layout in row) for row in layouts))
    for start, layout in zip(_first_patches(flat, config), flat, strict=True):
        index.append(np.where(layout.index == NEWLINE, NEWLINE, start + layout.index))
        line.append(before + layout.line)
        weight += [] if layout.weight is None else [layout.weight]
        frame.append(frame[-1][-1] + 1 + layout.places[:, 0] * layout.is_video)
        before += layout.tokens
    padding = tokens - before
    return ImagePacking(
        _padded(index, padding).astype(np.int32),
        _padded(weight, padding).astype(np.float32) if weight else None,
        np.concatenate([*line, np.arange(before, tokens)]).astype(np.int32),
        np.array([sum(layout.tokens for layout in row) for row in layouts], np.int32),
        np.concatenate([*frame[1:], np.zeros(padding)]).astype(np.int32),
    )


def _first_patches(layouts: Sequence[ImageLayout], config: ModelConfig) -> list[int]:
    """Where those of each image and video begin: first come those of all images, each padded to the most tiles, then
    those of all videos."""
    image = config.most_tiles * config.tile_tokens
    before = {False: 0, True: image * sum(not layout.is_video for layout in layouts)}
    starts = []
    for layout in layouts:
        starts.append(before[layout.is_video])
        before[layout.is_video] += layout.tokens if layout.is_video else image
    return starts


def _padded(parts: Sequence[np.ndarray], padding: int) -> np.ndarray:
    return np.concatenate([*parts, np.zeros((padding, parts[0].shape[1]), parts[0].dtype)])


def pack(rows: Sequence[np.ndarray], image_token_id: int, visual_bucket: Callable[[int], int] = int) -> Packed:
    """Pads rows of ids to the bucket of their text and to that of their largest number of visual tokens.

    Args:
      visual_bucket: of a number of visual tokens; by default the number itself.

    Raises:
      UserError: more text than the largest bucket.
    """
    counts = [int(np.sum(row == image_token_id)) for row in rows]
    most_text = max(len(row) - v for row, v in zip(rows, counts, strict=True))
    text, visual = text_bucket(most_text), visual_bucket(max(counts))
    ids = np.zeros((len(rows), text + visual), np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return Packed(ids, np.array([len(row) for row in rows], np.int32), text, visual)


def text_bucket(size: int) -> int:
    """To how many columns so many text tokens are padded.

    Raises:
      UserError: more than the largest bucket.
    """
    return bucket(size, TEXT_BUCKETS, "the prompt's text")


def bucket(size: int, buckets: Sequence[int], what: str) -> int:
    """The smallest bucket that holds `size`.

    Raises:
      UserError: none does.
    """
    for limit in buckets:
        if size <= limit:
            return limit
    raise UserError(f"{what} has {size} tokens, the largest bucket {buckets[-1]}: shorten it")


def shrink_markers(row: np.ndarray, image_token_id: int, tokens_per_image: int, left: int) -> np.ndarray:
    """Leaves the first `left` of the `tokens_per_image` markers of each image."""
    visual = row == image_token_id
    number = (np.cumsum(visual) - 1) % tokens_per_image
    return row[~visual | (number < left)]
