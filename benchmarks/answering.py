"""What answering a file of questions takes: the embedded model on held-out questions, one by one and in batches.

    python -m benchmarks.answering --out benchmarks/results/answering.json

Every run is `sparsevlm answer` in this process, into a new file of answers, with programs that are compiled already.
The runs take turns. Seconds are those of the process by what they went to: on the thread that runs the programs and
writes, and on the one that prepares the next batch meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

import sparsevlm_jax as sv
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.evaluate import answers_file, record, run
from sparsevlm_jax.evaluate.engines import Local
from sparsevlm_jax.generation import batches
from sparsevlm_jax.generation.programs import Programs
from sparsevlm_jax.inputs import pixels
from sparsevlm_jax.inputs.processor import Processor
from training.heldout import held_out

# Where seconds are counted, by what they are called. What such a call makes of others on the list is theirs.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("device", Programs, "timed"),
    ("decoding images", pixels, "open_image"),
    ("preparing images", pixels.Preparation, "image"),
    ("tokenising", Processor, "text_tokens"),
    ("tokenising", Processor, "__call__"),
    ("tokenising", batches, "read_answers"),
    ("writing", answers_file.AnswersFile, "append"),
    ("writing", answers_file.AnswersFile, "sort"),
    ("writing", record, "write_record"),
    ("waiting", Future, "result"),
    ("checking weights", record, "settings_of"),
)
REST = "the rest"


class Clock:
    """Seconds by thread and by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._local = threading.local()

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Counts what is done inside, but for what is counted inside of that."""
        inside, self._local.inside = getattr(self._local, "inside", 0.0), 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            thread = "main" if threading.current_thread() is threading.main_thread() else "ahead"
            self.seconds[thread][name] += seconds - self._local.inside
            self._local.inside = inside + seconds

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            with self.counting(name):
                return function(*args, **named)

        return counted

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Counts in all of PARTS."""
        before = [(place, name, getattr(place, name)) for _, place, name in PARTS]
        for (part, place, name), (_, _, function) in zip(PARTS, before, strict=True):
            setattr(place, name, self.around(part, function))
        try:
            yield
        finally:
            for place, name, function in before:
                setattr(place, name, function)


def write_questions(folder: Path, number: int) -> Path:
    """Held-out questions with their scenes as PNG files."""
    data = held_out(-(-number // 8))
    for index, scene in enumerate(data.scenes):
        Image.fromarray(scene.pixels).save(folder / f"{index}.png")
    rows = [
        {"question_id": index, "image": f"{scene}.png", "text": question.text}
        for index, (question, scene) in enumerate(zip(data.questions, data.scene_of.tolist(), strict=True))
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:number]))
    return file


def measure(batcher: batches.Batcher, questions: Path, answers: Path) -> dict[str, Any]:
    """One run, from reading the questions to the last answer on the disk."""
    clock = Clock()
    with clock.attached(), clock.counting(REST):
        job = run.Job(questions, questions.parent, answers)
        began = time.perf_counter()
        summary = run.run(Local(batcher), job, job.read())
        seconds = time.perf_counter() - began
    found = {thread: dict(parts) for thread, parts in clock.seconds.items()}
    return {"questions": summary["answered"], "seconds": seconds, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write raw samples there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--method", default="v1.5")
    options = parser.parse_args()
    model = sv.load(demo_model.path(), dtype=demo_model.DTYPE)
    batchers = {
        size: batches.Batcher(model, sparsity=options.method, batch_size=size, max_new_tokens=16) for size in (1, 8)
    }
    samples: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = write_questions(folder, options.questions)
        for number in range(options.rounds + 1):
            for size, batcher in batchers.items():
                found = measure(batcher, questions, folder / f"{number}-{size}.jsonl")
                if number:  # the first round compiles
                    samples.setdefault(f"batch {size}", []).append(found)
    for name, runs in samples.items():
        print(name, f"{median(one['questions'] / one['seconds'] for one in runs):.1f} questions a second")
        for thread in ("main", "ahead"):
            shares = defaultdict(list)
            for one in runs:
                for part, seconds in one.get(thread, {}).items():
                    shares[part].append(100 * seconds / one["seconds"])
            print("  ", thread, ", ".join(f"{part} {median(found):.1f} %" for part, found in shares.items()))
    if options.out:
        _write(options.out, samples)


def _write(file: Path, samples: dict[str, Any]) -> None:
    from sparsevlm_jax.bench.machine import environment

    result: dict[str, Any] = {"machine": environment("cpu"), "load": os.getloadavg()}
    file.write_text(json.dumps(result | {"runs": samples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
