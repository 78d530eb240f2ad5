"""POPE: is there such a thing in the image? The published number is the mean F1 of three ways to ask for what is not.

A model says no where the first sentence has one of the words No, not, no; anything else is a yes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate.questions import Question, read_text
from sparsevlm_jax.evaluate.scorers.base import Given, Scores
from sparsevlm_jax.files import read_json_lines

_FILE = re.compile(r"coco_pope_(\w+)\.json")


def score(given: Given) -> Scores:
    """Accuracy, precision, recall, F1 and the share of yes of every category, in percent, and their mean F1.

    A category's labels go with its questions in the order of the file of questions.

    Raises:
      UserError: answers, questions and labels do not belong together.
    """
    assert given.questions is not None
    answered = given.one_each(question.question_id for question in given.questions)
    scores, f1 = {}, []
    for category, file in _categories(given.truth).items():
        own = [i for i, question in enumerate(given.questions) if question.category == category]
        labels = _labels(file, [given.questions[i] for i in own])
        found = _rates([says_yes(answered[i].text) for i in own], labels)
        f1.append(found["F1"])
        scores |= {f"{category} {name}": value for name, value in found.items()}
    return {"mean F1": sum(f1) / len(f1), **scores}


def says_yes(text: str) -> bool:
    """Whether an answer is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _categories(folder: Path) -> dict[str, Path]:
    files = sorted(folder.glob("coco_pope_*.json")) if folder.is_dir() else []
    found = {match[1]: file for file in files if (match := _FILE.fullmatch(file.name))}
    if not found:
        raise UserError(f"{folder}: no folder with files such as coco_pope_random.json")
    return found


def _labels(file: Path, questions: Sequence[Question]) -> list[bool]:
    """Whether the truth is yes, for every question."""
    labels = []
    for name, row in read_json_lines(file):
        labels.append(read_text(row, "label", name) != "no")
        if len(labels) <= len(questions) and questions[len(labels) - 1].images not in ((row.get("image"),), ()):
            raise UserError(
                f"{name}: is about {shown(row.get('image'))}, the question in its place about "
                f"{shown(questions[len(labels) - 1].images[0])}: another release of POPE than the questions"
            )
    if len(labels) != len(questions) or not labels:
        raise UserError(f"{file}: has {len(labels)} labels for {len(questions)} questions of its category")
    return labels


def _rates(said: Sequence[bool], truth: Sequence[bool]) -> Scores:
    hits = sum(s and t for s, t in zip(said, truth, strict=True))
    right = sum(s == t for s, t in zip(said, truth, strict=True))
    precision, recall = hits / max(sum(said), 1), hits / max(sum(truth), 1)
    return {
        "F1": 100 * 2 * hits / max(sum(said) + sum(truth), 1),
        "accuracy": 100 * right / len(truth),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "yes": 100 * sum(said) / len(said),
    }
