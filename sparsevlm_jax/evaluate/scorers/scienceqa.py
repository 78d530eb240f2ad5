"""ScienceQA: the letter of an option, by itself, in front of the option, or behind "The answer is". The paper's number
is that of questions with an image."""

from __future__ import annotations

import re
from typing import Any

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.evaluate.scorers.base import Given, Scores, entry, read_document, share

LETTERS = "ABCDE"
_SAID = (re.compile(r"The answer is ([A-E])\."), re.compile(r"The answer is ([A-E])"))
SPLIT = "test"


def score(given: Given) -> Scores:
    """The accuracy in percent over questions with an image, over those without, and over all of the test split.

    Raises:
      UserError: answers and truth do not belong together.
    """
    problems = read_document(given.truth / "problems.json", dict)
    splits = given.truth / "pid_splits.json"
    wanted = entry(read_document(splits, dict).get(SPLIT), list, f"{splits}: `{SPLIT}`")
    right: dict[bool, list[bool]] = {True: [], False: []}
    for key, answer in zip(map(str, wanted), given.by_name(wanted), strict=True):
        name = f"{given.truth / 'problems.json'}: {key}"
        problem: dict[str, Any] = entry(problems.get(key), dict, name)
        choices = len(entry(problem.get("choices"), list, f"{name}: `choices`"))
        true = entry(problem.get("answer"), int, f"{name}: `answer`")
        if not 0 <= true < min(choices, len(LETTERS)):
            raise UserError(f"{name}: `answer` is {true}, which of {choices} choices is no letter")
        right[bool(problem.get("image"))].append(letter(answer.text) == LETTERS[true])
    return {
        "accuracy with image": share(right[True]),
        "accuracy without": share(right[False]),
        "accuracy": share(right[True] + right[False]),
    }


def letter(text: str) -> str | None:
    """The option that an answer names; None where it names none."""
    text = text.replace("\n", ". ")
    if len(text.strip()) == 1 and text.strip() in LETTERS:
        return text.strip()
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    return next((match[1] for pattern in _SAID if (match := pattern.search(text))), None)
