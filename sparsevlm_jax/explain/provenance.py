"""What became of every original visual token, read from a trace. NumPy only; one row of a batch.

Axis letters: o original visual tokens, l sequence length, n those of them in one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from sparsevlm_jax.pruning.prune import PruningStep
from sparsevlm_jax.pruning.tokens import Tokens

KEPT, DROPPED = 0, -1  # a positive outcome is the number of the merged token that it went into
ABSENT = -2  # where outcomes are laid out: a patch without a token
GONE = -1


class Origins(NamedTuple):
    """Which original visual tokens the tokens of a sequence are made of. Each is in one token, or gone."""

    place: Int[np.ndarray, "o"]  # of the token that an original one is in; GONE where it is in none
    share: Float32[np.ndarray, "o"]  # how much of that token it is; 0 where it is in none

    def of(self, place: int) -> tuple[Int[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
        """The numbers of the original visual tokens in the token at a place, and their shares, which sum to 1."""
        inside = np.flatnonzero(self.place == place)
        return inside, self.share[inside]


def origins(first: Tokens, events: Sequence[PruningStep], row: int = 0) -> list[Origins]:
    """Of the sequence that enters each stage, from the `first` one on: of a row's own visual tokens, in order."""
    places = np.flatnonzero(np.asarray(first.visual)[row])
    found = [Origins(places, np.ones(len(places), np.float32))]
    for event in events:
        found.append(_after(event, found[-1], row))
    return found


def outcomes(events: Sequence[PruningStep], found: Sequence[Origins], row: int = 0) -> list[Int[np.ndarray, "o"]]:
    """What every original visual token is on entering each stage: KEPT, DROPPED, or the number of a merged token.

    Merged tokens are numbered from 1 through all prunings, and keep their number until they are dropped, or merged
    again under a new one.

    Args:
      found: from `origins`, for the same events.
    """
    told = [np.full(len(found[0].place), KEPT)]
    numbered = 0
    for event, after in zip(events, found[1:], strict=True):
        source = np.asarray(event.source)[row][after.place]
        cluster = source - event.before.visual.shape[1]
        outcome = np.where(cluster >= 0, numbered + 1 + cluster, told[-1])
        told.append(np.where(after.place == GONE, DROPPED, outcome))
        numbered += int(event.selection.cluster_count[row])
    return told


def scores(event: PruningStep, before: Origins, row: int = 0) -> Float[np.ndarray, "o"]:
    """Score of the visual token that each original one is part of before an event; nan where it no longer stands."""
    return np.where(before.place == GONE, np.nan, np.asarray(event.scores.values)[row][before.place])


def chosen(event: PruningStep, before: Origins, row: int = 0) -> Bool[np.ndarray, "o"]:
    """Original visual tokens in the visual tokens that an event kept as they were."""
    return (before.place != GONE) & np.asarray(event.selection.kept)[row][before.place]


def _after(event: PruningStep, before: Origins, row: int) -> Origins:
    """The same, one pruning later."""
    into, weight = _joins(event, row)
    merged = 0 if event.recycled is None else event.recycled.centers.shape[1]
    place_of = np.full(len(into) + merged, GONE)
    source = np.asarray(event.source)[row, : int(event.after.lengths[row])]
    place_of[source] = np.arange(len(source))
    place = np.where(before.place == GONE, GONE, place_of[into[before.place]])
    return Origins(place, np.where(place == GONE, np.float32(0), before.share * weight[before.place]))


def _joins(event: PruningStep, row: int) -> tuple[Int[np.ndarray, "l"], Float32[np.ndarray, "l"]]:
    """What each token of the old sequence goes on as, in the numbers of `PruningStep.source`, and with what weight."""
    length = event.before.visual.shape[1]
    into, weight = np.arange(length), np.ones(length, np.float32)
    if event.recycled is not None:
        pool = np.asarray(event.selection.pool)[row, : int(event.selection.pool_count[row])]
        cluster = np.asarray(event.recycled.assignment)[row, : len(pool)]
        into[pool] = length + cluster
        weight[pool] = np.asarray(event.recycled.weights)[row, cluster, np.arange(len(pool))]
    return into, weight
