"""The whole test split through `sparsevlm answer` and `sparsevlm score exact`, a command after the other."""

from __future__ import annotations

import io
import json
import shlex
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.easy_vqa.data import Asked, Files, write_lines
from sparsevlm_jax.bench.files import read_json
from sparsevlm_jax.cli.main import main
from sparsevlm_jax.evaluate.scorers.exact import plain
from sparsevlm_jax.files import read_json_lines

BATCH = 32
LONGEST = 2  # an answer and the end


def command(files: Files, answers: Path, model: Path, options: Sequence[str]) -> list[str]:
    """`sparsevlm answer` over a prepared split, in words."""
    given = ("--questions", files.questions, "--images", files.images, "--answers", answers, "--model", model)
    fixed = ("--max-new-tokens", LONGEST, "--batch-size", BATCH)
    return ["answer", *map(str, (*given, *fixed)), *options]


def sparsevlm(words: Sequence[str]) -> str:
    """Runs the command in this process, which keeps what is loaded, and returns what it prints.

    Raises:
      RuntimeError: it fails.
    """
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            main(words)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"sparsevlm {shlex.join(words)}: exit code {end.code}") from None
    return printed.getvalue()


def outcome(files: Files, answers: Path, asked: Sequence[Asked]) -> dict[str, Any]:
    """What a file of answers says: its score by the command, which answers are right, and what entered the layers.

    Args:
      asked: the questions that are scored, the first of the split or all; the file may have answers to more.

    Raises:
      ValueError: the command's score is not that of the answers read here.
    """
    rows = [row for _, row in read_json_lines(answers) if row["question_id"] < len(asked)]
    right = np.array([plain(row["text"]) == plain(asked[row["question_id"]].answer) for row in rows])
    accuracy = _score(files, rows)
    if abs(accuracy - 100 * right.mean()) > 1e-6:
        raise ValueError(f"`score exact` says {accuracy} percent, the answers say {100 * right.mean()}")
    record = read_json(Path(f"{answers}.run.json"))
    entering = [row["metadata"]["entering_tokens"] for row in rows]
    return {"right": right, "entering": float(np.mean(entering)), "sittings": record["sittings"]}


def _score(files: Files, rows: Sequence[dict[str, Any]]) -> float:
    """What `sparsevlm score exact` gives for answers to the first questions."""
    truth = [row for _, row in read_json_lines(files.truth)][: len(rows)]
    with tempfile.TemporaryDirectory() as folder:
        answers, true = Path(folder) / "answers.jsonl", Path(folder) / "truth.jsonl"
        write_lines(answers, rows)
        write_lines(true, truth)
        scored = sparsevlm(["score", "exact", "--answers", str(answers), "--truth", str(true), "--json"])
    return json.loads(scored)["accuracy"]
