"""What became of every original visual token, read from a trace. NumPy only; one row of a batch.

Axis letters: o original visual tokens, l sequence length, c clusters, m pool of recycled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from sparsevlm_jax.pruning.prune import Event
from sparsevlm_jax.pruning.sparsify import Tokens

KEPT, DROPPED = 0, -1  # a positive fate is the number of the merged token that it went into


def fates(events: Sequence[Event], visual_tokens: int, row: int = 0) -> list[Int[np.ndarray, "o"]]:
    """The fate of every original visual token on entering each stage: KEPT, DROPPED, or the number of a merged token.

    Merged tokens are numbered from 1 through all prunings, and keep their number until they are dropped, or merged
    again under a new one.
    """
    found = [np.full(visual_tokens, KEPT)]
    numbered = 0
    for event in events:
        fate = found[-1].copy()
        members = _members(event, row)
        for number, own in enumerate(members, start=numbered + 1):
            fate[own] = number
        numbered += len(members)
        fate[~np.any(_contents(event.after, row), axis=0)] = DROPPED
        found.append(fate)
    return found


def scores(event: Event, row: int = 0) -> Float[np.ndarray, "o"]:
    """Score of the visual token that each original one is part of; nan where it no longer stands."""
    contents = _contents(event.before, row)
    values = np.asarray(event.scores.values)[row]
    return np.where(np.any(contents, axis=0), values[np.argmax(contents, axis=0)], np.nan)


def chosen(event: Event, row: int = 0) -> Bool[np.ndarray, "o"]:
    """Original visual tokens in the visual tokens that were kept as they were."""
    return np.any(_contents(event.before, row)[np.asarray(event.selection.kept)[row]], axis=0)


def _contents(tokens: Tokens, row: int) -> Bool[np.ndarray, "l o"]:
    """Which original visual tokens are in which token of the sequence."""
    assert tokens.origins is not None
    return (np.asarray(tokens.origins)[row] > 0) & np.asarray(tokens.visual)[row][:, None]


def _members(event: Event, row: int) -> Bool[np.ndarray, "c o"]:
    """Original visual tokens in each token that this pruning merged."""
    contents = _contents(event.before, row)
    if event.recycled is None:
        return np.zeros((0, contents.shape[1]), bool)
    count = int(event.selection.cluster_count[row])
    in_cluster = np.asarray(event.recycled.weights)[row, :count] > 0
    return in_cluster @ contents[np.asarray(event.selection.pool)[row]]
