"""1,000 questions answered, killed at random moments and resumed, and answered in shards: the same file."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.easy_vqa.answer import command, sparsevlm
from benchmarks.easy_vqa.data import Files

QUESTIONS, KILLS, SHARDS = 1000, 5, 3
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
    answering = _watched(command(files, whole, model, OPTIONS), whole)
    kills = _kill_and_resume(command(files, killed, model, OPTIONS), killed, answering, random.Random(seed))
    parts = [work / f"shard_{number}.jsonl" for number in range(SHARDS)]
    for number, part in enumerate(parts):
        sparsevlm(command(files, part, model, [*OPTIONS, "--shard", f"{number}/{SHARDS}"]))
    return {
        "questions": QUESTIONS,
        "options": list(OPTIONS),
        "seconds": {"until_first_answers": answering[0], "whole": answering[1]},
        "seed": seed,
        "kills": kills,
        "uninterrupted": _digest([whole]),
        "killed_and_resumed": _digest([killed]),
        "shards": _digest(parts),
        "same_without_sorting": whole.read_bytes() == killed.read_bytes(),
        "lines_of_shards": [_lines(part) for part in parts],
    }


def _watched(words: Sequence[str], answers: Path) -> tuple[float, float]:
    """Runs a command: seconds until its file has a line, and until it ends."""
    began, process = time.perf_counter(), _start(words)
    while process.poll() is None and not _lines(answers):
        time.sleep(0.01)
    first = time.perf_counter() - began
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, list(words))
    return round(first, 2), round(time.perf_counter() - began, 2)


def _kill_and_resume(
    words: Sequence[str], answers: Path, answering: tuple[float, float], moments: random.Random
) -> list[dict[str, Any]]:
    """Starts a command KILLS times and kills it, then lets it end; what was in its file at each kill.

    A run may be killed from half-way to its first answers on, and so early that five of them cannot end the work.
    """
    first, whole = answering
    kills = []
    for _ in range(KILLS):
        moment = moments.uniform(first / 2, first + (whole - first) / KILLS)
        process = _start(words)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() >= 0:
            raise ValueError(f"the run ended within {moment:.1f} s, before it was killed")
        torn = answers.exists() and not answers.read_bytes().endswith(b"\n")
        kills.append({"seconds": round(moment, 2), "lines": _lines(answers), "last_line_cut_off": torn})
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
