"""Any other set: an answer is right if it is one of the true ones, whatever its capitals, outer spaces and the period
behind it."""

from __future__ import annotations

from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate.questions import Id, read_id
from sparsevlm_jax.evaluate.scorers.base import Given, Scores, share
from sparsevlm_jax.files import read_json_lines


def score(given: Given) -> Scores:
    """The accuracy in percent.

    Raises:
      UserError: answers and truth do not belong together.
    """
    truth: dict[Id, set[str]] = {}
    for name, row in read_json_lines(given.truth):
        question_id, true = read_id(row, "question_id", name), row.get("answer")
        texts = [each for each in (true if isinstance(true, list) else [true]) if isinstance(each, str)]
        if not texts or (isinstance(true, list) and len(texts) < len(true)):
            raise UserError(f"{name}: `answer` is {shown(true)}, expected a text or a list of texts")
        if question_id in truth:
            raise UserError(f"{name}: question_id {shown(question_id)} is there twice")
        truth[question_id] = {plain(each) for each in texts}
    right = [plain(answer.text) in truth[answer.question_id] for answer in given.one_each(truth)]
    return {"accuracy": share(right), "answers": float(len(right))}


def plain(text: str) -> str:
    """An answer as it is compared."""
    return text.strip().rstrip(".").strip().lower()
