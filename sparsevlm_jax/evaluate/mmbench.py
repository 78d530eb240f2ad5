"""MMBench's table: questions with options and the images themselves; and the sheet that its server takes."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate.sheet import write_sheet
from sparsevlm_jax.files import open_regular, write

OPTIONS = ("A", "B", "C", "D")
NOT_SENT = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6
_NOTHING = frozenset(("", "nan", "none", "null", "n/a", "#n/a", "<na>"))


def rows(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a table by its columns.

    Raises:
      UserError: it cannot be read, or is no table with questions and their index.
    """
    csv.field_size_limit(max(csv.field_size_limit(), bounds.FIELD_BYTES))
    with open_regular(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        table = csv.reader(text, delimiter="\t")
        try:
            header = next(table, [])
            if not {"index", "question"} <= set(header):
                raise UserError(f"{file}: no columns `index` and `question` in its first line: no table of MMBench")
            for row in table:
                if len(row) != len(header):
                    raise UserError(f"{file}: line {table.line_num}: {len(row)} columns, the first has {len(header)}")
                yield dict(zip(header, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}: line {table.line_num}: no table: {error}") from None


def questions(file: Path, folder: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every question as a line of LLaVA's files has it, and what to call it in errors.

    Args:
      folder: where the images go that are not there yet; None leaves them in the table.

    Raises:
      UserError: a row that is no question, or an image that cannot be written.
    """
    if folder is not None:
        _make(folder)
    for row in rows(file):
        name = f"{file}: index {shown(row['index'])}"
        number = _index(row, name)
        image = f"{number}.jpg"
        if folder is not None:
            _unpack(row.get("image", ""), folder / image, name)
        yield name, {"question_id": number, "text": question_text(row), "image": image}


def question_text(row: Mapping[str, str]) -> str:
    """Hint, question and options, a line each; the first option that is missing ends them."""
    lines = [row["question"]] if _is_nothing(row.get("hint")) else [row["hint"], row["question"]]
    for letter in OPTIONS:
        if _is_nothing(row.get(letter)):
            break
        lines.append(f"{letter}. {row[letter]}")
    return "\n".join(lines)


def write_submission(table: Path, answers: Mapping[Any, str], out: Path) -> None:
    """The table without what the server knows, with every answer beside its question, as an xlsx file.

    Raises:
      UserError: a question without an answer, or a file that cannot be used.
    """
    lines: list[list[str | int]] = []
    for row in rows(table):
        name = f"{table}: index {shown(row['index'])}"
        number = _index(row, name)
        if number not in answers:
            raise UserError(f"{name}: the question has no answer")
        sent: dict[str, str | int] = {key: value for key, value in row.items() if key not in NOT_SENT}
        sent["index"] = number
        keys = list(sent)
        keys.insert(PREDICTION_COLUMN, "prediction")
        sent["prediction"] = answers[number]
        lines = lines or [[*keys]]
        lines.append([sent[key] for key in keys])
    write_sheet(out, lines)


def _index(row: Mapping[str, str], name: str) -> int:
    if not row["index"].isdecimal() or len(row["index"]) > bounds.JSON_DIGITS:
        raise UserError(f"{name}: is no whole number")
    return int(row["index"])


def _is_nothing(value: str | None) -> bool:
    return value is None or value.lower() in _NOTHING


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from error


def _unpack(encoded: str, file: Path, name: str) -> None:
    if file.exists():
        return
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise UserError(f"{name}: `image` is no base64: {error}") from None
    write(file, content)  # whole or not at all: other shards look for it too
