"""The way back: a Hugging Face folder from a converted checkpoint, one group in memory at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.checkpoints.check import Converted, Watch, open_converted
from sparsevlm_jax.checkpoints.joined import parts_of, whole_of
from sparsevlm_jax.checkpoints.manifest import Record
from sparsevlm_jax.checkpoints.safetensors import INDEX, SINGLE, STORED_DTYPES
from sparsevlm_jax.checkpoints.source import FILES
from sparsevlm_jax.checkpoints.workplace import check_room, clear, copy_files, publish, workplace
from sparsevlm_jax.config import SiglipConfig, read_config
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import user_path
from sparsevlm_jax.models.names import DECODER

SHARD_BYTES = 5_000_000_000  # as transformers cuts them
_CODES = {dtype.name: code for code, dtype in STORED_DTYPES.items()}
_TABLES = (f"{DECODER}/embed_tokens/embedding", f"{DECODER}/lm_head/weight")


class _Stored(NamedTuple):
    """A tensor of the folder that is written: one parameter, or several whose rows follow each other in it."""

    name: str
    records: tuple[Record, ...]

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records)

    @property
    def is_table(self) -> bool:
        return self.records[0].path in _TABLES

    def shape(self, more: int) -> list[int]:
        """With so many rows more."""
        return [sum(record.shape[0] for record in self.records) + more, *self.records[0].shape[1:]]


class _Shard(NamedTuple):
    file: str
    tensors: list[_Stored]


def to_hf(checkpoint: str | Path, target: str | Path, watch: Watch = lambda done, total: None) -> int:
    """Writes a Hugging Face folder with the names of published checkpoints.

    The tensors are those of the source, bit for bit where the dtype was kept. Where the image token lies outside the
    vocabulary (original checkpoints), transformers wants rows for it: they repeat row 0, so that no answer changes.

    Args:
      target: a folder that does not exist yet; until it is complete everything is in `.NAME.partial` beside it.

    Returns:
      The number of weight files.

    Raises:
      UserError: no converted checkpoint, a damaged one, one in eight bits, a target that exists, a full disk.
    """
    opened, target = open_converted(checkpoint), user_path(target)
    if held := opened.manifest.quantize:
        raise UserError(f"{checkpoint}: is in {held}, which cannot be undone: only its source has the weights")
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; choose another folder")
    if target.resolve().is_relative_to(opened.folder.resolve()):
        raise UserError(f"{target}: lies inside the checkpoint, which is never touched; choose another folder")
    shards, total = _cut(_as_stored(opened)), opened.manifest.nbytes
    with workplace(target) as partial:
        clear(partial)
        check_room(partial, total)
        _write_shards(partial, opened, shards, total, watch)
        copy_files(opened.folder, partial, FILES)
        config = read_config(opened.folder)
        if rows := _missing_rows(opened):
            config["text_config"]["vocab_size"] += rows
        if isinstance(opened.config.vision, SiglipConfig):
            config["vision_config"]["vision_use_head"] = False  # it was left out
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        publish(partial, target)
    return len(shards)


def _as_stored(opened: Converted) -> list[_Stored]:
    """The tensors to write, each where the last of its parameters stands in the manifest."""
    held: dict[str, dict[str, Record]] = {}
    stored = []
    for record in opened.manifest.records:
        name = opened.entries[record.path].name
        whole = whole_of(name) if opened.config.text.joined_weights else name
        parts = held.setdefault(whole, {})
        parts[name] = record
        if len(parts) == len(parts_of(whole)):
            stored.append(_Stored(whole, tuple(parts[part] for part in parts_of(whole))))
    return stored


def _cut(tensors: Sequence[_Stored]) -> list[_Shard]:
    """Consecutive tensors per file, up to SHARD_BYTES."""
    parts: list[list[_Stored]] = [[]]
    for tensor in tensors:
        if parts[-1] and sum(other.nbytes for other in parts[-1]) + tensor.nbytes > SHARD_BYTES:
            parts.append([])
        parts[-1].append(tensor)
    if len(parts) == 1:
        return [_Shard(SINGLE, parts[0])]
    return [
        _Shard(f"model-{number:05}-of-{len(parts):05}.safetensors", part) for number, part in enumerate(parts, start=1)
    ]


def _write_shards(partial: Path, opened: Converted, shards: Sequence[_Shard], total: int, watch: Watch) -> None:
    """Writes the weight files and, for several, their index."""
    rows, done, size, places = _missing_rows(opened), 0, 0, {}
    arrays = _arrays(opened, [tensor for shard in shards for tensor in shard.tensors])
    for shard in shards:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in shard.tensors:
            shape, dtype = tensor.shape(rows if tensor.is_table else 0), tensor.records[0].stored_dtype
            begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            header[tensor.name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
            places[tensor.name] = shard.file
        size += end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        with (partial / shard.file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in shard.tensors:
                array = next(arrays)
                if rows and tensor.is_table:
                    array = np.concatenate([array, np.repeat(array[:1], rows, axis=0)])
                stream.write(array.reshape(-1).view(np.uint8).data)
                done += tensor.nbytes
                watch(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _arrays(opened: Converted, tensors: Sequence[_Stored]) -> Iterator[np.ndarray]:
    """Of each tensor in turn; of those to come no more is held than a group has."""
    pairs = (pair for number in range(len(opened.manifest.groups)) for pair in opened.tensors(number))
    held: dict[str, np.ndarray] = {}
    for tensor in tensors:
        while any(record.path not in held for record in tensor.records):
            record, array = next(pairs)
            held[record.path] = array
        parts = [held.pop(record.path) for record in tensor.records]
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def _missing_rows(opened: Converted) -> int:
    return max(0, opened.config.image_token_id + 1 - opened.config.text.vocab_size)
