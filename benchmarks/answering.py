"""What answering a file of questions takes: the embedded model on held-out questions, in batches and one by one.

    python -m benchmarks.answering --out benchmarks/results/answering.json

"batch N" is `sparsevlm answer --batch-size N` in this process, from reading the questions to the last answer on the
disk; "a call each" is a loop of `sv.answer` over the same questions. All programs are compiled before, and the sides
take turns. "idle" is the share of the time in which no program ran, "outside" that in which no image was decoded
either; the other shares are those of what each thread did ("main" writes, the others prepare and run batches).
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
from sparsevlm_jax.bench.files import write_json
from sparsevlm_jax.bench.machine import environment
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.evaluate import answers_file, record, run
from sparsevlm_jax.evaluate.engines import Local
from sparsevlm_jax.evaluate.questions import read_questions
from sparsevlm_jax.generation import batches
from sparsevlm_jax.generation.programs import Programs
from sparsevlm_jax.inputs import pixels
from sparsevlm_jax.inputs.processor import Processor
from training.heldout import held_out

PROGRAMS, DECODING = "running programs", "decoding images"
# Where seconds are counted, by what they are called. What such a call makes of others on the list is theirs.
PARTS: tuple[tuple[str, Any, str], ...] = (
    (PROGRAMS, Programs, "timed"),
    (DECODING, pixels, "open_image"),
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
SIZES, NEW_TOKENS = (1, 8), 16


class Clock:
    """Seconds by thread and by what they went to."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.spans: dict[str, list[tuple[float, float]]] = defaultdict(list)  # from when to when
        self._local = threading.local()

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Counts what is done inside, but for what is counted inside of that."""
        inside, self._local.inside = getattr(self._local, "inside", 0.0), 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            seconds = ended - began
            self.spans[name].append((began, ended))
            thread = "main" if threading.current_thread() is threading.main_thread() else "others"
            self.seconds[thread][name] += seconds - self._local.inside
            self._local.inside = inside + seconds

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            with self.counting(name):
                return function(*args, **named)

        return counted

    def covered(self, *names: str) -> float:
        """Seconds in which at least one thread was at one of these."""
        total, until = 0.0, 0.0
        for began, ended in sorted(span for name in names for span in self.spans[name]):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total

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
    idle, outside = (seconds - clock.covered(*names) for names in ((PROGRAMS,), (PROGRAMS, DECODING)))
    return {"questions": summary["answered"], "seconds": seconds, "idle": idle, "outside": outside, **found}


def measure_calls(model: sv.Model, method: str, questions: Path) -> dict[str, Any]:
    """A call for each question."""
    asked = [question.asked(questions.parent, None) for question in read_questions(questions)]
    began = time.perf_counter()
    for one in asked:
        sv.answer(model, one.images, one.conversation.question, sparsity=method, max_new_tokens=NEW_TOKENS)
    return {"questions": len(asked), "seconds": time.perf_counter() - began}


def summarize(samples: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds: questions a second, and the percent of the time that each part took."""
    found: dict[str, dict[str, float]] = {}
    for side, runs in samples.items():
        found[side] = {"questions a second": median(one["questions"] / one["seconds"] for one in runs)}
        for name in ("idle", "outside"):
            if name in runs[0]:
                found[side][f"{name}, %"] = median(100 * one[name] / one["seconds"] for one in runs)
        for thread in ("main", "others"):
            for part in sorted({part for one in runs for part in one.get(thread, {})}):
                share = median(100 * one[thread].get(part, 0.0) / one["seconds"] for one in runs)
                found[side][f"{thread}: {part}, %"] = share
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write raw samples there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=960)
    parser.add_argument("--method", default="v1.5")
    options = parser.parse_args()
    model = sv.load(demo_model.path(), dtype=demo_model.DTYPE)
    settings = {"sparsity": options.method, "max_new_tokens": NEW_TOKENS}
    batchers = {size: batches.Batcher(model, batch_size=size, **settings) for size in SIZES}
    samples: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = write_questions(folder, options.questions)
        for number in range(options.rounds + 1):
            for size, batcher in batchers.items():
                found = measure(batcher, questions, folder / f"{number}-{size}.jsonl")
                if number:  # the first round compiles
                    samples.setdefault(f"batch {size}", []).append(found)
            found = measure_calls(model, options.method, questions)
            if number:
                samples.setdefault("a call each", []).append(found)
    summary = summarize(samples)
    for side, values in summary.items():
        print(side, *(f"  {name} {value:.1f}" for name, value in values.items()), sep="\n")
    if options.out:
        about = {"machine": environment("cpu"), "load": os.getloadavg(), "method": options.method}
        write_json(options.out, {**about, "summary": summary, "runs": samples})


if __name__ == "__main__":
    main()
