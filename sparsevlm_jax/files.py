"""Files: read only if they are what they seem, and written so that they appear under their name when complete."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError

_POINTER = b"version https://git-lfs.github.com/spec/"
_SHOWN = 3
_LONGEST_PATH = 200  # characters in a message
_TOO_DEEP = f"nested more than {bounds.JSON_DEPTH} deep"


def read_json(file: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object: UTF-8 with or without a byte order mark, within `bounds`, every key once.

    Args:
      missing: what a file that is not there stands for; None makes it an error.

    Raises:
      UserError: there is no such file, it is no regular one, cannot be read, or holds anything else.
    """
    if missing is not None and not os.path.lexists(file):
        return missing
    return parse_json(read_bytes(file, bounds.JSON_BYTES), str(file))


def parse_json(content: bytes, name: str, most: int = bounds.JSON_BYTES) -> dict[str, Any]:
    """A JSON object of bytes, as `read_json` takes it.

    Args:
      name: what to call it in errors.
      most: bytes that it may have.

    Raises:
      UserError: it is anything else.
    """
    found = parse_document(content, name, most)
    if not isinstance(found, dict):
        raise UserError(f"{name}: expected a JSON object, found {type(found).__name__}")
    return found


def parse_document(content: bytes, name: str, most: int) -> Any:
    """Any JSON document, otherwise as `parse_json`."""
    try:
        if len(content) > most:
            raise ValueError(f"{len(content):,} bytes, expected at most {most:,}")
        text = content.decode("utf-8-sig")
        parts = text.count("{") + text.count("[")
        if parts > most // bounds.JSON_PART_BYTES:
            raise ValueError(f"{parts:,} lists and objects, expected at most {most // bounds.JSON_PART_BYTES:,}")
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_int=_integer, parse_float=_float)
        _check_values(found)
    except RecursionError:
        raise UserError(f"{name}: cannot be read as JSON: {_TOO_DEEP}") from None
    except ValueError as error:  # no UTF-8, no JSON, or one of ours
        raise UserError(f"{name}: cannot be read as JSON: {error}") from None
    return found


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers from 1, within `bounds`; a last one without its end has none here either.

    Raises:
      UserError: the file cannot be read, or has longer or more lines than are taken.
    """
    with open_regular(file) as stream:
        number = 0
        while line := stream.readline(bounds.LINE_BYTES + 1):
            number += 1
            if len(line) > bounds.LINE_BYTES or number > bounds.LINES:
                more = f"more than {bounds.LINE_BYTES:,} bytes" if len(line) > bounds.LINE_BYTES else "too many lines"
                raise UserError(f"{file}: line {number}: {more}")
            yield number, line


def read_json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON object of every line that is not empty, and what to call it in errors.

    Raises:
      UserError: the file cannot be read, or a line is anything else.
    """
    for number, line in read_lines(file):
        if line.strip():
            name = f"{file}: line {number}"
            yield name, parse_json(line, name, bounds.LINE_BYTES)


def read_bytes(file: Path, most: int) -> bytes:
    """The content of a regular file.

    Raises:
      UserError: no such file, no regular one, more than `most` bytes, unreadable, or a Git LFS pointer.
    """
    with open_regular(file) as stream:
        try:
            content = stream.read(most + 1)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise UserError(f"{file}: has more than {most:,} bytes, which nothing of its kind needs")
    refuse_pointer(content, file)
    return content


def open_regular(file: Path) -> BufferedReader:
    """Opens a regular file for reading; a pipe or a device is never opened, where a read could wait for ever.

    Raises:
      UserError: there is no such file, it is of another kind, or cannot be opened.
    """
    try:
        _require_regular(file, os.stat(file))
        stream = open(file, "rb", opener=_open_at_once)  # noqa: SIM115 (the caller's to close)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name, or a lone surrogate
        raise UserError(f"{str(file)!r}: cannot be the name of a file: {error}") from None
    try:
        _require_regular(file, os.fstat(stream.fileno()))  # it may have been replaced in between
    except UserError:
        stream.close()
        raise
    return stream


def inside(folder: Path, name: str) -> Path:
    """A file that is read because it stands in a model's folder: no link may lead out of there.

    In the hub's cache the files of a snapshot are links to `../../blobs/HASH`: those are followed.

    Raises:
      UserError: it is a link that leads elsewhere.
    """
    file = folder / name
    try:
        home, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle
        raise UserError(f"{file}: cannot be read: {error}") from None
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not target.is_relative_to(home) and target.parent != blobs:
        raise UserError(f"{file}: a link that leads out of its folder; copy the file there instead")
    return file


def user_path(path: str | Path) -> Path:
    """A path that a user gave, `~` resolved; whether there is anything is another question.

    Raises:
      UserError: nothing can be there: a name that is too long, a user who does not exist, a closed folder.
    """
    text = str(path) if len(str(path)) <= _LONGEST_PATH else f"{str(path)[:_LONGEST_PATH]}..."
    try:
        found = Path(path).expanduser()
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{text}: cannot be looked up: {error.strerror}") from None
    except (RuntimeError, TypeError, ValueError) as error:  # no such user; a NUL or a lone surrogate; no path at all
        raise UserError(f"{text!r}: cannot be the name of a file: {error}") from None
    return found


def plain_name(name: str) -> bool:
    """Whether a name that stands in some file is the name of a file in the same folder, and nothing else."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def refuse_pointer(start: bytes, file: Path) -> None:
    """Says so when a file is what Git leaves in place of one that Git LFS has not fetched.

    Raises:
      UserError: it is.
    """
    if start.startswith(_POINTER):
        raise UserError(f"{file}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")


def write(path: Path, content: bytes) -> None:
    """Writes beside the file and renames, when all of it is on the disk; a file that is there is replaced.

    Raises:
      UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Finds out before a long computation that its file could not be written.

    Raises:
      UserError: its folder is not there or closed, or the name is that of anything but a file, or none at all.
    """
    path = user_path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, give the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: a pipe, socket or device is there, which a file would replace")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}, make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} cannot be written")


def _open_at_once(file: str, flags: int) -> int:
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def _require_regular(file: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{file}: cannot be read: Is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: cannot be read: a pipe, socket or device, not a regular file")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ; Python's reader would keep the last of two silently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})
        shown = ", ".join(ascii(key)[:80] for key in twice[:_SHOWN])
        raise ValueError(f"repeats {shown}" + (f" and {len(twice) - _SHOWN} more" if len(twice) > _SHOWN else ""))
    return found


def _integer(digits: str) -> int:
    return int(_short(digits))


def _float(digits: str) -> float:
    return float(_short(digits))


def _short(digits: str) -> str:
    if len(digits) > bounds.JSON_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, expected at most {bounds.JSON_DIGITS}")
    return digits


def _check_values(found: Any) -> None:
    """Depth and text of everything in a parsed document, level by level.

    Raises:
      ValueError: too deep, or half of a surrogate pair, which is no text and fails wherever it is written.
    """
    level, depth = [[found]], -1
    while level:
        depth += 1
        if depth > bounds.JSON_DEPTH:
            raise ValueError(_TOO_DEEP)
        items = [item for values in level for item in (values.values() if isinstance(values, dict) else values)]
        keys = (key for values in level if isinstance(values, dict) for key in values)
        for text in chain(keys, items):
            if isinstance(text, str) and not text.isascii():
                text.encode()  # UnicodeEncodeError is a ValueError
        level = [item for item in items if isinstance(item, dict | list)]
