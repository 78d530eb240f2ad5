"""What weights in eight bits change: logits, answers and accuracy, each against the same model in float32.

    python -m benchmarks.int8 --out benchmarks/results/int8.json

The embedded model answers the retention study's held-out questions; models with random weights, far more sensitive,
are forced along the tokens of their float32 run. Without --out it prints.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sparsevlm_jax as sv
from benchmarks.retention.report import LEVEL, interval
from benchmarks.retention.run import Outcome, Study, held_out_questions
from benchmarks.retention.variants import Variant
from sparsevlm_jax.bench.agreement import drift
from sparsevlm_jax.bench.files import write_json
from sparsevlm_jax.bench.jax_side import JaxRunner
from sparsevlm_jax.bench.machine import environment
from sparsevlm_jax.bench.shapes import SHAPES, Cell, Side
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.models.parameters import tree_bytes
from sparsevlm_jax.pruning.methods import sparsity
from sparsevlm_jax.pruning.settings import Sparsity
from training.heldout import SEED, HeldOut, held_out

# What is compared: the dtype to compute in, and how weights are held.
FORMS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "int8, bfloat16": ("bfloat16", "int8"),
}
METHODS = ("dense", "v1.5")
RANDOM, STEPS = ("tiny", "tiny-next", "tiny-video", "quick"), 16
PACKAGES = ("jax", "flax", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=57, help="held-out scenes, nearly nine questions each")
    parser.add_argument("--out", type=Path, help="the results' file")
    options = parser.parse_args()
    data = held_out(options.scenes)
    report = {
        "environment": environment(jax.devices()[0].device_kind) | {name: version(name) for name in PACKAGES},
        "scenes": options.scenes,
        "seed": SEED,
        "level": LEVEL,
        "parameter_bytes": {form: tree_bytes(load(form).params) for form in FORMS},
        "embedded": [row for method in METHODS for row in embedded(data, sparsity(method))],
        "random": [row for shape in RANDOM for method in METHODS for row in random(shape, method)],
    }
    print(json.dumps(report, indent=1)) if options.out is None else write_json(options.out, report)


def load(form: str) -> sv.Model:
    """The embedded model."""
    dtype, quantize = FORMS[form]
    return sv.load(demo_model.path(), dtype=dtype, quantize=quantize)


def embedded(data: HeldOut, method: Sparsity) -> list[dict[str, Any]]:
    """A row for each form of the embedded model."""
    found = {form: outcome(form, data, method) for form in FORMS}
    return [
        {"method": method.method, "form": form} | compare(own, found["float32"], data) for form, own in found.items()
    ]


def outcome(form: str, data: HeldOut, method: Sparsity) -> Outcome:
    model = load(form)
    return Study(model, held_out_questions(data, model.config)).run(Variant("", "", method))


def compare(own: Outcome, wide: Outcome, data: HeldOut) -> dict[str, Any]:
    """Accuracy, paired with that in float32, and how far the answers' first tokens are from it."""
    far, difference = drift(wide.logits, own.logits, [], []), own.right.astype(float) - wide.right
    row = {
        "questions": len(own.right),
        "accuracy": float(own.right.mean()),
        "minus_float32": float(difference.mean()),
        "minus_float32_interval": interval(data.scene_of, difference),
        "kl": far.kl,
        "top1": far.top1,
        "kept_in_both": None,
    }
    if own.kept is not None and wide.kept is not None:
        row["kept_in_both"] = float((own.kept & wide.kept).sum() / wide.kept.sum())
    return row


def random(shape: str, method: str) -> list[dict[str, Any]]:
    """A row for each form of a model with random weights, forced along its float32 tokens."""
    own, rows = SHAPES[shape], []
    side = Side("jax", method, None if method == "dense" else own.budgets[0])
    tokens, wide, selections = None, np.empty(0), []
    for form, (dtype, quantize) in FORMS.items():
        cell = Cell(shape, 1, own.text_tokens, own.visual_tokens, dtype)
        runner = JaxRunner(cell, replace(side, quantize=quantize or ""), STEPS)
        followed, logits = runner.follow(STEPS, tokens)
        if tokens is None:
            tokens, wide, selections = followed, logits, runner.selections()
        far = drift(wide, logits, selections, runner.selections())
        rows.append({"shape": shape, "method": method, "form": form, "positions": STEPS + 1} | far._asdict())
    return rows


if __name__ == "__main__":
    main()
