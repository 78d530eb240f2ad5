"""Ragged rows of token ids into one rectangle, its sides taken from buckets so that few shapes are compiled.

Axis letters: b batch, l packed sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sparsevlm_jax.errors import UserError

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


def pack(rows: Sequence[np.ndarray], image_token_id: int) -> Packed:
    """Pads rows of ids to the bucket of their text and to their largest number of visual tokens.

    Raises:
      UserError: more text than the largest bucket.
    """
    visual = [int(np.sum(row == image_token_id)) for row in rows]
    most_text = max(len(row) - v for row, v in zip(rows, visual, strict=True))
    text = bucket(most_text, TEXT_BUCKETS, "the prompt's text")
    ids = np.zeros((len(rows), text + max(visual)), np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return Packed(ids, np.array([len(row) for row in rows], np.int32), text, max(visual))


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
    """Leaves the first `left` of the `tokens_per_image` markers of each picture."""
    visual = row == image_token_id
    number = (np.cumsum(visual) - 1) % tokens_per_image
    return row[~visual | (number < left)]
