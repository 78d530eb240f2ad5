"""easy-vqa's test split as files for `sparsevlm answer`, and what can be said of its answers without an image.

Images and questions come with the PyPI package `easy-vqa`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.shapes import COLOURS, NEGATIONS, SHAPES, package

KINDS = ("named", "unnamed", "there", "not there")


class Asked(NamedTuple):
    """A question of a split."""

    text: str
    answer: str
    image: int

    @property
    def kind(self) -> str:
        """What the question's words name: for colour or shape, the other one or nothing; for yes or no, what is there
        or what is not."""
        words = self.text.rstrip("?").split()
        if self.answer in COLOURS + SHAPES:
            return "named" if any(word in COLOURS + SHAPES for word in words) else "unnamed"
        return "there" if (self.answer == "yes") != any(word in NEGATIONS for word in words) else "not there"


class Files(NamedTuple):
    """Where a prepared split lies."""

    folder: Path

    @property
    def questions(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def truth(self) -> Path:
        return self.folder / "truth.jsonl"

    @property
    def images(self) -> Path:
        return self.folder / "images"


def split(name: str) -> list[Asked]:
    """The questions of "train" or "test" in the package's order.

    Raises:
      UserError: the package is not installed.
    """
    found = {"train": package().get_train_questions, "test": package().get_test_questions}[name]()
    return [Asked(*row) for row in zip(*found, strict=True)]


def image_paths(name: str) -> dict[int, Path]:
    """The images of "train" or "test" by their number.

    Raises:
      UserError: the package is not installed.
    """
    found = {"train": package().get_train_image_paths, "test": package().get_test_image_paths}[name]()
    return {number: Path(path) for number, path in sorted(found.items())}


def prepare(folder: Path) -> Files:
    """Writes the test split as LLaVA's evaluation has its sets: questions, a folder of images, and the truth."""
    files, asked = Files(folder), split("test")
    files.images.mkdir(parents=True, exist_ok=True)
    for path in image_paths("test").values():
        shutil.copyfile(path, files.images / path.name)
    rows = [{"question_id": i, "image": f"{row.image}.png", "text": row.text} for i, row in enumerate(asked)]
    write_lines(files.questions, rows)
    write_lines(files.truth, [{"question_id": i, "answer": row.answer} for i, row in enumerate(asked)])
    return files


def blind_accuracies(learned: Sequence[Asked], tested: Sequence[Asked]) -> dict[str, float]:
    """How many questions the commonest answer gets right: of all, and of those with the same text."""
    everywhere = Counter(row.answer for row in learned).most_common(1)[0][0]
    by_text: dict[str, Counter[str]] = {}
    for row in learned:
        by_text.setdefault(row.text, Counter())[row.answer] += 1
    same_text = [by_text[row.text].most_common(1)[0][0] == row.answer for row in tested if row.text in by_text]
    return {
        "majority": sum(row.answer == everywhere for row in tested) / len(tested),
        "majority_of_text": sum(same_text) / len(tested),
    }


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
