"""`python -m benchmarks.easy_vqa STEP FOLDER`: easy-vqa's whole test split under every way to prune.

Steps, each of which goes on where it was stopped: `prepare` writes the split's files into FOLDER; `answer` answers them
by `sparsevlm answer`; `cuts` runs the controls that the command cannot; `killed` kills and resumes the command;
`report` makes table and plot of what the others have written into `--out`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.progress import track

import sparsevlm_jax as sv
from benchmarks.easy_vqa import killed, words
from benchmarks.easy_vqa.answer import command, outcome, sparsevlm
from benchmarks.easy_vqa.data import Files, blind_accuracies, prepare, split
from benchmarks.easy_vqa.report import add_controls, draw, kinds_table, row, table
from benchmarks.easy_vqa.variants import commands
from benchmarks.retention.report import LEVEL, RESAMPLES
from sparsevlm_jax.bench.files import put_between, read_json, write_json
from sparsevlm_jax.bench.machine import environment

MODEL = Path(__file__).parent / "model"
RESULTS = Path("benchmarks/results/easy_vqa")
PACKAGES = ("jax", "flax", "numpy", "easy-vqa")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.easy_vqa", description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("folder", type=Path, help="for the split's files and the files of answers")
    parser.add_argument("--model", type=Path, default=MODEL, help="made by `training.train --task easy-vqa`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--docs", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--limit", type=int, help="answer: only the first so many questions")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of `killed`")
    options = parser.parse_args(arguments)
    STEPS[options.step](options)


def _prepare(options: argparse.Namespace) -> None:
    prepare(options.folder)


def _answer(options: argparse.Namespace) -> None:
    files, asked, rows = Files(options.folder), split("test")[: options.limit], []
    without_image, dense = blind_accuracies(split("train"), asked), None
    for each in track(list(commands()), "answering"):
        answers = options.folder / f"{each.label}-{each.keep}.jsonl"
        limit = [] if options.limit is None else ["--limit", str(options.limit)]
        sparsevlm([*command(files, answers, options.model, each.options), *limit])
        found = outcome(files, answers, asked)
        dense = found["right"] if dense is None else dense
        columns = {name: found[name] for name in ("entering", "sittings")} | each._asdict()
        rows.append(row(columns, found["right"], dense, asked))
        _write(options, "answers", {"without_image": without_image, "rows": rows}, asked)


def _cuts(options: argparse.Namespace) -> None:
    asked = split("test")
    model = sv.load(str(options.model), dtype="float32")
    found = words.run(model, asked)
    rows = [
        row({"label": each.label, "keep": each.keep, "entering": run.entering}, run.right, found[0][1].right, asked)
        for each, run in found
    ]
    _write(options, "cuts", {"held_out": words.held_out_accuracy(model), "rows": rows}, asked)


def _killed(options: argparse.Namespace) -> None:
    found = killed.study(Files(options.folder), options.model, options.folder / "killed", options.seed)
    write_json(options.out / "killed.json", {"environment": _environment(), **found})


def _report(options: argparse.Namespace) -> None:
    answers, cuts = (read_json(options.out / f"{name}.json") for name in ("answers", "cuts"))
    draw(answers, cuts, options.out / "easy_vqa.png")
    if options.docs is not None:
        put_between(options.docs, "easy_vqa", table(answers, cuts))
        put_between(options.docs, "easy_vqa_kinds", kinds_table(cuts))


def _write(options: argparse.Namespace, name: str, content: dict[str, Any], asked: Sequence[Any]) -> None:
    add_controls(content["rows"], asked)
    about = {
        "environment": _environment(),
        "questions": len(asked),
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "unit": "image"},
    }
    write_json(options.out / f"{name}.json", about | content)


def _environment() -> dict[str, Any]:
    return environment(jax.devices()[0].device_kind) | {name: version(name) for name in PACKAGES}


STEPS = {"prepare": _prepare, "answer": _answer, "cuts": _cuts, "killed": _killed, "report": _report}

if __name__ == "__main__":
    main()
