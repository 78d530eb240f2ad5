"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from sparsevlm_jax.errors import UserError


def write(path: Path, content: bytes) -> None:
    """Writes beside the file and renames; a file that is there is replaced.

    Raises:
      UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Finds out before a long computation that its file could not be written.

    Raises:
      UserError: its folder is not there or closed, or the name is a folder's.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, give the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}, make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} cannot be written")
