"""Tensors in a folder of safetensors files: listed without reading them, read one at a time.

Files are read by offset into memory of their own, not mapped: a mapped page counts towards the peak of the process, and
a parameter must not change or vanish with its file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparsevlm_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_SHOWN = 10


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
        file outside the folder, a tensor that stands in two files or not where the index says.
    """
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
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
    if (folder / single).exists():
        names = [single]
    else:
        index = _read_index(index_file)
        names = sorted(set(index.values()))

    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            found = list_file(_inside(folder, name, index_file))
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
        raise UserError("; ".join(problems))
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
            (begin, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            dtype = DTYPES.get(entry["dtype"])
            sane = begin == end <= stop and all(isinstance(n, int) and n >= 0 for n in shape)
            if not sane or (dtype and math.prod(shape) * dtype.itemsize != stop - begin):
                raise ValueError(f"{name} of shape {list(shape)} cannot lie at bytes {begin} to {stop}")
            read = partial(_read, file, name, start + begin, shape, dtype)
            tensors[name] = Tensor(file, dtype.name if dtype else entry["dtype"], shape, read)
            end = stop
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: malformed header: {error}") from error
    if start + end != size:
        raise UserError(f"{file}: truncated or damaged: {size} bytes where its header describes {start + end}")
    return tensors


def shortlist(items: Sequence[str]) -> str:
    """The first items and how many there are besides, on one line."""
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _read(file: Path, name: str, offset: int, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
    if dtype is None:
        raise UserError(f"{file}: {name} is not a float32, float16 or bfloat16 tensor")
    array = np.empty(shape, dtype)
    left = array.reshape(-1).view(np.uint8).data
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while left:  # one call reads 2 GiB at most
                count = stream.readinto(left)
                if not count:
                    raise UserError(f"{file}: ends inside {name}")
                left = left[count:]
    except OSError as error:
        raise UserError(f"{file}: {name} cannot be read: {error.strerror}") from error
    return array


def _read_header(file: Path) -> tuple[Any, int, int]:
    """The parsed header, the offset at which data starts, and the size of the file."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise UserError(f"{file}: truncated, or not a safetensors file ({size} bytes)")
            return json.loads(stream.read(length), object_pairs_hook=_without_repeats), 8 + length, size
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: malformed header: {error}") from error


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        names = json.loads(file.read_text(), object_pairs_hook=_without_repeats)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "no weight_map" if isinstance(error, KeyError | TypeError) else error
        raise UserError(f"{file}: cannot be read as an index of shards: {reason}") from error
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{file}: weight_map has to map tensor names to file names")
    return names


def _inside(folder: Path, name: str, index_file: Path) -> Path:
    """The file of that name in a folder; an index must not lead anywhere else."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(f'{index_file}: "{name}" is not the name of a file in this folder')
    home, target = folder.resolve(), (folder / name).resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # in the hub's cache, files of a snapshot are links to ../../blobs/HASH
        homes.append(home.parent.parent / "blobs")
    if target.parent not in homes:
        raise UserError(f"{folder / name}: a link that leads out of its folder; copy the file there instead")
    return folder / name


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.bin")):
        return "holds .bin weights only; convert them with `sparsevlm convert`"
    return f"holds no weights ({SINGLE}, or {INDEX} and its shards)"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object whose keys must differ; Python's reader would keep the last of two silently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"repeats {shortlist(sorted({key for key in keys if keys.count(key) > 1}))}")
    return found
