"""What the retention study compares: ways to prune, one change at a time."""

from __future__ import annotations

from typing import NamedTuple

import sparsevlm_jax as sv
from sparsevlm_jax.pruning.settings import Sparsity

SHRINKING = tuple(name for name, method in sv.METHODS.items() if method.shrinks)
HEADS = 1  # v2.0's 14 of 32 heads, of the demo model's two
BUDGETS = (64, 40, 20, 10, 5)  # visual tokens of 196 left by a single cut
MIDDLE = 20  # about a tenth
LAYERS = (0, 1, 2, 3, 5, 8)
GUIDED = ("v1.5", "v2.0", "fastv", "vision", "random", "uniform")


class Variant(NamedTuple):
    """One way to prune.

    Attributes:
      family: the figure that it belongs to.
      label: what tells it from the others of its family.
      sparsity: the settings.
      guide: whose choice it is: "own", the method's; "other", the same method's under another sample's question;
        "truth", the patches that the answer depends on.
    """

    family: str
    label: str
    sparsity: Sparsity
    guide: str = "own"

    @property
    def keep(self) -> int | None:
        """Visual tokens that its one cut keeps, or its budget; None where it has neither."""
        budget = self.sparsity.budget
        return budget.keep if budget.keep_at is None else budget.keep_at[0][1]

    @property
    def layer(self) -> int | None:
        """After which its one cut is; None for schedules."""
        return None if self.sparsity.budget.keep_at is None else self.sparsity.budget.keep_at[0][0]


def variants() -> list[Variant]:
    """The whole study."""
    return [
        Variant("dense", "dense", Sparsity.dense()),
        *_scoring(),
        *_recycling(),
        *_layers(),
        *_schedules(),
    ]


def single_cut(method: str, layer: int, keep: int, *, recycle: bool = False, positions: str = "keep") -> Sparsity:
    """Everything after one layer but `keep` visual tokens goes, or is merged."""
    heads = {"heads": HEADS} if "heads" in sv.METHODS[method].options else {}
    chosen = sv.sparsity(method, keep_at=((layer, keep),), **heads)
    return chosen.changed(recycle=recycle, positions=positions)


def _scoring() -> list[Variant]:
    """Who chooses: the same cut after layer 0, no recycling, positions kept."""
    rows = []
    for keep in BUDGETS:
        rows += [Variant("scoring", method, single_cut(method, 0, keep)) for method in GUIDED]
        rows += [
            Variant("scoring", f"v1.5, {name}", single_cut("v1.5", 0, keep), guide)
            for name, guide in (("another question", "other"), ("true patches", "truth"))
        ]
        rows += [Variant("scoring", method, sv.sparsity(method, keep=keep)) for method in SHRINKING]
    return rows


def _recycling() -> list[Variant]:
    """v1.5's cut with and without recycling, positions renumbered and kept."""
    return [
        Variant(
            "recycling",
            f"{'recycled' if recycle else 'dropped'}, {positions}",
            single_cut("v1.5", 0, keep, recycle=recycle, positions=positions),
        )
        for keep in BUDGETS[1:]
        for recycle in (True, False)
        for positions in ("keep", "renumber")
    ]


def _layers() -> list[Variant]:
    """Where the cut is; with nothing kept at all, it shows by which layer the answer has been read."""
    return [
        Variant("layer", label, single_cut(method, layer, keep))
        for label, method, keep in (
            ("v1.5", "v1.5", MIDDLE),
            ("fastv", "fastv", MIDDLE),
            ("random", "random", MIDDLE),
            ("nothing kept", "random", 0),
        )
        for layer in LAYERS
    ]


def _schedules() -> list[Variant]:
    """Methods as they are published, scaled to this depth, at a third and a sixth of the tokens."""
    rows = []
    for share, keep in (("a third", 65), ("a sixth", 33)):
        for method in ("v1.5", "v2.0", "fastv", "pyramiddrop", "vision", "random", "uniform", *SHRINKING):
            heads = {"heads": HEADS} if "heads" in sv.METHODS[method].options else {}
            rows.append(Variant("schedule", f"{method}, {share}", sv.sparsity(method, keep=keep, **heads)))
    rows += [
        Variant("schedule", f"v1, scale {scale:g}", sv.sparsity("v1", scale=scale, bias=0.0))
        for scale in (4.0, 8.0, 16.0)
    ]
    return rows
