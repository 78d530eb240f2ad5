"""The way back: a Hugging Face folder from a converted checkpoint, one group in memory at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.checkpoints.check import Converted, Watch, open_converted
from sparsevlm_jax.checkpoints.convert import check_room, clear, copy_files, publish, workplace
from sparsevlm_jax.checkpoints.manifest import Record
from sparsevlm_jax.checkpoints.safetensors import INDEX, SINGLE, STORED_DTYPES
from sparsevlm_jax.checkpoints.source import FILES
from sparsevlm_jax.config import SiglipConfig, read_config
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import user_path

SHARD_BYTES = 5_000_000_000  # as transformers cuts them
_CODES = {dtype.name: code for code, dtype in STORED_DTYPES.items()}
_TABLES = ("language_model/embed_tokens/embedding", "language_model/lm_head/kernel")


class _Shard(NamedTuple):
    file: str
    records: list[Record]


def to_hf(checkpoint: str | Path, target: str | Path, watch: Watch = lambda done, total: None) -> int:
    """Writes a Hugging Face folder with the names of published checkpoints.

    The tensors are those of the source, bit for bit where the dtype was kept. Where the image token lies outside the
    vocabulary (original checkpoints), transformers wants rows for it: they repeat row 0, so that no answer changes.

    Args:
      target: a folder that does not exist yet; until it is complete everything is in `.NAME.partial` beside it.

    Returns:
      The number of weight files.

    Raises:
      UserError: no converted checkpoint, a damaged one, a target that exists, a full disk.
    """
    opened, target = open_converted(checkpoint), user_path(target)
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; choose another folder")
    if target.resolve().is_relative_to(opened.folder.resolve()):
        raise UserError(f"{target}: lies inside the checkpoint, which is never touched; choose another folder")
    shards, total = _cut(opened.manifest.records), opened.manifest.nbytes
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


def _cut(records: Sequence[Record]) -> list[_Shard]:
    """Consecutive tensors per file, up to SHARD_BYTES."""
    parts: list[list[Record]] = [[]]
    for record in records:
        if parts[-1] and sum(r.nbytes for r in parts[-1]) + record.nbytes > SHARD_BYTES:
            parts.append([])
        parts[-1].append(record)
    if len(parts) == 1:
        return [_Shard(SINGLE, parts[0])]
    return [
        _Shard(f"model-{number:05}-of-{len(parts):05}.safetensors", part) for number, part in enumerate(parts, start=1)
    ]


def _write_shards(partial: Path, opened: Converted, shards: Sequence[_Shard], total: int, watch: Watch) -> None:
    """Writes the weight files and, for several, their index."""
    rows, done, size, places = _missing_rows(opened), 0, 0, {}
    tensors = (pair for number in range(len(opened.manifest.groups)) for pair in opened.tensors(number))
    for shard in shards:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for record in shard.records:
            more = rows if record.path in _TABLES else 0
            shape = [record.shape[0] + more, *record.shape[1:]]
            begin, end = end, end + math.prod(shape) * np.dtype(record.stored_dtype).itemsize
            name = opened.entries[record.path].name
            header[name] = {"dtype": _CODES[record.stored_dtype], "shape": shape, "data_offsets": [begin, end]}
            places[name] = shard.file
        size += end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        with (partial / shard.file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for _ in shard.records:
                record, array = next(tensors)
                if rows and record.path in _TABLES:
                    array = np.concatenate([array, np.repeat(array[:1], rows, axis=0)])
                stream.write(array.reshape(-1).view(np.uint8).data)
                done += record.nbytes
                watch(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _missing_rows(opened: Converted) -> int:
    return max(0, opened.config.image_token_id + 1 - opened.config.text.vocab_size)
