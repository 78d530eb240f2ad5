"""Files of questions, as LLaVA's evaluation has them: JSON lines, or ScienceQA's list of conversations."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate import mmbench
from sparsevlm_jax.files import parse_document, read_bytes, read_json_lines
from sparsevlm_jax.inputs.messages import Asked, Conversation

MARKER = "<image>"
Id = int | str
Key = tuple[Id, str, int]  # a question's id and text, and how many before it had both


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      key: what tells it from all others. MME and TextVQA give one id to several questions; the text tells these apart.
      images, videos: names of files inside the folder of images.
      category: of some benchmarks.
    """

    key: Key
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    category: str | None = None

    @property
    def question_id(self) -> Id:
        return self.key[0]

    @property
    def text(self) -> str:
        """What is asked; an answer's `prompt`."""
        return self.key[1]

    def asked(self, folder: Path, suffix: str | None) -> Asked:
        """The question as the model gets it.

        Args:
          suffix: a line behind every question, if there is one.

        Raises:
          UserError: an image or video that is not inside the folder.
        """
        text = self.text if suffix is None else f"{self.text}\n{suffix}"
        images = [locate(folder, name) for name in self.images]
        return Asked(Conversation(text), list(images), [locate(folder, name) for name in self.videos])


def locate(folder: Path, name: str) -> Path:
    """A file inside a folder, by its name there: neither the name nor a link may lead out.

    Raises:
      UserError: it does.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise UserError(f"{shown(name)}: not the name of a file inside the folder of images")
    file = folder / name
    try:
        target = file.resolve()
        # Most have no link on their way, and spare looking for the folder's own.
        leads_out = target != file.absolute() and not target.is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # links in a circle
        raise UserError(f"{file}: cannot be read: {error}") from None
    if leads_out:
        raise UserError(f"{file}: a link that leads out of the folder of images; copy the file there instead")
    return file


def read_questions(file: Path, folder: Path | None = None) -> list[Question]:
    """The questions of a file in its order.

    A line of JSON lines has `question_id`, `text`, and `image` or `video`: a name, a list of names, or none for text
    alone. An entry of a JSON list has `id`, `image` and `conversations`, whose first message is the question. A table
    (.tsv) is MMBench's, which holds the images themselves.

    Args:
      folder: where images go that the file holds itself; None leaves them in it.

    Raises:
      UserError: the file is neither, or asks the same question twice about different things.
    """
    seen: Counter[tuple[Id, str]] = Counter()
    shows: dict[tuple[Id, str], Any] = {}
    found = []
    for name, row in _rows(file, folder):
        question_id, text = _id(row, name), _text(row, name)
        images, videos = (_names(row, kind, name) for kind in ("image", "video"))
        if "conversations" in row and images:
            text = f"{MARKER}\n{text}"
        pair = (question_id, text)
        if len(str(question_id)) + len(text) > bounds.QUESTION_CHARACTERS:
            raise UserError(f"{name}: {len(text):,} characters, expected at most {bounds.QUESTION_CHARACTERS:,}")
        if shows.setdefault(pair, (images, videos)) != (images, videos):
            raise UserError(
                f"{name}: question_id {shown(question_id)} is there with the same text and another image: "
                "give each question an id of its own"
            )
        category = row.get("category")
        found.append(Question((*pair, seen[pair]), images, videos, category if isinstance(category, str) else None))
        seen[pair] += 1
    if not found:
        raise UserError(f"{file}: no questions in it")
    return found


def digest(file: Path) -> str:
    """SHA-256 of a file that has been read."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_id(row: dict[str, Any], key: str, name: str) -> Id:
    """The id in a row of a file.

    Raises:
      UserError: none, or neither text nor a whole number.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{name}: `{key}` is {shown(value)}, expected a text or a whole number")
    return value


def read_text(row: dict[str, Any], key: str, name: str) -> str:
    """A text in a row of a file.

    Raises:
      UserError: there is none.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{name}: `{key}` is {shown(value)}, expected a text")
    return value


def _rows(file: Path, folder: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of a file, and what to call each in errors."""
    if file.suffix == ".tsv":
        yield from mmbench.questions(file, folder)
        return
    if file.suffix != ".json":
        yield from read_json_lines(file)
        return
    entries = parse_document(read_bytes(file, bounds.TRUTH_BYTES), str(file), bounds.TRUTH_BYTES)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file}: expected a list of questions; JSON lines end in .jsonl")
    for number, entry in enumerate(entries, start=1):
        yield f"{file}: entry {number}", entry


def _id(row: dict[str, Any], name: str) -> Id:
    return read_id(row, "id" if "conversations" in row else "question_id", name)


def _text(row: dict[str, Any], name: str) -> str:
    if "conversations" not in row:
        return read_text(row, "text", name)
    said = row["conversations"]
    if not isinstance(said, list) or not said or not isinstance(said[0], dict):
        raise UserError(f"{name}: `conversations` is {shown(said)}, expected a list of messages")
    return read_text(said[0], "value", name).replace(MARKER, "").strip()


def _names(row: dict[str, Any], kind: str, name: str) -> tuple[str, ...]:
    value = row.get(kind)
    names = value if isinstance(value, list) else [] if value in (None, "") else [value]
    if not all(isinstance(each, str) for each in names):
        # Without the marks of a setting: this is no option of the command line.
        raise UserError(f"{name}: its {kind} is {shown(value)}, expected the name of a file or a list of names")
    return tuple(names)
