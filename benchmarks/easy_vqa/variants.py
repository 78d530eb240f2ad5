"""What is compared: every method at three budgets by the command, and who chooses at one cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import sparsevlm_jax as sv
from benchmarks.retention.variants import HEADS, Variant, single_cut

BUDGETS = (48, 32, 24)  # of 144 visual tokens, mean over layers: a third, two ninths, a sixth
SCALES = (16.0, 8.0, 4.0)  # of v1, which has no budget in tokens
CUTS = (16, 8, 4)  # of 144 visual tokens left by one cut after layer 0
CHOOSING = ("v1.5", "v2.0", "vision", "random", "uniform")


class Command(NamedTuple):
    """A run of `sparsevlm answer`.

    Attributes:
      label: the method.
      keep: its budget in visual tokens, or v1's scale; None for dense.
      options: of the command.
    """

    label: str
    keep: float | None
    options: list[str]


def commands() -> Iterator[Command]:
    """Dense, and every method at three budgets."""
    yield Command("dense", None, ["--method", "dense"])
    for name, method in sv.METHODS.items():
        if name in ("dense", "v1"):
            continue
        heads = ["--heads", str(HEADS)] if "heads" in method.options else []
        for keep in BUDGETS:
            yield Command(name, keep, ["--method", name, "--keep", str(keep), *heads])
    for scale in SCALES:
        yield Command("v1", scale, ["--method", "v1", "--scale", f"{scale:g}", "--bias", "0"])


def cuts() -> list[Variant]:
    """Dense, and who chooses: the same cut after layer 0, no recycling, positions kept."""
    rows = [Variant("dense", "dense", sv.Sparsity.dense())]
    for keep in CUTS:
        rows += [Variant("cut", method, single_cut(method, 0, keep)) for method in CHOOSING]
        rows.append(Variant("cut", "v1.5, another question", single_cut("v1.5", 0, keep), "other"))
        rows.append(Variant("cut", "v1.5, true patches", single_cut("v1.5", 0, keep), "truth"))
    return rows
