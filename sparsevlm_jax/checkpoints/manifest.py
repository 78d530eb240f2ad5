"""manifest.json of a converted checkpoint: what it holds, where that came from, and the digests it is compared with."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.config import DTYPES, QUANTIZATIONS
from sparsevlm_jax.errors import UserError, first_line
from sparsevlm_jax.files import inside, plain_name, read_json

MANIFEST = "manifest.json"
VERSION = 2  # of the layout: 1 had weights in Flax's order of axes
_LONGEST_AXIS, _MOST_AXES = 2**40, 8


class Record(NamedTuple):
    """A parameter: the tensor that it was made of, and how it is stored.

    Digests are sha256 of the tensor's bytes, so both are equal where the dtype is. A weight in eight bits and
    its scale are two parameters that were made of one tensor.
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
    def quantize(self) -> str | None:
        """How weights are held: see `models.quantize`."""
        return next((record.stored_dtype for record in self.records if record.stored_dtype in QUANTIZATIONS), None)

    @property
    def nbytes(self) -> int:
        """Of all parameters."""
        return sum(record.nbytes for record in self.records)

    def to_json(self) -> str:
        groups = [as_json(group) for group in self.groups]
        return json.dumps({**self._asdict(), "groups": groups}, indent=1) + "\n"


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a converted checkpoint, be it damaged."""
    return os.path.lexists(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a converted checkpoint.

    Raises:
      UserError: there is none, it is damaged, or it is of another version of this package.
    """
    file = inside(folder, MANIFEST)
    if not is_converted(folder):
        raise UserError(f"{file}: no such file; a converted checkpoint has one")
    try:
        fields = read_json(file)
    except UserError as error:
        raise UserError(f"{error}: not the manifest of a converted checkpoint") from None
    version = fields.get("version")
    if type(version) is int and version != VERSION:
        raise UserError(
            f"{file}: layout {version}, this release reads {VERSION}; convert the source again, to another folder"
        )
    try:
        for name, kind in (("version", int), ("source", dict), ("versions", dict), ("files", dict), ("groups", list)):
            if type(fields[name]) is not kind:
                raise TypeError(f"{name} is {type(fields[name]).__name__}, expected {kind.__name__}")
        if not all(map(plain_name, fields["files"])):
            raise ValueError("files have names that lead elsewhere")
        manifest = Manifest(**{**fields, "groups": tuple(records_of(group) for group in fields["groups"])})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not the manifest of a converted checkpoint: {reason(error)}") from error
    return manifest


def records_of(records: Sequence[Mapping[str, Any]]) -> tuple[Record, ...]:
    """Records as JSON has them.

    Raises:
      KeyError, TypeError, ValueError: they are none.
    """
    found = tuple(Record(**{**fields, "shape": tuple(fields["shape"])}) for fields in records)
    for record in found:
        texts = [value for value in record if value is not record.shape]
        axes = [type(axis) is int and 0 <= axis < _LONGEST_AXIS for axis in record.shape]
        if not all(isinstance(text, str) for text in texts) or not all(axes) or len(axes) > _MOST_AXES:
            raise TypeError(f"no record of a parameter: {record}")
        if record.dtype not in DTYPES or record.stored_dtype not in (*DTYPES, *QUANTIZATIONS):
            raise ValueError(f"{record.path} is neither {', '.join(DTYPES[:-1])} nor {DTYPES[-1]}")
    return found


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [record._asdict() for record in records]


def reason(error: Exception) -> str:
    """One line; tensorstore's own hide the system's words, but state its error number."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else first_line(error)
