"""What a method is.

Axis letters: b batch, l sequence length, n heads, k key-value heads, h head dim, r rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from sparsevlm_jax.attention import attention_rows
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.schedule import Sparsity, StagePlan
from sparsevlm_jax.sparsify import Tokens, positions_where, take


class Layer(NamedTuple):
    """The decoder layer that has just run, as a scoring function sees it.

    Queries and keys are those that it ran on, or, where the method looks ahead, those of the next layer on its output.
    Before the first layer (pruning layer -1) there are none but ahead.
    """

    query: Float[Array, "b l n h"] | None  # rotated
    key: Float[Array, "b l k h"] | None  # rotated
    tokens: Tokens  # its output
    stage: StagePlan  # static: the stage that it ends
    rope_theta: float
    seed: Integer[Array, ""] | int | None = None  # where the method draws random numbers

    @property
    def kept(self) -> Int[Array, "b"]:
        """Visual tokens that each row keeps, by the plan: at least one is dropped."""
        return jnp.minimum(self.stage.keep or 0, jnp.maximum(jnp.sum(self.tokens.visual, axis=1) - 1, 0))

    def ordinals(self) -> Int[Array, "b l"]:
        """Number of each visual token among those of its row, in order from 0."""
        return jnp.maximum(jnp.cumsum(self.tokens.visual, axis=1) - 1, 0)

    def rater_rows(self) -> tuple[Int[Array, "b r"], Bool[Array, "b r"]]:
        """Places of the raters in the sequence, and which of those places are filled."""
        text = self.tokens.raters.shape[1] - self.stage.visual
        rows = positions_where(self.tokens.raters, text)
        return rows, jnp.arange(text)[None, :] < jnp.sum(self.tokens.raters, axis=1, keepdims=True)

    def attention(self, rows: Int[Array, "b r"]) -> Float[Array, "b n r l"]:
        """The layer's attention probabilities in these rows, float32; never all rows."""
        if self.query is None or self.key is None:
            raise UserError("pruning layer -1: this method scores by attention, there is none before the first layer")
        return attention_rows(take(self.query, rows), self.key, rows, self.tokens.lengths)


class Scores(NamedTuple):
    """Scores of all tokens (those of other than visual ones are not looked at), higher is better.

    `keep` is how many visual tokens each row keeps where the method decides that from data, else None.
    `details` goes into the trace.
    """

    values: Float[Array, "b l"]
    keep: Int[Array, "b"] | None = None
    details: dict[str, Array] = {}


@dataclass(frozen=True)
class Method:
    """A way to have fewer visual tokens.

    Attributes:
      settings: its own layers, positions and recycling, with no budget set; a seed if it draws random numbers.
      score: rates the visual tokens at a pruning layer; None where there is no pruning layer.
      source: where it comes from.
      needs_saliency: the score reads `Tokens.saliency`.
      looks_ahead: the score's queries and keys are the next layer's, where there is one.
    """

    settings: Sparsity
    score: Callable[[Layer, Sparsity], Scores] | None
    source: str
    needs_saliency: bool = False
    looks_ahead: bool = False

    @property
    def name(self) -> str:
        return self.settings.method

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return self.settings.seed is not None
