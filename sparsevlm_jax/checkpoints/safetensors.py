"""Tensors in a folder of safetensors files: listed without reading them, read one at a time.

Files are read by offset into memory of their own, not mapped: a mapped page counts towards the peak of the process, and
a parameter must not change or vanish with its file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, first_line, shown
from sparsevlm_jax.files import open_regular, parse_json, plain_name, read_json, refuse_pointer
from sparsevlm_jax.text import shortlist

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BINS = "pytorch_model.bin", "pytorch_model.bin.index.json"
STORED_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Bits of a value of every dtype that the format knows; weights are of STORED_DTYPES, buffers may be of others.
_BITS = {"C64": 64, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_SHOWN = 10  # faults of a kind in a message
_START = 64  # bytes that tell what a file is


class Tensor(NamedTuple):
    """A stored tensor that has not been read yet."""

    file: Path
    dtype: str  # NumPy's name where weights can have it ("float16"), else the file's ("I64")
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # raises UserError if the file has changed or cannot be read


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file or shards, by name, file by file in the order of their data.

    Raises:
      UserError: no such file, or all that is wrong with index and files: a missing, truncated or malformed file, a
        name that leads out of the folder (a link may), a tensor that stands in two files or not where the index says.
    """
    if not os.path.lexists(folder / SINGLE) and not os.path.lexists(folder / INDEX):
        raise UserError(f"{folder}: {_no_weights(folder)}")
    return list_shards(folder, SINGLE, folder / INDEX, list_file)


def list_shards(
    folder: Path, single: str, index_file: Path, list_file: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`list_tensors` for any format of weights: one file, or an index and the shards that it names.

    Raises:
      UserError: as `list_tensors`, and what `list_file` raises.
    """
    index = None
    if os.path.lexists(folder / single):
        names = [single]
    else:
        index = _read_index(index_file)
        names = sorted(set(index.values()))

    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            found = list_file(_beside(folder, name, index_file))
        except UserError as error:
            problems.append(str(error))
            continue
        twice = [key for key in found if key in tensors]
        if twice:
            problems.append(f"{folder / name}: repeats tensors of another shard: {shortlist(twice)}")
        tensors |= found
    # A file that cannot be listed would make every one of its tensors another problem.
    if index is not None and not problems:
        astray = [key for key, name in index.items() if key not in tensors or tensors[key].file.name != name]
        unlisted = [key for key in tensors if key not in index]
        if astray:
            problems.append(f"{index_file}: tensors are not in the file it names: {shortlist(astray)}")
        if unlisted:
            problems.append(f"{index_file}: does not name tensors of its files: {shortlist(unlisted)}")
    if problems:
        more = len(problems) - _SHOWN
        raise UserError("; ".join(problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])))
    return tensors


def list_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, by name, in the order of their data.

    Raises:
      UserError: the file is missing, truncated or malformed.
    """
    header, start, size = _read_header(file)
    tensors, end = {}, 0
    try:
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = end, _check_entry(name, entry, end)
            shape, dtype = tuple(entry["shape"]), STORED_DTYPES.get(entry["dtype"])
            read = partial(_read, file, name, start + begin, shape, dtype)
            tensors[name] = Tensor(file, dtype.name if dtype else entry["dtype"], shape, read)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: malformed header: {first_line(error)}") from error
    if start + end != size:
        raise UserError(f"{file}: truncated or damaged: {size} bytes where its header describes {start + end}")
    return tensors


def _read(file: Path, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
    if dtype is None:
        raise UserError(f"{file}: {name} is not a float32, float16 or bfloat16 tensor")
    array = np.empty(shape, dtype)
    left = array.reshape(-1).view(np.uint8).data
    try:
        with open_regular(file) as stream:
            stream.seek(offset)
            while left:  # one call reads 2 GiB at most
                count = stream.readinto(left)
                if not count:
                    raise UserError(f"{file}: ends inside {name}")
                left = left[count:]
    except OSError as error:
        raise UserError(f"{file}: {name} cannot be read: {error.strerror}") from error
    return array


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the offset at which data starts, and the size of the file."""
    with open_regular(file) as stream:
        try:
            size, start = os.fstat(stream.fileno()).st_size, stream.read(_START)
            refuse_pointer(start, file)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{file}: truncated, or not a safetensors file ({size} bytes)")
            stream.seek(8)
            content = stream.read(min(length, bounds.JSON_BYTES + 1))
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    return parse_json(content, f"{file}: malformed header"), 8 + length, size


def _check_entry(name: str, entry: Any, end: int) -> int:
    """Where a tensor's data ends, if it begins at `end` and has the size of its shape.

    Raises:
      ValueError: the entry says anything else.
      KeyError, TypeError: it is no entry.
    """
    (begin, stop), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if dtype not in _BITS:
        raise ValueError(f"{shortlist([name])} has dtype {shown(dtype)}, which the format does not know")
    sane = isinstance(shape, list) and len(shape) <= bounds.DIMENSIONS
    sane = sane and all(type(n) is int and n >= 0 for n in (begin, stop, *shape))
    if not sane or begin != end or math.prod(shape) * _BITS[dtype] != 8 * (stop - begin):
        raise ValueError(f"{shortlist([name])} of shape {shown(shape)} cannot lie at bytes {shown([begin, stop])}")
    return stop


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{file}: weight_map has to map tensor names to file names")
    return names


def _beside(folder: Path, name: str, index_file: Path) -> Path:
    """The file of that name in a folder, which may be a link to anywhere; the name itself must not lead away."""
    if not plain_name(name):
        raise UserError(f"{index_file}: {shown(name)} is not the name of a file in this folder")
    return folder / name


def _no_weights(folder: Path) -> str:
    if any((folder / name).exists() for name in _BINS):  # what is converted; others have no names known here
        return "holds .bin weights only; convert them with `sparsevlm convert`"
    return f"holds no weights ({SINGLE}, or {INDEX} and its shards)"
