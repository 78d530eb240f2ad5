"""Options that one method alone has: `Sparsity.options`, which only that method reads."""

from __future__ import annotations

from dataclasses import dataclass

from sparsevlm_jax.errors import UserError


@dataclass(frozen=True)
class Options:
    """Of a method that has none; the base of those of others. Frozen and hashable: they are part of a plan."""


@dataclass(frozen=True)
class RankOptions(Options):
    """v1's.

    Attributes:
      scale, bias: int(rank * scale + bias) tokens stay.
      ladder: run the stages as programs of their own, each as long as the rows need, rather than as one program
        with masks. `generate` does; the pure `prefill` has one program in any case.
    """

    scale: float | None = None
    bias: float | None = None
    ladder: bool = False

    def __post_init__(self) -> None:
        for option, value in (("scale", self.scale), ("bias", self.bias)):
            if value is not None and not abs(value) < 1e6:  # nan is not
                raise UserError(f"{option}={value}: a number below a million is expected")


@dataclass(frozen=True)
class HeadOptions(Options):
    """v2.0's.

    Attributes:
      heads: attention heads that are selected (14 in the released code, whatever the model).
      gravity_floor: bounds the distance correction from below; 0 leaves it as released.
    """

    heads: int = 14
    gravity_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise UserError(f"heads={self.heads}: at least 1")
