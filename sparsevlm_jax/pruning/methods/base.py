"""What a method is.

Axis letters: b batch, l sequence length, n heads, k key-value heads, h head dim, r rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from sparsevlm_jax.config import TextConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.ops.attention import attention_rows
from sparsevlm_jax.pruning.plan import StagePlan
from sparsevlm_jax.pruning.settings import BUDGETS, Sparsity, names_of
from sparsevlm_jax.pruning.sparsify import take
from sparsevlm_jax.pruning.tokens import Tokens
from sparsevlm_jax.rotary import Rope


class PruningContext(NamedTuple):
    """The decoder layer that has just run, as a scoring function sees it.

    Queries and keys are those that it ran on, or, where the method looks ahead, those of the next layer on its output.
    Before the first layer (pruning layer -1) there are none but ahead.
    """

    query: Float[Array, "b l n h"] | None  # rotated
    key: Float[Array, "b l k h"] | None  # rotated
    tokens: Tokens  # its output
    stage: StagePlan  # static: the stage that it ends
    rope: Rope
    seed: Integer[Array, ""] | int | None = None  # where the method draws random numbers

    @property
    def kept(self) -> Int[Array, "b"]:
        """Visual tokens that each row keeps, by the plan; not there where data decides."""
        assert self.tokens.counts is not None
        return self.tokens.counts[0].kept

    def ordinals(self) -> Int[Array, "b l"]:
        """Number of each visual token among those of its row, in order from 0."""
        return jnp.maximum(jnp.cumsum(self.tokens.visual, axis=1) - 1, 0)

    def rater_rows(self) -> tuple[Int[Array, "b r"], Bool[Array, "b r"]]:
        """Places of the raters in the sequence, and which of those places are filled."""
        rows = self.tokens.rater_rows
        return rows, jnp.arange(rows.shape[1])[None, :] < self.tokens.rater_count[:, None]

    def attention(self, rows: Int[Array, "b r"]) -> Float[Array, "b n r l"]:
        """The layer's attention probabilities in these rows, float32; never all rows."""
        if self.query is None or self.key is None:
            raise UserError("pruning layer -1: this method scores by attention, there is none before the first layer")
        return attention_rows(take(self.query, rows), self.key, rows, self.tokens.lengths)


class Scores(NamedTuple):
    """Scores of all tokens (those of other than visual ones are not looked at), higher is better.

    `keep` is how many visual tokens each row keeps where the method decides that from data, and has a `kept_by_rank`;
    else None.
    `details` goes into the trace.
    """

    values: Float[Array, "b l"]
    keep: Int[Array, "b"] | None = None
    details: dict[str, Array] = {}


def _anything(sparsity: Sparsity, text: TextConfig) -> None:
    """For methods that run on every decoder."""


def _never(sparsity: Sparsity) -> bool:
    return False


@dataclass(frozen=True)
class Method:
    """A way to have fewer visual tokens, and all that others may want to know of it.

    Attributes:
      settings: its own layers, positions, recycling and options, with no budget set; a seed if it draws random
        numbers.
      score: rates the visual tokens at a pruning layer; None where there is no pruning layer.
      source: where it comes from.
      summary: how it ranks visual tokens, in a line for people; by default its source.
      guided: the question's own words choose.
      needs_saliency: the score reads `Tokens.saliency`.
      looks_ahead: the score's queries and keys are the next layer's, where there is one.
      budgets: the settings of `settings.BUDGETS` that it takes; `no_budget` says why no others.
      settle: its settings from what a caller gives, where that is more than to set fields.
      require: refuses settings that a decoder does not allow.
      published_counts: equivalent tokens -> counts kept at `PRUNING_LAYERS`, as released.
      kept_by_rank: how many tokens stay for a rank, where data decides that; `Scores.keep` says so at run time.
      stage_by_stage: whether such a plan's stages run as programs of their own (`generation.ladder`).
      shrink_images: makes pixels [m, 3, h, w] smaller, to so many per side, before the tower.
      shrink_features: makes projected patches [m, v, d] fewer, to so many per side, after it.
    """

    settings: Sparsity
    score: Callable[[PruningContext, Sparsity], Scores] | None
    source: str
    summary: str = ""
    guided: bool = False
    needs_saliency: bool = False
    looks_ahead: bool = False
    budgets: tuple[str, ...] = BUDGETS
    no_budget: str = ""
    settle: Callable[..., Sparsity] | None = None
    require: Callable[[Sparsity, TextConfig], None] = _anything
    published_counts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    kept_by_rank: Callable[[Sparsity, int], int] | None = None
    stage_by_stage: Callable[[Sparsity], bool] = _never
    shrink_images: Callable[[Array, int], Array] | None = None
    shrink_features: Callable[[Array, int], Array] | None = None

    @property
    def name(self) -> str:
        return self.settings.method

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the settings that are its own, which others refuse."""
        return names_of(self.settings.options)

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return self.settings.seed is not None

    @property
    def shrinks(self) -> bool:
        """Whether it makes the image smaller before the decoder, rather than drop tokens inside."""
        return self.shrink_images is not None or self.shrink_features is not None

    @property
    def reduces(self) -> bool:
        """Whether it does anything at all: dense does not."""
        return self.score is not None or self.shrinks

    @property
    def counts_are_bounds(self) -> bool:
        """Whether a plan's counts are the most that can stay, and data decides how many do."""
        return self.kept_by_rank is not None

    @property
    def in_short(self) -> str:
        """How it ranks visual tokens, or where it comes from."""
        return self.summary or self.source

    def refuse_budget(self, name: str) -> None:
        """Refuses a budget that this method does not take.

        Raises:
          UserError: it does not.
        """
        if name not in self.budgets:
            raise UserError(f"{self.name} takes no `{name}`: {self.no_budget}")
