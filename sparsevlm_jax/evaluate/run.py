"""Answers a file of questions into a file of answers, and goes on where an earlier run was interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate import record
from sparsevlm_jax.evaluate.answers_file import AnswersFile, answer_row, writing
from sparsevlm_jax.evaluate.engines import Engine
from sparsevlm_jax.evaluate.questions import Question, digest, read_questions
from sparsevlm_jax.generation.answer import Answer
from sparsevlm_jax.generation.batches import Numbered, Row
from sparsevlm_jax.progress import progress

TOTALS = ("visual_in_prompt", "entering_tokens", "prompt_tokens", "new_tokens", "flops", "dense_flops")


@dataclass(frozen=True)
class Job:
    """What to answer, and where to.

    Attributes:
      questions: a file of questions, see `read_questions`.
      images: the folder of their images and videos.
      answers: the file to write.
      limit: only the first so many questions.
      shard: (i, n): only every n-th question, from the i-th.
      suffix: a line behind every question.
      strict: whether the first question that cannot be answered ends the run.
    """

    questions: Path
    images: Path
    answers: Path
    limit: int | None = None
    shard: tuple[int, int] = (0, 1)
    suffix: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        number, count = self.shard
        if not 0 <= number < count:
            raise UserError(f"shard {number}/{count}: the first of n parts is 0/n, the last n-1/n")

    def read(self) -> list[Question]:
        """All questions of this shard; the limit counts before. MMBench's images go into the folder, which is made.

        Raises:
          UserError: questions that cannot be read, or no such folder.
        """
        if self.questions.suffix != ".tsv" and not self.images.is_dir():
            raise UserError(f"{self.images}: no such folder")
        return read_questions(self.questions, self.images)[self.shard[0] :: self.shard[1]]

    def wanted(self, questions: Sequence[Question]) -> Sequence[Question]:
        """Those of a shard that are asked."""
        if self.limit is None:
            return questions
        return questions[: len(range(self.shard[0], self.limit, self.shard[1]))]


@dataclass
class Clock:
    """Seconds of this run, by what they went to; what is left is the host's."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    answered: int = 0

    def add(self, answered: Sequence[Answer]) -> None:
        """Counts a batch."""
        self.answered += len(answered)
        whole = next((answer for answer in answered if answer.error is None), None)
        if whole is not None:
            self.compile += whole.compile_seconds
            self.prefill += whole.prefill_seconds
            self.decode += whole.decode_seconds


def run(engine: Engine, job: Job, questions: Sequence[Question], *, show: bool = False) -> dict[str, Any]:
    """Answers what is not answered yet.

    Args:
      questions: `job.read()`: looked at before a model is loaded.
      show: a bar on stderr.

    Returns:
      A summary of the whole file, and of the seconds of this run.

    Raises:
      UserError: files that cannot be used, another run's answers, or with `strict` a question that has no answer.
    """
    shard = None if job.shard[1] == 1 else "{}/{}".format(*job.shard)
    settings = {**engine.settings(), "suffix": job.suffix, "shard": shard, "questions": digest(job.questions)}
    wanted = job.wanted(questions)
    sittings = record.require_same(job.answers, settings)
    with writing(job.answers) as answers:
        answers.require_of(questions)
        record.write_record(job.answers, settings, sittings, {})
        clock, began = Clock(), time.perf_counter()
        try:
            _answer(engine, Tray(job, wanted, answers, settings["model"]["name"], clock), show)
        finally:
            sitting = _sitting(clock, time.perf_counter() - began, engine)
            if clock.answered:
                sittings.append(sitting)
            with suppress(UserError):  # what went wrong before is worth more
                summary = summarize(answers.rows.values())
                record.write_record(job.answers, settings, sittings, summary)
        answers.sort(questions)
    return {**summarize(answers.rows.values()), "questions": len(wanted), **sitting}


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts over a file of answers: how many, and what they took together."""
    found = [row["metadata"] for row in rows]
    whole = [metadata for metadata in found if "error" not in metadata]
    totals = {key: sum(metadata.get(key, 0) for metadata in whole) for key in TOTALS}
    return {"answers": len(found), "errors": len(found) - len(whole), **totals}


@dataclass
class Tray:
    """Where the answers of a job go.

    Attributes:
      wanted: the questions that are asked, in the order of the numbers that answers come with.
      model_id: what the answers call their model.
    """

    job: Job
    wanted: Sequence[Question]
    answers: AnswersFile
    model_id: str
    clock: Clock

    def has(self, number: int) -> bool:
        return self.wanted[number].key in self.answers.rows

    def keep(self, answered: Numbered) -> None:
        """Puts a batch into the file, but for what is there.

        Raises:
          UserError: one of them is an error, and that ends the run.
        """
        fresh = [(self.wanted[number], answer) for number, answer in answered if not self.has(number)]
        errors = [(question, answer) for question, answer in fresh if answer.error is not None]
        kept = [pair for pair in fresh if not (self.job.strict and pair in errors)]
        if kept:
            rows = {question.key: answer_row(question, answer, self.model_id) for question, answer in kept}
            self.answers.append(rows)
        self.clock.add([answer for _, answer in fresh])
        if self.job.strict and errors:
            question, answer = errors[0]
            raise UserError(f"question_id {shown(question.question_id)}: {answer.error}")


def _answer(engine: Engine, tray: Tray, show: bool) -> None:
    rows = (_row(question, tray.job) for question in tray.wanted)
    done = {number for number in range(len(tray.wanted)) if tray.has(number)}
    with progress("answering", len(tray.wanted), len(done), show=show) as advance:
        for answered in engine.answers(rows, done):
            tray.keep(answered)
            advance(len(answered))


def _row(question: Question, job: Job) -> Row:
    """A question as the model gets it, or that its images are not inside the folder."""
    try:
        return question.asked(job.images, job.suffix)
    except UserError as error:
        return error


def _sitting(clock: Clock, seconds: float, engine: Engine) -> dict[str, Any]:
    return {
        "answered": clock.answered,
        "seconds": seconds,
        "compile_seconds": clock.compile,
        "prefill_seconds": clock.prefill,
        "decode_seconds": clock.decode,
        **engine.place(),
    }
