"""Counts for a budget, for many numbers of visual tokens at once. NumPy only.

Axis letters: n rows, each of a number of visual tokens; p pruning layers; s stages, p + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sparsevlm_jax.pruning.settings import Sparsity

Numbers = Int[np.ndarray, "n"]
Counts = Int[np.ndarray, "n p"]
BISECTIONS = 50  # as many as a ratio in [0, 1] has bits, nearly


class Asked(NamedTuple):
    """What rows are asked to keep: counts at the pruning layers from number `first` on; p: they are never pruned."""

    counts: Counts
    first: Numbers


class Cut(NamedTuple):
    """What becomes of rows."""

    entering: Int[np.ndarray, "n s"]  # visual tokens into each stage
    kept: Counts  # where a row is not pruned, all that stand
    pool: Counts
    clusters: Counts


class Price(NamedTuple):
    """What schedules cost: that of a layer with so many visual tokens, summed over layers, as a share of `whole`."""

    of_layer: Callable[[Int[np.ndarray, "n s"]], Int[np.ndarray, "n s"]]
    layers: Int[np.ndarray, "s"]  # how many have a stage's visual tokens
    whole: Numbers | int = 1

    def __call__(self, entering: Int[np.ndarray, "n s"]) -> Float[np.ndarray, "n"]:
        return self.of_layer(entering) @ self.layers / self.whole


def layers_entered(layers: Sequence[int], depth: int) -> Int[np.ndarray, "s"]:
    """How many layers get the visual tokens of each stage: what compute costs."""
    return np.diff([0, *(layer + 1 for layer in layers), depth])


def layers_left(layers: Sequence[int], depth: int) -> Int[np.ndarray, "s"]:
    """Behind how many layers the visual tokens of each stage stand: a stage's last layer counts with the next."""
    entered = layers_entered(layers, depth)
    runs = (entered > 0).astype(np.int64)
    left = entered - runs
    left[1:] += runs[:-1]
    left[-1] += runs[-1]
    return left


def cut(sparsity: Sparsity, visual: Numbers, asked: Asked) -> Cut:
    """Rows of `visual` tokens pruned: min(count, visual tokens - 1) are kept, and some of the others merged."""
    entering, steps = [visual], []
    for number, counts in enumerate(asked.counts.T):
        stand = entering[-1]
        kept = np.where(asked.first <= number, np.minimum(counts, np.maximum(stand - 1, 0)), stand)
        pool, clusters = sparsity.recycled(stand - kept)
        steps.append((kept, pool, clusters))
        entering.append(kept + clusters)
    kept, pool, clusters = np.asarray(steps, np.int64).reshape(-1, 3, len(visual)).transpose(1, 2, 0)
    return Cut(np.stack(entering, axis=1), kept, pool, clusters)


def solve(
    sparsity: Sparsity, visual: Numbers, pruning_layers: int, price: Price, target: Float[np.ndarray, "n"] | Numbers
) -> tuple[Asked, Float[np.ndarray, "n"]]:
    """Counts whose cost is nearest to each row's target, among those that fall by one common factor per pruning layer.

    Counts are visual * ratio^i at the i-th pruning layer, at least 1; every cost that grows with them can be a target.
    Each pruning layer drops a token at least, so a target next to dense does without the first of them, and one of
    dense or more without any.

    Returns:
      What to ask for, and the least cost that any counts reach: the row keeps one token at every layer where its
      target is below that.
    """

    def cost(first: Numbers, counts: Counts) -> Float[np.ndarray, "n"]:
        return price(cut(sparsity, visual, Asked(counts, first)).entering)

    shape = len(visual), pruning_layers
    one, all_of_them = np.ones(shape, np.int64), np.broadcast_to(visual[:, None], shape)
    first = np.zeros(len(visual), np.int64)
    least, dense = cost(first, one), cost(first + pruning_layers, one)
    for number in range(pruning_layers - 1):
        later = np.maximum(first, number + 1)
        first = np.where(
            (first == number) & (cost(first, all_of_them) < target) & (cost(later, one) <= target), later, first
        )
    first = np.where(target >= dense, pruning_layers, first)
    low, high = _bisect(
        lambda ratio: cost(first, _falling(visual, first, ratio, pruning_layers)) <= target, len(visual)
    )
    corners = (_falling(visual, first, ratio, pruning_layers) for ratio in (low, high))
    return Asked(_nearest(*corners, cost=lambda counts: cost(first, counts), target=target), first), least


def _falling(visual: Numbers, first: Numbers, ratio: Float[np.ndarray, "n"], pruning_layers: int) -> Counts:
    power = np.maximum(np.arange(pruning_layers)[None, :] - first[:, None] + 1, 0)
    return np.maximum(np.rint(visual[:, None] * ratio[:, None] ** power).astype(np.int64), 1)


def _bisect(
    fits: Callable[[Float[np.ndarray, "n"]], Bool[np.ndarray, "n"]], size: int
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The largest ratio that fits, from below and from above."""
    low, high = np.zeros(size), np.ones(size)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fit = fits(middle)
        low, high = np.where(fit, middle, low), np.where(fit, high, middle)
    return low, high


def _nearest(
    low: Counts, high: Counts, *, cost: Callable[[Counts], Float[np.ndarray, "n"]], target: np.ndarray
) -> Counts:
    """One step of the ratio may move several counts at once: the best of the corners of that step, the cheaper of two
    equally near."""
    moves = low != high
    number = np.cumsum(moves, axis=1) - 1
    best, best_cost = low, cost(low)
    for corner in range(1, 2 ** int(np.max(np.sum(moves, axis=1), initial=0))):
        counts = np.where(moves & (corner >> number & 1 == 1), high, low)
        price = cost(counts)
        gap, best_gap = abs(price - target), abs(best_cost - target)
        better = (gap < best_gap) | (gap == best_gap) & (price < best_cost)
        better &= np.all(np.diff(counts, axis=1) <= 0, axis=1)
        best, best_cost = np.where(better[:, None], counts, best), np.where(better, price, best_cost)
    return best
