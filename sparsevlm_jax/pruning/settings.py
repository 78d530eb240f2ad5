"""What to prune and how: frozen, hashable settings, which say what they cannot be in Python's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.pruning.options import HeadOptions, Options, RankOptions

DEPTH = 32  # decoder layers of the models for which the papers publish layers and counts
PRUNING_LAYERS = (2, 6, 15)  # after which the released code prunes, of 32 layers, 0-based
V1_PRUNING_LAYERS = (2, 6, 15, 19)
PUBLISHED_VISUAL_TOKENS = 576
V1_SCALE_AND_BIAS = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
BUDGETS = ("keep", "keep_at", "flops_share", "cache_bytes")  # the settings that say how much is pruned
_DECIDING = ("keep_at", "keep", "flops_share", "cache_bytes", "ratio")  # the first that is set
_RECYCLING = {"recycle_ratio": "ratio", "recycle_group": "group"}  # flat names of `Recycling`'s fields

Part = TypeVar("Part")


@dataclass(frozen=True)
class Budget:
    """How many visual tokens stay, and where others go.

    The counts come from the first of `keep_at`, `keep`, `flops_share`, `cache_bytes` and `ratio` that is set; with none
    of them a third of the visual tokens are kept.

    Attributes:
      keep: equivalent tokens as the authors count them: the mean over layers of the visual tokens standing after
        each layer. Their "192" is 192.03.
      keep_at: (layer, count) pairs: after that layer (0-based) keep min(count, visual tokens - 1).
      flops_share: FLOPs of the decoder's prefill by the paper's formula, as a share of dense.
      cache_bytes: bytes of keys and values after the prefill, at two bytes a value. Both count text tokens too: as many
        as the bucket has that a row's own text is padded to when it is asked alone.
      ratio: keep this share of what is left at every pruning layer.
      layers: pruning layers where `keep_at` does not name them; -1 is before the first. None scales
        `published_layers`, which are those of a 32-layer decoder, to the model's depth.
    """

    keep: int | None = None
    keep_at: tuple[tuple[int, int], ...] | None = None
    flops_share: float | None = None
    cache_bytes: int | None = None
    ratio: float | None = None
    layers: tuple[int, ...] | None = None
    published_layers: tuple[int, ...] = PRUNING_LAYERS

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise UserError(f"keep={self.keep}: at least 1 visual token has to stay")
        for layer, count in self.keep_at or ():
            if layer < -1 or count < 0:
                raise UserError(f"keep_at=({layer}, {count}): layers count from 0 (-1: before the first), counts too")
        for option, share in (("flops_share", self.flops_share), ("ratio", self.ratio)):
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{option}={share}: a share in (0, 1] is expected")

    @property
    def decided_by(self) -> str:
        """The setting that the counts come from."""
        return next((name for name in _DECIDING if getattr(self, name) is not None), "keep")

    @property
    def counts_text(self) -> bool:
        """Whether what it leaves to visual tokens depends on how many others there are."""
        return self.decided_by in ("flops_share", "cache_bytes")


@dataclass(frozen=True)
class Recycling:
    """Some of the dropped tokens are merged (v1, v1.5) instead of lost: the best-scored, by density-peak clustering.

    Attributes:
      ratio: int(ratio * dropped) + 1 tokens are merged,
      group: into int(that / group) + 1.
    """

    ratio: float = 0.3
    group: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1 or self.group < 1:
            raise UserError(f"recycle_ratio {self.ratio} must be in [0, 1], recycle_group {self.group} at least 1")


@dataclass(frozen=True)
class Sparsity:
    """What to prune and how.

    Attributes:
      method: a name in `methods.METHODS`, which says how tokens are scored; "dense" prunes nothing.
      budget: how many stay, and after which layers.
      recycling: what becomes of the dropped tokens; None loses them all (v2.0).
      options: those that only this method has.
      positions: rotary positions after pruning, "renumber" (v1, v1.5) or "keep" (v2.0).
      jitter: amplitude of the density noise that replays recorded traces (the array is an argument of `prefill`).
      per_frame: spread what stays evenly over the frames of videos, images counting as one each: ours, where the
        released code lets all frames compete.
      seed: of methods that draw random numbers; None for those that draw none. `prefill` also takes it traced.
    """

    method: str
    budget: Budget = Budget()
    recycling: Recycling | None = Recycling()
    options: Options = Options()
    positions: str = "renumber"
    jitter: float = 1e-6
    per_frame: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.positions not in ("renumber", "keep"):
            raise UserError(f'positions is "{self.positions}": expected "renumber" or "keep"')

    @classmethod
    def dense(cls) -> Sparsity:
        """No pruning: one stage."""
        return cls("dense", recycling=None)

    @classmethod
    def v15(cls, keep: int | None = None, keep_at: Sequence[tuple[int, int]] | None = None) -> Sparsity:
        """SparseVLM v1.5: fixed counts, recycling, renumbered positions (the paper's tables come from this line)."""
        return cls("v1.5", Budget(keep, None if keep_at is None else tuple(keep_at)))

    @classmethod
    def v1(cls, keep: int | None = None, scale: float | None = None, bias: float | None = None) -> Sparsity:
        """SparseVLM v1: the rank of the raters' attention decides how many stay; recycling, renumbered positions.

        Args:
          keep: 192, 128 or 64, the budgets for which the authors released a scale and a bias.
          scale, bias: instead of `keep`.

        Raises:
          UserError: another `keep`, or neither.
        """
        if scale is None or bias is None:
            if keep not in V1_SCALE_AND_BIAS:
                found = "no budget" if keep is None else f"keep={keep}"
                known = ", ".join(map(str, V1_SCALE_AND_BIAS))
                raise UserError(f"{found}: v1 knows `keep` {known}; for anything else set `scale` and `bias`")
            scale, bias = V1_SCALE_AND_BIAS[keep]
        return cls("v1", Budget(published_layers=V1_PRUNING_LAYERS), options=RankOptions(scale, bias))

    @classmethod
    def video(cls) -> Sparsity:
        """v1 as the authors' code for Video-LLaVA has it: after layer 1 alone, as many tokens as the rank."""
        return cls.v1(scale=1.0, bias=0.0).changed(layers=(1,))

    @classmethod
    def v20(
        cls, keep: int | None = None, keep_at: Sequence[tuple[int, int]] | None = None, heads: int = 14
    ) -> Sparsity:
        """SparseVLM+ (v2.0): gravity correction, head selection, no recycling, positions kept."""
        budget = Budget(keep, None if keep_at is None else tuple(keep_at))
        return cls("v2.0", budget, recycling=None, options=HeadOptions(heads), positions="keep")

    def changed(self, **settings: Any) -> Sparsity:
        """These settings with some of them changed, each by the name that it has in `methods.sparsity`.

        Those names are the fields of `budget`, `options` and of this class itself, `recycle` (whether), and
        `recycle_ratio` and `recycle_group` for the fields of `recycling`.

        Raises:
          UserError: no such setting, or a value that it cannot have.
        """
        known = (*names_of(self.budget), *names_of(self.options), "recycle", *_RECYCLING, *_OWN)
        for name in settings:
            if name not in known:
                raise UserError(f"{self.method} has no setting `{name}`: it has {', '.join(known)}")
        return replace(
            self,
            budget=_part(self.budget, settings),
            options=_part(self.options, settings),
            recycling=_recycling(self, settings),
            **{name: value for name, value in settings.items() if name in _OWN},
        )

    def pool(self, dropped: int) -> int:
        """Dropped tokens that are recycled: the best-scored int(ratio * dropped) + 1 (released code; 0.3)."""
        return int(self.recycled(np.array([dropped]))[0][0])

    def clusters(self, dropped: int) -> int:
        """Merged tokens that they become: int(pool / 10) + 1."""
        return int(self.recycled(np.array([dropped]))[1][0])

    def recycled(self, dropped: Int[np.ndarray, "*n"]) -> tuple[Int[np.ndarray, "*n"], Int[np.ndarray, "*n"]]:
        """`pool` and `clusters` of many numbers at once."""
        if self.recycling is None:
            return np.zeros_like(dropped), np.zeros_like(dropped)
        pool = np.minimum((self.recycling.ratio * dropped).astype(np.int64) + 1, dropped)
        return pool, np.minimum(pool // self.recycling.group + 1, pool)


_OWN = ("positions", "jitter", "per_frame", "seed")


def names_of(part: Any) -> tuple[str, ...]:
    """The fields of a part of the settings."""
    return tuple(field.name for field in fields(part))


def _part(part: Part, settings: Mapping[str, Any]) -> Part:
    """A part of the settings with those of its fields changed that are among `settings`."""
    return replace(part, **{name: value for name, value in settings.items() if name in names_of(part)})  # type: ignore


def _recycling(sparsity: Sparsity, settings: Mapping[str, Any]) -> Recycling | None:
    """What `recycle`, `recycle_ratio` and `recycle_group` make of the recycling."""
    given = {field: settings[name] for name, field in _RECYCLING.items() if name in settings}
    if settings.get("recycle", sparsity.recycling is not None):
        return replace(sparsity.recycling or Recycling(), **given)
    if given:
        names = " and ".join(f"`{name}`" for name in _RECYCLING if name in settings)
        raise UserError(f"{names}: {sparsity.method} recycles nothing here; set `recycle` too")
    return None
