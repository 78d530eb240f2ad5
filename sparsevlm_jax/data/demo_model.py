"""The model inside the package: a small LLaVA that reads digits in photographs, and images to ask it about.

`training/` in the repository is how it was made; data/README.md credits its data.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import NamedTuple

DTYPE = "float32"  # to compute in: the stored 16 bits gain nothing on CPUs


class QuestionAnswer(NamedTuple):
    """A question and the truth."""

    question: str
    answer: str


class Sample(NamedTuple):
    """A held-out image with questions about it."""

    image: Path
    questions: tuple[QuestionAnswer, ...]


def path() -> Path:
    """The model, a Hugging Face folder."""
    return _data("demo")


def samples() -> list[Sample]:
    """Images that the model has never seen, with questions."""
    folder = _data("images")
    listed = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [
        Sample(folder / image, tuple(QuestionAnswer(**pair) for pair in questions))
        for image, questions in listed.items()
    ]


def photo() -> Path:
    """A photograph (CC BY 2.0, see data/README.md)."""
    return _data("china.jpg")


def _data(name: str) -> Path:
    return Path(str(resources.files("sparsevlm_jax") / "data" / name))
