"""TextVQA: an answer counts as far as people gave it: a third for each of ten who did, at most one, each left out in
turn."""

from __future__ import annotations

import re
from collections import Counter

from sparsevlm_jax.errors import shown
from sparsevlm_jax.evaluate.normalize import normalize
from sparsevlm_jax.evaluate.scorers.base import Given, Scores, entry, read_document

PEOPLE, ENOUGH = 10, 3
_OCR = "Reference OCR token: "
_OLD = re.compile(r"OCR tokens: .*?Question: (.*?) Short answer:", re.DOTALL)


def score(given: Given) -> Scores:
    """The mean accuracy in percent.

    Questions are found by their image and text; LLaVA's file has the image's id for the question's.

    Raises:
      UserError: answers and truth do not belong together.
    """
    people = {}
    for row in entry(read_document(given.truth, dict).get("data"), list, f"{given.truth}: `data`"):
        row = entry(row, dict, f"{given.truth}: an entry of `data`")
        key = str(row.get("image_id")), str(row.get("question")).lower()
        people[key] = entry(row.get("answers"), list, f"{given.truth}: {shown(key[1])}: `answers`")
    keys = [(str(answer.question_id), question_of(answer.prompt).lower()) for answer in given.answers]
    given.require_match(dict.fromkeys(keys), list(people))
    said = [
        accuracy(answer.text, [str(each) for each in people[key]])
        for key, answer in zip(keys, given.answers, strict=True)
    ]
    return {"accuracy": 100 * sum(said) / len(said), "answers": float(len(said))}


def question_of(prompt: str) -> str:
    """The question in a prompt, which may have the words on the image in front or behind, and how to answer."""
    lines = prompt.split("\n")
    if match := _OLD.match(prompt):
        return match[1]
    return lines[1] if prompt.startswith(_OCR.rstrip()) and len(lines) > 1 else lines[0]


def accuracy(said: str, people: list[str]) -> float:
    """Of one answer: for each person the share of enough others who said the same, and the mean of that."""
    others = Counter(normalize(each) for each in people)
    same = others[normalize(said)]
    if not same:
        return 0.0
    with_them, without = min(1.0, (same - 1) / ENOUGH), min(1.0, same / ENOUGH)
    return (same * with_them + (len(people) - same) * without) / len(people)
