"""The study's figures: rows of results, one table, one plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.easy_vqa.data import KINDS, Asked
from benchmarks.easy_vqa.variants import BUDGETS, CUTS, SCALES
from benchmarks.retention.report import interval, panel

Row = dict[str, Any]
TOKENS = 144
# How the methods' lines are called in the table, in its order.
OWN_WORDS = ("v1.5", "v2.0", "v1")
RIVALS = ("fastv", "pyramiddrop", "vision", "pool", "downsample")
CONTROLS = ("random", "uniform")
GUIDES = ("v1.5, another question", "v1.5, true patches")


def row(columns: Mapping[str, Any], right: np.ndarray, dense: np.ndarray, asked: Sequence[Asked]) -> Row:
    """The figures of one way to prune.

    Args:
      columns: what is known of the run: `label`, the method or whose choice it is, and `keep`, its budget, at least.
      right, dense: bool [n], its answers and those of the run without pruning.
    """
    images, kinds = np.asarray([each.image for each in asked]), np.asarray([each.kind for each in asked])
    return {
        **columns,
        "accuracy": float(right.mean()),
        "interval": interval(images, right.astype(float)),
        "minus_dense": float(right.mean() - dense.mean()),
        "minus_dense_interval": interval(images, right.astype(float) - dense),
        "kinds": {kind: float(right[kinds == kind].mean()) for kind in KINDS if (kinds == kind).any()},
        "right": np.packbits(right).tobytes().hex(),
    }


def add_controls(rows: Sequence[Row], asked: Sequence[Asked]) -> None:
    """Adds to every row with a budget what it is better by than a random choice with the same."""
    images = np.asarray([each.image for each in asked])
    random = {found["keep"]: unpacked(found, len(asked)) for found in rows if found["label"] == "random"}
    for found in rows:
        if found["keep"] in random and found["label"] != "random":
            difference = unpacked(found, len(asked)).astype(float) - random[found["keep"]]
            found["minus_random"] = float(difference.mean())
            found["minus_random_interval"] = interval(images, difference)


def unpacked(found: Row, count: int) -> np.ndarray:
    """Which answers of a row are right, bool [count]; the last bits of its text fill a byte up."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(found["right"]), np.uint8))
    return bits[:count].astype(bool)


def table(answers: Mapping[str, Any], cuts: Mapping[str, Any]) -> str:
    """Markdown: percent right, with half of its interval's width, per method and tokens kept."""
    rows = {(found["label"], found["keep"]): found for found in answers["rows"]}
    single = {(found["label"], found["keep"]): found for found in cuts["rows"]}
    heads = [f"all {TOKENS}", *map(str, BUDGETS), *(f"cut to {keep}" for keep in CUTS)]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    lines.append(_line("dense", [_cell(rows["dense", None])]))
    for name, accuracy in answers["without_image"].items():
        lines.append(_line(BLIND[name], [f"{100 * accuracy:.1f}"]))
    for label in (*OWN_WORDS, *RIVALS, *CONTROLS, *GUIDES):
        keeps = SCALES if label == "v1" else BUDGETS
        found = [rows.get((label, keep)) for keep in keeps] + [single.get((label, keep)) for keep in CUTS]
        lines.append(_line(label, ["", *map(_cell, found)]))
    return "\n".join(lines)


BLIND = {"majority": "the commonest answer", "majority_of_text": "the commonest to the same text"}


def _cell(found: Row | None) -> str:
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} ±{50 * (high - low):.1f}"


def _line(name: str, cells: Sequence[str]) -> str:
    width = 1 + len(BUDGETS) + len(CUTS)
    return f"| {name} | " + " | ".join([*cells, *[""] * (width - len(cells))]) + " |"


def kinds_table(cuts: Mapping[str, Any]) -> str:
    """Markdown: percent right by kind of question, dense and with the middle one of the cuts."""
    lines = ["| | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for found in cuts["rows"]:
        if found["keep"] in (None, CUTS[1]):
            cells = [f"{100 * found['kinds'][kind]:.1f}" for kind in KINDS]
            lines.append(f"| {found['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(answers: Mapping[str, Any], cuts: Mapping[str, Any], image: Path) -> None:
    """Two plots: every method through the command, and who chooses at one cut."""
    import matplotlib.pyplot as plt

    from sparsevlm_jax.bench.plots import legend

    dense = next(found for found in answers["rows"] if found["label"] == "dense")
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.5), layout="constrained")
    pruned = [found for found in answers["rows"] if found is not dense]
    labels = (*OWN_WORDS, *RIVALS, *CONTROLS, *GUIDES)
    panel(axes[0], pruned, "entering", f"visual tokens entering a layer, of {TOKENS}", labels)
    axes[0].set_title("Methods as published, at three budgets (`sparsevlm answer`)")
    chosen = [found for found in cuts["rows"] if found["keep"]]
    panel(axes[1], chosen, "keep", f"visual tokens kept of {TOKENS}", labels)
    axes[1].set_title("Who chooses (one cut after layer 0, no recycling)")
    for ax in axes:
        ax.axhline(dense["accuracy"], color="0.5", linewidth=1, linestyle=":", label="dense")
        blind = answers["without_image"]["majority_of_text"]
        ax.axhline(blind, color="0.5", linewidth=1, linestyle="--", label=BLIND["majority_of_text"])
        ax.set_ylabel("accuracy, easy-vqa's test split")
        legend(ax)
    figure.savefig(image, dpi=110)
    plt.close(figure)
