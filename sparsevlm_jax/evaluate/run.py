"""Answers a file of questions into a file of answers, and goes on where an earlier run was interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate import record
from sparsevlm_jax.evaluate.answers_file import AnswersFile, answer_row, writing
from sparsevlm_jax.evaluate.questions import Key, Question, digest, read_questions
from sparsevlm_jax.generation.answer import Answer
from sparsevlm_jax.generation.batches import Batcher, Numbered
from sparsevlm_jax.inputs.messages import Asked
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

    def add(self, answered: Numbered) -> None:
        self.answered += len(answered)
        whole = next((answer for _, answer in answered if answer.error is None), None)
        if whole is not None:
            self.compile += whole.compile_seconds
            self.prefill += whole.prefill_seconds
            self.decode += whole.decode_seconds


def run(batcher: Batcher, job: Job, questions: Sequence[Question], *, show: bool = False) -> dict[str, Any]:
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
    settings = record.settings_of(batcher, suffix=job.suffix, shard=shard, questions=digest(job.questions))
    wanted = job.wanted(questions)
    sittings = record.require_same(job.answers, settings)
    with writing(job.answers) as answers:
        answers.require_of(questions)
        record.write_record(job.answers, settings, sittings, {})
        clock, began = Clock(), time.perf_counter()
        try:
            _answer(batcher, job, wanted, answers, clock, show)
        finally:
            sitting = _sitting(clock, time.perf_counter() - began, batcher)
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


def _answer(
    batcher: Batcher, job: Job, wanted: Sequence[Question], answers: AnswersFile, clock: Clock, show: bool
) -> None:
    rows, numbers, astray = _askable(wanted, job)
    done = {place for place, number in enumerate(numbers) if wanted[number].key in answers.rows}
    before = sum(question.key in answers.rows for question in wanted)
    with progress("answering", len(wanted), before, show=show) as advance:
        refused = [(number, answer) for number, answer in astray if wanted[number].key not in answers.rows]
        _keep(refused, wanted, answers, batcher, job, clock)
        advance(len(refused))
        for answered in batcher.answers(rows, done):
            _keep([(numbers[place], answer) for place, answer in answered], wanted, answers, batcher, job, clock)
            advance(len(answered))


def _askable(wanted: Sequence[Question], job: Job) -> tuple[list[Asked], list[int], Numbered]:
    """Questions as the model gets them, their numbers, and those whose images are not inside the folder."""
    rows, numbers, astray = [], [], []
    for number, question in enumerate(wanted):
        try:
            rows.append(question.asked(job.images, job.suffix))
            numbers.append(number)
        except UserError as error:
            astray.append((number, Answer(error=str(error))))
    return rows, numbers, astray


def _keep(
    answered: Numbered, wanted: Sequence[Question], answers: AnswersFile, batcher: Batcher, job: Job, clock: Clock
) -> None:
    """Puts a batch of answers into the file.

    Raises:
      UserError: one of them is an error, and that ends the run.
    """
    kept: dict[Key, dict[str, Any]] = {}
    failed = next(((wanted[number], answer) for number, answer in answered if answer.error is not None), None)
    for number, answer in answered:
        if not (job.strict and answer.error is not None):
            kept[wanted[number].key] = answer_row(wanted[number], answer, batcher.model.name)
    if kept:
        answers.append(kept)
    clock.add(answered)
    if job.strict and failed is not None:
        raise UserError(f"question_id {shown(failed[0].question_id)}: {failed[1].error}")


def _sitting(clock: Clock, seconds: float, batcher: Batcher) -> dict[str, Any]:
    return {
        "answered": clock.answered,
        "seconds": seconds,
        "compile_seconds": clock.compile,
        "prefill_seconds": clock.prefill,
        "decode_seconds": clock.decode,
        "batch_size": batcher.batch_size,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
