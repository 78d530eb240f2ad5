"""1,000 questions answered, killed at random moments and resumed, and answered in shards: the same file."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.easy_vqa.answer import command, sparsevlm
from benchmarks.easy_vqa.data import Files

QUESTIONS, KILLS, SHARDS = 1000, 5, 3
LAST_KILL = 700  # answers, at most: what is left outlasts the second that a kill may come later
OPTIONS = ("--limit", str(QUESTIONS), "--method", "v1.5")


def study(files: Files, model: Path, work: Path, seed: int) -> dict[str, Any]:
    """Three runs over the same questions, and whether they made the same lines.

    Args:
      work: an empty folder for files of answers.
      seed: of the moments.

    Raises:
      ValueError: the folder has files in it, or a run ended before it was killed.
    """
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise ValueError(f"{work}: expected an empty folder")
    whole, killed = work / "whole.jsonl", work / "killed.jsonl"
    sparsevlm(command(files, whole, model, OPTIONS))
    kills = _kill_and_resume(command(files, killed, model, OPTIONS), killed, random.Random(seed))
    parts = [work / f"shard_{number}.jsonl" for number in range(SHARDS)]
    for number, part in enumerate(parts):
        sparsevlm(command(files, part, model, [*OPTIONS, "--shard", f"{number}/{SHARDS}"]))
    return {
        "questions": QUESTIONS,
        "options": list(OPTIONS),
        "seed": seed,
        "kills": kills,
        "uninterrupted": _digest([whole]),
        "killed_and_resumed": _digest([killed]),
        "shards": _digest(parts),
        "same_without_sorting": whole.read_bytes() == killed.read_bytes(),
        "lines_of_shards": [_lines(part) for part in parts],
    }


def _kill_and_resume(words: Sequence[str], answers: Path, moments: random.Random) -> list[dict[str, int | float]]:
    """Starts a command KILLS times and kills it, then lets it end; how many lines its file had at each kill.

    Lines to wait for are drawn, and up to a second behind them: long enough for the next batches.
    """
    kills = []
    for wanted in sorted(moments.sample(range(1, LAST_KILL), KILLS)):
        delay = moments.random()
        process = _start(words)
        while process.poll() is None and _lines(answers) < wanted:
            time.sleep(0.001)
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise ValueError(f"the run ended before it was killed, {delay:.2f} s behind {wanted} answers")
        kills.append({"lines_waited_for": wanted, "seconds_behind": round(delay, 3), "lines": _lines(answers)})
    sparsevlm(words)
    return kills


def _start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "sparsevlm_jax", *words], stderr=subprocess.DEVNULL)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 of the files' lines in sorted order."""
    rows = sorted(line for file in files for line in file.read_bytes().splitlines(keepends=True))
    return hashlib.sha256(b"".join(rows)).hexdigest()
