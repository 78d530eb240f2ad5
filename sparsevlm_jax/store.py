"""A converted checkpoint on disk: parameters in groups, each a complete orbax checkpoint, and a manifest.

    config.json, tokenizer and processor files
    manifest.json
    params/group_00000/ ...

One group is about a decoder layer. Groups are written one by one and complete each by itself, so that a conversion
can stop anywhere and nothing has to be merged at the end. The records of a group also stand in its own metadata: the
manifest is written last, from them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from sparsevlm_jax.errors import UserError

MANIFEST = "manifest.json"
VERSION = 1  # of this layout
_CHUNK_BYTES = 64_000_000  # what is read at least to get a shard of a parameter
_CHUNK_INDEX = 20  # bytes of index and checksum behind a chunk in its file
_BLOCK = 512  # rows and columns that are transposed at once; measured


class Record(NamedTuple):
    """A parameter: the tensor that it was made of, and how it is stored.

    Digests are sha256 of the tensor's bytes in the source's order of axes, so both are equal where the dtype is.
    """

    path: str  # in the tree: "language_model/norm/scale"
    name: str  # of the tensor in the source
    file: str
    shape: tuple[int, ...]
    dtype: str
    digest: str
    stored_dtype: str
    stored_digest: str

    @property
    def nbytes(self) -> int:
        """As it is stored."""
        return math.prod(self.shape) * np.dtype(self.stored_dtype).itemsize


class Manifest(NamedTuple):
    """What a converted checkpoint holds and where it comes from."""

    version: int
    job: str  # identifies source files and options: the same command has the same
    source: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]  # sha256 of every file beside the parameters
    groups: tuple[tuple[Record, ...], ...]

    @property
    def records(self) -> list[Record]:
        return [record for group in self.groups for record in group]

    @property
    def nbytes(self) -> int:
        """Of all parameters."""
        return sum(record.nbytes for record in self.records)

    def to_json(self) -> str:
        groups = [[record._asdict() for record in group] for group in self.groups]
        return json.dumps({**self._asdict(), "groups": groups}, indent=1) + "\n"


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a converted checkpoint."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a converted checkpoint.

    Raises:
      UserError: there is none, it is damaged, or it is of another version of this package.
    """
    file = folder / MANIFEST
    try:
        fields = json.loads(file.read_text())
        groups = tuple(read_records(group) for group in fields["groups"])
        manifest = Manifest(**{**fields, "groups": groups})
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; a converted checkpoint has one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the manifest of a converted checkpoint: {error}") from error
    if manifest.version != VERSION:
        raise UserError(f"{file}: layout {manifest.version}, this release reads {VERSION}; convert the source again")
    return manifest


def read_records(records: Sequence[Mapping[str, Any]]) -> tuple[Record, ...]:
    """Records as JSON has them.

    Raises:
      TypeError: they have other fields.
    """
    return tuple(Record(**{**record, "shape": tuple(record["shape"])}) for record in records)


def group_folder(folder: Path, number: int) -> Path:
    return folder / "params" / f"group_{number:05}"


def save_group(folder: Path, state: Mapping[tuple[str, ...], np.ndarray], job: str, records: Sequence[Record]) -> None:
    """Writes a group; its folder appears when it is complete.

    Args:
      state: parameters by path, in C order: orbax takes three times as long for transposed views.
      job, records: kept with it, for `group_records`.

    Raises:
      UserError: the disk does not take it.
    """
    metadata: dict[str, Any] = {"job": job, "records": [record._asdict() for record in records]}
    context = ocp.Context()
    # Files of plain chunks: one database per group (OCDBT) takes twice as long, and random bits do not compress.
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    try:
        with context, _quiet():
            ocp.save(str(folder), traverse_util.unflatten_dict(dict(state)), custom_metadata=metadata)
    except (OSError, RuntimeError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
        raise UserError(f"{folder}: cannot be written: {_reason(error)}") from error


def group_records(folder: Path, job: str) -> tuple[Record, ...] | None:
    """The records of a complete group that belongs to a job; None where the folder is anything else."""
    try:
        with _quiet():
            metadata: Any = ocp.metadata(str(folder)).custom_metadata
        if metadata["job"] != job:
            return None
        records = read_records(metadata["records"])
    except Exception:  # half of a group fails in as many ways as there are halves
        return None
    chunks = [item.stat().st_size - _CHUNK_INDEX for item in folder.glob("state/*/c/**/*") if item.is_file()]
    return records if sum(chunks) >= sum(record.nbytes for record in records) else None


def restore_group(folder: Path, abstract: Mapping[tuple[str, ...], Any] | None = None) -> dict[tuple[str, ...], Any]:
    """Reads a group.

    Args:
      abstract: a `jax.ShapeDtypeStruct` with a sharding for every parameter, which then goes to its devices shard by
        shard; None for NumPy arrays.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        tree = None if abstract is None else traverse_util.unflatten_dict(dict(abstract))
        with _quiet():
            return dict(traverse_util.flatten_dict(ocp.load(str(folder), tree)))
    except (OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: cannot be restored, convert the source again: {_reason(error)}") from error


def digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes in C order."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def in_order(array: np.ndarray) -> np.ndarray:
    """The array in C order. A transposed matrix is copied block by block: six times as fast as NumPy does it alone."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    copy = np.empty(array.shape, array.dtype)
    for y in range(0, array.shape[0], _BLOCK):
        for x in range(0, array.shape[1], _BLOCK):
            block = array[y : y + _BLOCK, x : x + _BLOCK]
            copy[y : y + _BLOCK, x : x + _BLOCK] = np.ascontiguousarray(block.T).T
    return copy


def parallel(function: Any, items: Sequence[Any]) -> list[Any]:
    """`map` over threads: reading, hashing and copying release Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without orbax's log: it warns at every group that it is no OCDBT database, and prints what it raises as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """One line; tensorstore's own hide the system's words, but state its error number."""
    text = str(error).strip()
    number = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(number[1])) if number else (text.splitlines() or [type(error).__name__])[0][:300]
