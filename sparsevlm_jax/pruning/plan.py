"""A schedule: how many visual tokens stand where, in plain ints. No arrays here.

A schedule cuts the decoder's layers into stages of one sequence length each. After the last layer of
a stage some visual tokens are dropped, some of those are recycled into a few merged tokens, and the
next stage runs on the shorter sequence. Dense is the schedule of one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from sparsevlm_jax.config import TextConfig
from sparsevlm_jax.pruning.settings import Sparsity


@dataclass(frozen=True)
class StagePlan:
    """Decoder layers `start` to `stop` - 1, which share one sequence length.

    Attributes:
      start, stop: layers, 0-based; an empty stage (start == stop) only holds the tokens left by the last layer.
      visual: visual tokens that enter, at most; rows of a batch may have fewer.
      keep: visual tokens kept after layer stop - 1, at most; None where nothing is pruned (the last stage).
      pool: dropped tokens that are recycled, at most.
      clusters: merged tokens that they become, at most.
      standing: visual tokens left for the next stage, at most.
    """

    start: int
    stop: int
    visual: int
    keep: int | None = None
    pool: int = 0
    clusters: int = 0
    standing: int = 0

    def text_tokens(self, columns: int) -> int:
        """Columns that a sequence of this stage has for tokens that are not visual."""
        return columns - self.visual


@dataclass(frozen=True)
class Rows:
    """What decides how many visual tokens each row keeps, by its own number; `budgets.kept_table` makes the counts.

    Attributes:
      counts: original visual tokens that a row may have, ascending.
      decoder: whose schedule it is.
      texts: under a budget that counts text, the numbers of other tokens that a row is counted with, ascending: the
        smallest that holds its own. Empty where it counts none, or as many as visual ones.
    """

    counts: range
    decoder: TextConfig
    texts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A schedule for one layout of the prompt: hashable, a static argument of `jax.jit`.

    Attributes:
      sparsity: the settings it was made from.
      stages: in order.
      grid: visual tokens per side of an image, where the image itself is shrunk ("pool", "downsample").
      text_tokens: room for the other tokens of a prompt, where the plan was made for one length of text.
      rows: where each row keeps what its own number of visual tokens says; the stages hold the most of any row then.
        None where all keep the stages' counts, as far as they have so many.
    """

    sparsity: Sparsity
    stages: tuple[StagePlan, ...]
    grid: int | None = None
    text_tokens: int | None = None
    rows: Rows | None = None

    @property
    def visual_tokens(self) -> int:
        """Visual tokens that a prompt may hold under this plan."""
        return self.stages[0].visual

    @property
    def num_layers(self) -> int:
        return self.stages[-1].stop

    @property
    def stops(self) -> tuple[int, ...]:
        """Where each stage ends: all of a plan that decoding depends on."""
        return tuple(stage.stop for stage in self.stages)

    def entering(self, visual: Sequence[int] | None = None) -> list[int]:
        """Visual tokens that enter each layer: what compute costs.

        Args:
          visual: tokens entering each stage in some row, where those are fewer than planned.
        """
        counts = [stage.visual for stage in self.stages] if visual is None else visual
        return [n for stage, n in zip(self.stages, counts, strict=True) for _ in range(stage.start, stage.stop)]

    def standing(self, visual: Sequence[int] | None = None) -> list[int]:
        """Visual tokens standing after each layer: what the authors' budgets count. `visual` as for `entering`."""
        counts = [stage.visual for stage in self.stages] if visual is None else visual
        after: list[int] = []
        for stage, now, then in zip(self.stages, counts, [*counts[1:], counts[-1]], strict=True):
            if stage.start < stage.stop:
                after += [now] * (stage.stop - stage.start - 1) + [then]
        return after

    def equivalent_tokens(self, visual: Sequence[int] | None = None) -> float:
        """Mean over layers of the visual tokens standing after each: the authors' count (their 192 is 192.03)."""
        return sum(self.standing(visual)) / self.num_layers

    def entering_tokens(self, visual: Sequence[int] | None = None) -> float:
        """Mean over layers of the visual tokens entering each: what costs (206.5 for their 192)."""
        return sum(self.entering(visual)) / self.num_layers


def require_count(name: str, value: object) -> None:
    """Refuses what is no number of things.

    Raises:
      ValueError: not an int, or below 0.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}: a whole number from 0 is expected")
