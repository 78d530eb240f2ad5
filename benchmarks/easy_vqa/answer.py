"""The whole test split through `sparsevlm answer` and `sparsevlm score exact`, a command after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.easy_vqa.data import Asked, Files
from sparsevlm_jax.evaluate.scorers.base import Given
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
    """Runs the command and returns what it prints.

    Raises:
      CalledProcessError: it fails.
    """
    call = [sys.executable, "-m", "sparsevlm_jax", *words]
    return subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout


def outcome(files: Files, answers: Path, asked: Sequence[Asked]) -> dict[str, Any]:
    """What a file of answers says: its score by the command, which answers are right, and what entered the layers.

    Raises:
      ValueError: the command's score is not that of the answers read here.
    """
    scored = sparsevlm(["score", "exact", "--answers", str(answers), "--truth", str(files.truth), "--json"])
    said = Given.read(answers, files.truth).by_id()
    right = np.array([plain(said[number].text) == plain(row.answer) for number, row in enumerate(asked)])
    accuracy = json.loads(scored)["accuracy"]
    if abs(accuracy - 100 * right.mean()) > 1e-6:
        raise ValueError(f"`score exact` says {accuracy} percent, the answers say {100 * right.mean()}")
    record = json.loads(Path(f"{answers}.run.json").read_text(encoding="utf-8"))
    entering = [row["metadata"]["entering_tokens"] for _, row in read_json_lines(answers)]
    seconds = sum(sitting["seconds"] for sitting in record["sittings"])
    return {"right": right, "entering": float(np.mean(entering)), "seconds": round(seconds, 1)}
