"""`python -m benchmarks.retention`: the embedded model's held-out accuracy under every way to prune."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track

import sparsevlm_jax as sv
from benchmarks.retention.report import LEVEL, RESAMPLES, draw, interval, table
from benchmarks.retention.run import Outcome, Study, held_out_questions
from benchmarks.retention.variants import Variant, variants
from sparsevlm_jax.bench.files import put_between, write_json, write_text
from sparsevlm_jax.bench.machine import environment
from sparsevlm_jax.data import demo_model
from training.heldout import SEED, HeldOut, held_out

PACKAGES = ("jax", "flax", "transformers", "numpy", "scikit-learn")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention", description=__doc__)
    parser.add_argument(
        "--model", default=str(demo_model.path()), help="a model made by training/ (default: the embedded one)"
    )
    parser.add_argument("--scenes", type=int, default=120, help="held-out scenes, nearly nine questions each")
    parser.add_argument("--dense-scenes", type=int, default=500, help="scenes for the dense accuracy of each kind")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for retention.*")
    parser.add_argument("--readme", type=Path, help="Markdown file that gets the table")
    options = parser.parse_args(arguments)
    model = sv.load(options.model, dtype="float32")
    data = held_out(options.scenes)
    study = Study(model, held_out_questions(data, model.config))
    outcomes = [(variant, study.run(variant)) for variant in track(variants(), "retention")]
    report = {
        "environment": environment(jax.devices()[0].device_kind) | {name: version(name) for name in PACKAGES},
        "scenes": options.scenes,
        "seed": SEED,
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "unit": "scene"},
        "dense_by_kind": _dense_by_kind(model, options.dense_scenes),
        "questions": [
            {"kind": q.kind, "text": q.text, "answer": q.answer, "scene": int(s)}
            for q, s in zip(data.questions, data.scene_of, strict=True)
        ],
        "results": [_row(variant, outcome, outcomes, data) for variant, outcome in outcomes],
    }
    write_json(options.out / "retention.json", report)
    write_text(options.out / "retention.md", table(report["results"]) + "\n")
    if options.readme is not None:
        put_between(options.readme, "retention", table(report["results"]))
    draw(report["results"], options.out / "retention.png")


def _row(variant: Variant, outcome: Outcome, all_: Sequence[tuple[Variant, Outcome]], data: HeldOut) -> dict[str, Any]:
    """One variant's figures and its raw answers; differences are paired, question by question."""
    right = outcome.right.astype(float)
    dense = next(found for other, found in all_ if other.family == "dense").right
    row = {
        "family": variant.family,
        "label": variant.label,
        "method": variant.sparsity.method,
        "guide": variant.guide,
        "keep": variant.keep,
        "layer": variant.layer,
        "entering": outcome.entering,
        "accuracy": right.mean(),
        "interval": interval(data.scene_of, right),
        "minus_dense": (right - dense).mean(),
        "minus_dense_interval": interval(data.scene_of, right - dense),
        "minus_random": None,
        "minus_random_interval": None,
        "share_of_truth": None,
        "truth_found": None,
        "right": "".join(map(str, outcome.right.astype(int))),
    }
    random = [
        found
        for other, found in all_
        if (other.family, other.sparsity.method, other.keep, other.layer)
        == (variant.family, "random", variant.keep, variant.layer)
    ]
    if random and variant.keep:
        row["minus_random"] = (right - random[0].right).mean()
        row["minus_random_interval"] = interval(data.scene_of, right - random[0].right)
    if outcome.kept is not None and variant.keep:
        masks = np.stack([question.mask for question in data.questions])
        found = (outcome.kept & masks).sum(axis=1)
        row["share_of_truth"] = (found / outcome.kept.sum(axis=1)).mean()
        row["truth_found"] = (found / masks.sum(axis=1)).mean()
    return row


def _dense_by_kind(model: Any, scenes: int) -> dict[str, Any]:
    """Dense accuracy of every kind of question on more scenes."""
    data = held_out(scenes)
    right = (
        Study(model, held_out_questions(data, model.config)).run(Variant("dense", "dense", sv.Sparsity.dense())).right
    )
    kinds = np.array([question.kind for question in data.questions])
    by_kind = {str(kind): float(right[kinds == kind].mean()) for kind in np.unique(kinds)}
    return {"scenes": scenes, "questions": len(kinds), "accuracy": float(right.mean()), "kinds": by_kind}


if __name__ == "__main__":
    main()
