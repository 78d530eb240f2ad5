"""Results as files, which are either complete or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import write


def write_text(path: Path, text: str) -> None:
    """Writes a file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text.encode())


def put_between(path: Path, name: str, text: str) -> None:
    """Replaces what stands between the lines `<!-- name -->` and `<!-- /name -->` of a Markdown file.

    Raises:
      UserError: the file has no such lines.
    """
    before, after = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8")
    begin, end = old.find(before), old.find(after)
    if not 0 <= begin < end:
        raise UserError(f"{path}: expected the lines {before} and {after} around the table's place")
    write_text(path, old[: begin + len(before)] + f"\n{text}\n" + old[end:])


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """A parsed file.

    Raises:
      UserError: it cannot be read as JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
