"""What to prune and how: frozen, hashable settings, which say what they cannot be in Python's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsevlm_jax.errors import UserError

DEPTH = 32  # decoder layers of the models for which the papers publish layers and counts
PRUNING_LAYERS = (2, 6, 15)  # after which the released code prunes, of 32 layers, 0-based
V1_PRUNING_LAYERS = (2, 6, 15, 19)
PUBLISHED_VISUAL_TOKENS = 576
V1_SCALE_AND_BIAS = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}
BUDGETS = ("keep", "keep_at", "flops_share", "cache_bytes")  # the settings that say how much is pruned


@dataclass(frozen=True)
class Sparsity:
    """What to prune and how.

    The counts come from the first of `scale`, `keep_at`, `keep`, `flops_share`, `cache_bytes` and `ratio` that is set;
    with none of them a third of the visual tokens are kept.

    Attributes:
      method: a name in `methods.METHODS`, which says how tokens are scored; "dense" prunes nothing.
      keep: equivalent tokens as the authors count them: the mean over layers of the visual tokens standing after
        each layer. Their "192" is 192.03.
      keep_at: (layer, count) pairs: after that layer (0-based) keep min(count, visual tokens - 1).
      flops_share: FLOPs of the decoder's prefill by the paper's formula, as a share of dense.
      cache_bytes: bytes of keys and values after the prefill, at two bytes a value.
      ratio: keep this share of what is left at every pruning layer.
      layers: pruning layers where `keep_at` does not name them; -1 is before the first. None scales
        `published_layers`, which are those of a 32-layer decoder, to the model's depth.
      scale, bias: v1 keeps int(rank * scale + bias).
      heads: attention heads that v2.0 selects (14 in the released code, whatever the model).
      gravity_floor: v2.0 bounds its distance correction from below by this; 0 leaves it as released.
      recycle: merge some of the dropped tokens (v1, v1.5) instead of losing them all (v2.0).
      recycle_ratio, recycle_group: int(ratio * dropped) + 1 tokens are merged into int(that / group) + 1.
      positions: rotary positions after pruning, "renumber" (v1, v1.5) or "keep" (v2.0).
      jitter: amplitude of the density noise that replays recorded traces (the array is an argument of `prefill`).
      seed: of methods that draw random numbers; None for those that draw none. `prefill` also takes it traced.
      ladder: run v1's stages as programs of their own, each as long as the rows need, rather than as one program
        with masks. `generate` does; the pure `prefill` has one program in any case.
    """

    method: str
    keep: int | None = None
    keep_at: tuple[tuple[int, int], ...] | None = None
    flops_share: float | None = None
    cache_bytes: int | None = None
    ratio: float | None = None
    layers: tuple[int, ...] | None = None
    published_layers: tuple[int, ...] = PRUNING_LAYERS
    scale: float | None = None
    bias: float | None = None
    heads: int = 14
    gravity_floor: float = 0.0
    recycle: bool = True
    recycle_ratio: float = 0.3
    recycle_group: int = 10
    positions: str = "renumber"
    jitter: float = 1e-6
    seed: int | None = None
    ladder: bool = False

    def __post_init__(self) -> None:
        if self.positions not in ("renumber", "keep"):
            raise UserError(f'positions is "{self.positions}": expected "renumber" or "keep"')
        if self.keep is not None and self.keep < 1:
            raise UserError(f"keep={self.keep}: at least 1 visual token has to stay")
        if not 0 <= self.recycle_ratio <= 1 or self.recycle_group < 1:
            raise UserError(
                f"recycle_ratio {self.recycle_ratio} must be in [0, 1], recycle_group {self.recycle_group} at least 1"
            )
        for layer, count in self.keep_at or ():
            if layer < -1 or count < 0:
                raise UserError(f"keep_at=({layer}, {count}): layers count from 0 (-1: before the first), counts too")
        for option, value in (("scale", self.scale), ("bias", self.bias)):
            if value is not None and not abs(value) < 1e6:  # nan is not
                raise UserError(f"{option}={value}: a number below a million is expected")
        if self.heads < 1:
            raise UserError(f"heads={self.heads}: at least 1")
        for option, share in (("flops_share", self.flops_share), ("ratio", self.ratio)):
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{option}={share}: a share in (0, 1] is expected")

    @classmethod
    def dense(cls) -> Sparsity:
        """No pruning: one stage."""
        return cls(method="dense", recycle=False)

    @classmethod
    def v15(cls, keep: int | None = None, keep_at: Sequence[tuple[int, int]] | None = None) -> Sparsity:
        """SparseVLM v1.5: fixed counts, recycling, renumbered positions (the paper's tables come from this line)."""
        return cls(method="v1.5", keep=keep, keep_at=None if keep_at is None else tuple(keep_at))

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
        return cls(method="v1", scale=scale, bias=bias, published_layers=V1_PRUNING_LAYERS)

    @classmethod
    def v20(
        cls, keep: int | None = None, keep_at: Sequence[tuple[int, int]] | None = None, heads: int = 14
    ) -> Sparsity:
        """SparseVLM+ (v2.0): gravity correction, head selection, no recycling, positions kept."""
        counts = None if keep_at is None else tuple(keep_at)
        return cls(method="v2.0", keep=keep, keep_at=counts, heads=heads, recycle=False, positions="keep")

    def pool(self, dropped: int) -> int:
        """Dropped tokens that are recycled: the best-scored int(ratio * dropped) + 1 (released code; 0.3)."""
        return min(int(self.recycle_ratio * dropped) + 1, dropped) if self.recycle else 0

    def clusters(self, dropped: int) -> int:
        """Merged tokens that they become: int(pool / 10) + 1."""
        pool = self.pool(dropped)
        return min(pool // self.recycle_group + 1, pool)

    def standing(self, visual: int, keep: int) -> int:
        """Visual tokens after pruning `visual` down to min(keep, visual - 1) kept ones, merged tokens included."""
        if not visual:
            return 0
        kept = min(keep, visual - 1)
        return kept + self.clusters(visual - kept)
