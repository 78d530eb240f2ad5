"""Files for benchmarks whose servers keep the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate import mmbench
from sparsevlm_jax.evaluate.normalize import normalize
from sparsevlm_jax.evaluate.scorers.base import Given
from sparsevlm_jax.files import write


def vqav2(given: Given, out: Path) -> None:
    """Every question of the file in its order with its normalised answer; one that has none is empty, as the server
    wants all of the test set and LLaVA answers a part of it."""
    assert given.questions is not None
    found = given.by_id()
    rows = []
    for question in given.questions:
        answer = found.pop(question.question_id, None)
        rows.append({"question_id": question.question_id, "answer": "" if answer is None else normalize(answer.text)})
    if found:
        raise UserError(
            f"{given.source}: {len(found)} answers are to other questions, such as {shown(next(iter(found)))}"
        )
    _write(out, rows)


def vizwiz(given: Given, out: Path) -> None:
    """Every question's image with its normalised answer."""
    assert given.questions is not None
    answered = given.one_each(question.question_id for question in given.questions)
    pairs = zip(given.questions, answered, strict=True)
    _write(
        out, [{"image": "".join(question.images[:1]), "answer": normalize(answer.text)} for question, answer in pairs]
    )


def mmvet(given: Given, out: Path) -> None:
    """Answers by the names that the evaluator has for its questions."""
    _write(out, {f"v1_{question_id}": answer.text for question_id, answer in given.by_id().items()})


def mmbench_sheet(given: Given, out: Path) -> None:
    """The table with a column of answers, as xlsx."""
    mmbench.write_submission(given.truth, {key: answer.text for key, answer in given.by_id().items()}, out)


def _write(out: Path, content: object) -> None:
    write(out, json.dumps(content).encode())


SUBMISSIONS: dict[str, Callable[[Given, Path], None]] = {
    "vqav2": vqav2,
    "vizwiz": vizwiz,
    "mmbench": mmbench_sheet,
    "mmvet": mmvet,
}


def submit(kind: str, answers: Path, questions: Path | None, out: Path) -> int:
    """Writes what a benchmark's server takes.

    Args:
      questions: LLaVA's own file of them; mmvet needs none.

    Returns:
      How many of the answers are errors; their texts are empty.

    Raises:
      UserError: files that cannot be used, or do not belong together.
    """
    if questions is None and kind != "mmvet":
        raise UserError(f"{kind}: the file of questions is needed too")
    table = questions if kind == "mmbench" else None
    given = Given.read(answers, table or answers, None if kind in ("mmbench", "mmvet") else questions)
    SUBMISSIONS[kind](given, out)
    return given.errors
