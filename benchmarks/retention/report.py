"""The retention study's figures: intervals, table, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.retention.variants import BUDGETS

RESAMPLES = 2000
LEVEL = 95  # percent
ACROSS = {
    "keep": "visual tokens kept of 196",
    "layer": "cut after layer",
    "entering": "visual tokens entering a layer",
}


def interval(scenes: np.ndarray, difference: np.ndarray) -> tuple[float, float]:
    """Bootstrap interval of a mean over questions.

    Scenes are drawn, not questions: the nine questions of a scene are not independent. A difference of two variants on
    the same questions makes it a paired one.

    Args:
      scenes: int [n], of which scene each question is.
      difference: float [n].

    Returns:
      Lower and upper bound at LEVEL percent.
    """
    sums, sizes = np.bincount(scenes, difference), np.bincount(scenes)
    random = np.random.default_rng(0)
    drawn = random.integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy of who chooses, against tokens kept by one cut after the first layer."""
    rows = [row for row in results if row["family"] == "scoring"]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    lines = ["| kept of 196 | " + " | ".join(map(str, BUDGETS)) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
    for label in labels:
        cells = []
        for keep in BUDGETS:
            row = next(row for row in rows if row["label"] == label and row["keep"] == keep)
            share = "" if row["share_of_truth"] is None else f" ({row['share_of_truth']:.2f})"
            cells.append(f"{row['accuracy']:.3f}{share}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], image: Path) -> None:
    """Four plots: who chooses, what becomes of the rest, where the cut is, methods as published."""
    import matplotlib.pyplot as plt

    from sparsevlm_jax.bench.plots import legend

    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    for ax, family, across, title in (
        (axes[0, 0], "scoring", "keep", "Who chooses (one cut after layer 0, no recycling)"),
        (axes[0, 1], "recycling", "keep", "v1.5: the rest recycled or dropped, positions kept or renumbered"),
        (axes[1, 0], "layer", "layer", "Where the cut is (20 of 196 tokens kept)"),
        (axes[1, 1], "schedule", "entering", "Methods as published, at two budgets"),
    ):
        panel(ax, [row for row in results if row["family"] == family], across, ACROSS[across])
        ax.set_title(title)
        dense = next(row for row in results if row["family"] == "dense")
        ax.axhline(dense["accuracy"], color="0.5", linewidth=1, linestyle=":", label="dense")
        legend(ax)
    figure.savefig(image, dpi=110)
    plt.close(figure)


def panel(ax: Any, rows: Sequence[dict[str, Any]], across: str, name: str, labels: Sequence[str] | None = None) -> None:
    """Accuracies with their intervals against one of the rows' figures, a line for every label.

    Args:
      across: which figure; "keep" is drawn on a logarithmic axis.
      name: the figure in words.
      labels: all that may come, so that plots beside each other draw each alike; by default those of the rows.
    """
    markers = "osv^D<>Pp*hX"
    found = list(dict.fromkeys(row["label"].split(", a ")[0] for row in rows))
    for number, label in enumerate(found if labels is None else labels):
        if label not in found:
            continue
        own = sorted((r for r in rows if r["label"].split(", a ")[0] == label), key=lambda row: row[across])
        y = np.array([row["accuracy"] for row in own])
        low, high = np.array([row["interval"] for row in own]).T
        ax.errorbar(
            [row[across] for row in own],
            y,
            yerr=np.maximum([y - low, high - y], 0),
            marker=markers[number % len(markers)],
            markersize=5,
            linewidth=1,
            capsize=2,
            label=label,
            color=f"C{number}" if number < 10 else "black",
        )
    ax.set_xlabel(name)
    ax.set_ylabel("accuracy, held-out questions")
    if across == "keep":
        ax.set_xscale("log")
        ticks = sorted({row["keep"] for row in rows})
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
    ax.grid(alpha=0.3)
