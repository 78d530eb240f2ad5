"""Which parameters are converted together."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsevlm_jax.checkpoints.source import Source
from sparsevlm_jax.models.names import Entry

Pair = tuple[str, Entry]


def group(source: Source) -> list[list[Pair]]:
    """Cuts the tree into groups, none larger than its largest part: a decoder layer, or the table of embeddings.

    A part (`language_model/layers_7`) is never divided.
    """
    parts: dict[tuple[str, ...], list[Pair]] = {}
    for pair in sorted(source.pairs, key=lambda pair: _natural(pair[1].path)):
        parts.setdefault(pair[1].path[:2], []).append(pair)

    def nbytes(pairs: Sequence[Pair]) -> int:
        return sum(source.nbytes(name) for name, _ in pairs)

    limit = max(nbytes(pairs) for pairs in parts.values())
    groups: list[list[Pair]] = [[]]
    for pairs in parts.values():
        if nbytes(groups[-1]) + nbytes(pairs) > limit:
            groups.append([])
        groups[-1] += pairs
    return groups


def _natural(path: Sequence[str]) -> list[list[str | int]]:
    """Sorts layers_2 before layers_10."""
    return [[int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", key)] for key in path]
