"""A converted checkpoint on disk: parameters in groups, each a complete orbax checkpoint, and a manifest.

    config.json, tokenizer and processor files
    manifest.json
    params/group_00000/ ...
    params/group_00000.json

One group is about a decoder layer. Groups are written one by one and complete each by itself, so that a conversion
can stop anywhere and nothing has to be merged at the end. Behind a group its note is written: its records, of which the
manifest is made at the end, and the digest of every file in it. Chunks carry no checksum of their own (orbax asks for
one of their index only), so that is how reading notices a byte that has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from sparsevlm_jax.checkpoints.manifest import MANIFEST, Manifest, Record, as_json, reason, records_of
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import inside, open_regular, read_json, write
from sparsevlm_jax.text import shortlist

_CHUNK_BYTES = 64_000_000  # what is read at least to get a shard of a parameter


class Note(NamedTuple):
    """What stands beside a complete group."""

    job: str
    records: tuple[Record, ...]
    files: dict[str, str]  # sha256 of every file of the group, by its path in the group's folder


def group_folder(folder: Path, number: int) -> Path:
    return folder / "params" / f"group_{number:05}"


def group_note(folder: Path, number: int) -> Path:
    """The file beside a group that says what is in it."""
    return _note_of(group_folder(folder, number))


def save_group(folder: Path, state: Mapping[tuple[str, ...], np.ndarray], job: str, records: Sequence[Record]) -> None:
    """Writes a group and, when it is complete, its note.

    Args:
      state: parameters by path, in C order: orbax takes three times as long for transposed views.
      job, records: for the note.

    Raises:
      UserError: the disk does not take it.
    """
    context = ocp.Context()
    # Files of plain chunks: one database per group (OCDBT) takes twice as long, and random bits do not compress.
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    try:
        with context, _quiet():
            ocp.save(str(folder), traverse_util.unflatten_dict(dict(state)))
        names = sorted(str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file())
    except (OSError, RuntimeError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
        raise UserError(f"{folder}: cannot be written: {reason(error)}") from error
    note = {"job": job, "records": as_json(records), "files": dict(zip(names, _digests(folder, names), strict=True))}
    write(_note_of(folder), json.dumps(note, indent=1).encode())


def group_records(folder: Path, number: int, job: str) -> tuple[Record, ...] | None:
    """The records of a complete group that belongs to a job; None where there is anything else."""
    try:
        note = _read_note(folder, number)
        whole = note.job == job and not _changed(folder, number, note)
    except UserError:  # half of a group
        return None
    return note.records if whole else None


def require_whole(folder: Path, number: int, manifest: Manifest) -> None:
    """Compares every byte of a group with the digests that were taken when it was written.

    Where devices read their own shards this reads all of the group beforehand, on every host: a digest is of a whole
    file, and a chunk is the least of a parameter that can be read anyway.

    Raises:
      UserError: a file is missing or changed, or a group's note is.
    """
    group, note = group_folder(folder, number), _read_note(folder, number)
    if (note.job, note.records) != (manifest.job, manifest.groups[number]):
        raise UserError(f"{group_note(folder, number)}: does not belong to {MANIFEST}: convert the source again")
    if changed := _changed(folder, number, note):
        names = f"{len(changed)} of {len(note.files)} files are missing or changed: {shortlist(changed)}"
        raise UserError(f"{group}: cannot be restored, convert the source again: {names}")


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the files beside the parameters; nothing where they are as they were written."""
    problems = []
    for name, wanted in manifest.files.items():
        try:
            same = file_digest(inside(folder, name)) == wanted
        except UserError as error:
            problems.append(str(error))
        else:
            problems += [] if same else [f"{folder / name}: missing or changed"]
    return problems


def restore_group(
    folder: Path, number: int, abstract: Mapping[tuple[str, ...], Any] | None = None
) -> dict[tuple[str, ...], Any]:
    """Reads a group, which `require_whole` may have compared with its digests.

    Args:
      abstract: a `jax.ShapeDtypeStruct` with a sharding for every parameter, which then goes to its devices shard by
        shard; None for NumPy arrays.

    Raises:
      UserError: it is missing or damaged, or a link in it leads out of the checkpoint.
    """
    _require_inside(folder, number)
    group = group_folder(folder, number)
    try:
        tree = None if abstract is None else traverse_util.unflatten_dict(dict(abstract))
        with _quiet():
            return dict(traverse_util.flatten_dict(ocp.load(str(group), tree)))
    except Exception as error:  # orbax has no error type of its own, and raises bare ones as well
        raise UserError(f"{group}: cannot be restored, convert the source again: {reason(error)}") from error


def silence_orbax() -> None:
    """For a program that owns its process: where one chunk cannot be read, the reads that were under way beside it
    log a traceback each, some as late as they are collected. Our own error says it."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger().addFilter(_not_of_orbax)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("TensorStore data files not found")


def file_digest(file: Path) -> str:
    """sha256 of a regular file.

    Raises:
      UserError: it is missing, something else, or cannot be read.
    """
    with open_regular(file) as stream:
        content: Any = stream  # typeshed asks for more than a BinaryIO
        try:
            return hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes in C order."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def parallel(function: Any, items: Sequence[Any]) -> list[Any]:
    """`map` over threads: reading, hashing and copying release Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def _note_of(group: Path) -> Path:
    return group.with_name(f"{group.name}.json")


def _read_note(folder: Path, number: int) -> Note:
    """The note of a group.

    Raises:
      UserError: it is missing or damaged.
    """
    file = group_note(folder, number)
    if not os.path.lexists(file):
        raise UserError(f"{file}: no such file: it has the digests of its group; convert the source again")
    fields = read_json(inside(folder, str(file.relative_to(folder))))
    try:
        note = Note(**{**fields, "records": records_of(fields["records"])})
        if not isinstance(note.files, dict):
            raise TypeError("files is no object")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not the note of a group: {reason(error)}") from error
    return note


def _require_inside(folder: Path, number: int) -> None:
    """Looks at a group before it is read: no link may lead out of the checkpoint, and nothing but files is opened.

    Raises:
      UserError: a link does, or there is a pipe or a device.
    """
    group = group_folder(folder, number)
    for item in (group.parent, group):
        inside(folder, str(item.relative_to(folder)))
    for home, folders, names in os.walk(group):
        for item in (Path(home, name) for name in folders + names):
            if item.is_symlink():
                inside(folder, str(item.relative_to(folder)))
            if item.exists() and not item.is_dir() and not item.is_file():
                raise UserError(f"{item}: cannot be read: a pipe, socket or device, not a regular file")


def _changed(folder: Path, number: int, note: Note) -> list[str]:
    """The files of a group that are not what its note says.

    Raises:
      UserError: as `_require_inside`.
    """
    _require_inside(folder, number)
    found = _digests(group_folder(folder, number), list(note.files))
    return [name for name, now in zip(note.files, found, strict=True) if now != note.files[name]]


def _digests(folder: Path, names: Sequence[str]) -> list[str | None]:
    """sha256 of files; None where there is none that can be read."""
    return parallel(_digest_if_there, [folder / name for name in names])


def _digest_if_there(file: Path) -> str | None:
    try:
        return file_digest(file)
    except UserError:
        return None


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
