"""The sequence between two stages.

Axis letters: b batch, l sequence length, t text tokens, d width, i layers, a axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Counts(NamedTuple):
    """What becomes of each row's visual tokens at one pruning layer."""

    kept: Int[Array, "b"]
    pool: Int[Array, "b"]  # recycled
    clusters: Int[Array, "b"]  # merged tokens that those become


class Tokens(NamedTuple):
    """The sequence between two stages. Rows are packed: the first `lengths` tokens are valid."""

    hidden: Float[Array, "b l d"]
    positions: Int[Array, "b l a"]  # rotary positions for the next stage, on each axis
    visual: Bool[Array, "b l"]
    rater_rows: Int[Array, "b t"]  # places of the raters, ascending; those past their number mean nothing
    rater_count: Int[Array, "b"]
    text_count: Int[Array, "b"]  # tokens that are not visual, none of which is ever dropped
    lengths: Int[Array, "b"]
    saliency: Float[Array, "b l"] | None  # how much the vision tower itself looks at each visual token
    add: Float[Array, "b l i d"] | None = None  # what the next i layers each add to their output
    frame: Int[Array, "b l"] | None = None  # whose tokens compete with each other first; None where all do
    counts: tuple[Counts, ...] | None = None  # at each pruning layer ahead; None where data decides

    @property
    def valid(self) -> Bool[Array, "b l"]:
        return jnp.arange(self.visual.shape[1])[None, :] < self.lengths[:, None]

    @property
    def visual_count(self) -> Int[Array, "b"]:
        return self.lengths - self.text_count

    @property
    def raters(self) -> Bool[Array, "b l"]:
        slots = jnp.arange(self.rater_rows.shape[1])[None, :]
        return scatter_true(jnp.asarray(self.rater_rows), slots < self.rater_count[:, None], self.visual.shape[1])


def scatter_true(index: Int[Array, "b i"], values: Bool[Array, "b i"], length: int) -> Bool[Array, "b {length}"]:
    """False everywhere but at index[b, i] where values[b, i]; masked entries go nowhere, wherever they point."""
    index = jnp.where(values, index, length)
    return jax.vmap(lambda at: jnp.zeros(length, bool).at[at].set(True, mode="drop"))(index)
