"""What scorers share: answers and truth as they read them, and how both are brought together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate.questions import Id, Question, read_id, read_questions, read_text
from sparsevlm_jax.files import parse_document, read_bytes, read_json_lines

Scores = dict[str, float]
Value = TypeVar("Value")


class Answered(NamedTuple):
    """An answer that is scored. One with an error is an empty text, as wrong as any."""

    question_id: Id
    prompt: str
    text: str


@dataclass(frozen=True)
class Given:
    """The files of one benchmark.

    Attributes:
      source: the file of answers, for errors.
      truth: a file or folder, as the benchmark has it.
      questions: in their order, where they were given.
    """

    source: Path
    answers: list[Answered]
    truth: Path
    questions: list[Question] | None = None

    @classmethod
    def read(cls, answers: Path, truth: Path, questions: Path | None = None) -> Given:
        """Reads answers and questions; the truth is read by its scorer.

        Raises:
          UserError: no answers, or a file that cannot be used.
        """
        found = []
        for name, row in read_json_lines(answers):
            prompt = read_text(row, "prompt", name) if "prompt" in row else ""
            found.append(Answered(read_id(row, "question_id", name), prompt, read_text(row, "text", name)))
        if not found:
            raise UserError(f"{answers}: no answers in it")
        return cls(answers, found, truth, None if questions is None else read_questions(questions))

    def by_id(self) -> dict[Id, Answered]:
        """Answers by their question's id.

        Raises:
          UserError: two to the same.
        """
        found: dict[Id, Answered] = {}
        for answer in self.answers:
            if answer.question_id in found:
                raise UserError(f"{self.source}: two answers to question_id {shown(answer.question_id)}")
            found[answer.question_id] = answer
        return found

    def by_name(self, wanted: Iterable[object]) -> list[Answered]:
        """`one_each` for truths whose ids are texts, whatever they are among the answers.

        Raises:
          UserError: as `one_each`.
        """
        found = {str(key): answer for key, answer in self.by_id().items()}
        keys = [str(key) for key in wanted]
        self.require_match(found, keys)
        return [found[key] for key in keys]

    def one_each(self, wanted: Iterable[Id]) -> list[Answered]:
        """The answer to each of these questions.

        Raises:
          UserError: one has none, or some answers are to others.
        """
        found = self.by_id()
        keys = list(wanted)
        self.require_match(found, keys)
        return [found[key] for key in keys]

    def require_match(self, found: Mapping[Any, Any], wanted: Sequence[Hashable]) -> None:
        """Refuses answers that are not those to all of these questions.

        Raises:
          UserError: naming how many are missing or too many, and one of them.
        """
        missing = [key for key in wanted if key not in found]
        if missing:
            raise UserError(
                f"{self.source}: {len(missing)} of {len(wanted)} questions have no answer, such as {shown(missing[0])}"
            )
        strangers = found.keys() - set(wanted)
        if strangers:
            raise UserError(
                f"{self.source}: {len(strangers)} answers are to questions that {self.truth} does not have, such as "
                f"{shown(min(strangers, key=str))}"
            )


def read_document(file: Path, kind: type[Value]) -> Value:
    """A benchmark's JSON file, a list or an object.

    Raises:
      UserError: it cannot be read, or is the other.
    """
    found = parse_document(read_bytes(file, bounds.TRUTH_BYTES), str(file), bounds.TRUTH_BYTES)
    return entry(found, kind, str(file))


def entry(value: Any, kind: type[Value], name: str) -> Value:
    """A value of a benchmark's file.

    Raises:
      UserError: it is of another kind than it has to be.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name}: is {shown(value)}, expected {_NAMES.get(kind, kind.__name__)}")
    return value


def share(right: Iterable[bool]) -> float:
    """Percent of what is true."""
    found = list(right)
    return 100.0 * sum(found) / len(found) if found else 0.0


_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
