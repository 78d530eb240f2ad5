"""What is converted: configuration and tensors of a PyTorch checkpoint, in whatever layout; nothing is read yet."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.checkpoints import llava_original, safetensors, torch_bin
from sparsevlm_jax.checkpoints.assign import assign
from sparsevlm_jax.checkpoints.hub import locate
from sparsevlm_jax.checkpoints.joined import split
from sparsevlm_jax.checkpoints.orbax import file_digest
from sparsevlm_jax.checkpoints.safetensors import Tensor
from sparsevlm_jax.config import ModelConfig, check_depth, is_original, read_config
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import inside, open_regular, refuse_pointer, user_path
from sparsevlm_jax.models.family import FAMILIES, config_from_hf, family_of
from sparsevlm_jax.models.names import Entry
from sparsevlm_jax.models.parameters import entries

# What stands beside the weights and belongs to the model.
FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
_START = 64  # bytes that tell what a file is

Stamp = tuple[int, int] | None  # size and time of change of a file; None where there is none


class Source(NamedTuple):
    """A checkpoint to convert."""

    name: str  # hub id, or name of the folder
    folder: Path
    layout: str  # "hf" or "original"
    config: dict[str, Any]  # config.json in the Hugging Face form
    tower: Path | None  # the CLIP model that was given
    stamps: dict[str, Stamp]  # of the weight files, when they were listed
    inodes: dict[str, int]  # when the inode of each had changed, which nobody can turn back
    beside: dict[str, str]  # sha256 of every other file, before it was read
    model: ModelConfig
    pairs: list[tuple[str, Entry]]  # every tensor and its parameter
    tensors: dict[str, Tensor]
    ignored: list[str]  # known extras

    @property
    def config_digest(self) -> str:
        """sha256 of config.json as it is."""
        return self.beside[str(self.folder / "config.json")]

    def changed(self) -> list[str]:
        """The files that are not what they were when the source was opened."""
        before, now = self.stamps | self.beside, _stamps(self.tensors) | _beside(self.folder, self.tower)
        return [file for file in sorted({*before, *now}) if before.get(file) != now.get(file)]

    def touched(self) -> set[str]:
        """The names of weight files that may have changed since the source was opened, whatever their own time says."""
        now = _inodes(self.tensors)
        return {Path(file).name for file, time in self.inodes.items() if now.get(file) != time}

    def nbytes(self, name: str) -> int:
        tensor = self.tensors[name]
        return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def open_source(source: str | Path, *, revision: str | None = None, vision_tower: str | Path | None = None) -> Source:
    """Lists a checkpoint and pairs its tensors with parameters.

    Args:
      source: a folder or hub id, in the Hugging Face or the original LLaVA layout, safetensors or `.bin`.
      vision_tower: the CLIP model of an original checkpoint, folder or hub id. Its weights are used where the
        checkpoint holds none of its own, its configuration always.

    Raises:
      UserError: no such model, another architecture, faulty files, or tensors that do not fit: all in one message.
    """
    folder = _locate(source, revision)
    config_file, tower = folder / "config.json", None
    beside = _beside(folder, None)
    config = read_config(folder)
    tensors = list_tensors(folder)
    layout = "original" if is_original(config) else "hf"
    if layout == "hf" and vision_tower is not None:
        raise UserError(f"{source}: `vision_tower` is for checkpoints of the original layout, this one has its own")
    if layout == "original":
        tower = None if vision_tower is None else _locate(vision_tower, None)
        beside |= _beside(folder, tower)
        tower_config = None if tower is None else read_config(tower)
        config = llava_original.hf_config(config, tower_config, str(config_file))
        canonical = FAMILIES[config["model_type"]].names.canonical
        if not any((canonical(name) or "").startswith("vision_tower.") for name in tensors):
            if tower is None:
                raise UserError(f"{source}: {llava_original.ask_for_tower(read_config(folder))}")
            tensors |= llava_original.tower_tensors(list_tensors(tower))
        config["image_token_index"] = llava_original.image_token_id(folder, config)
    model = config_from_hf(config, str(config_file))
    check_depth(model, len(tensors), str(source))
    wanted, names = entries(model), family_of(model).names
    if model.text.joined_weights:
        tensors = split(names, tensors, wanted, str(source))
    pairs = assign(names, wanted, tensors, str(source))
    return Source(
        name=folder.resolve().name if user_path(source).is_dir() else str(source),
        folder=folder,
        layout=layout,
        config=config,
        tower=tower,
        stamps=_stamps(tensors),
        inodes=_inodes(tensors),
        beside=beside,
        model=model,
        pairs=pairs,
        tensors=tensors,
        ignored=sorted({*tensors} - {name for name, _ in pairs}),
    )


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, safetensors where there are any, else `.bin`.

    Raises:
      UserError: no weights, or whatever is wrong with them.
    """
    safe = (folder / safetensors.SINGLE).exists() or (folder / safetensors.INDEX).exists()
    return (
        torch_bin.list_tensors(folder)
        if torch_bin.holds_bins(folder) and not safe
        else safetensors.list_tensors(folder)
    )


def _stamps(tensors: Mapping[str, Tensor]) -> dict[str, Stamp]:
    """Of all weight files."""
    found = _status(tensors)
    return {file: status and (status.st_size, status.st_mtime_ns) for file, status in found.items()}


def _inodes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {file: status.st_ctime_ns for file, status in _status(tensors).items() if status}


def _status(tensors: Mapping[str, Tensor]) -> dict[str, os.stat_result | None]:
    def of(file: Path) -> os.stat_result | None:
        try:
            return file.stat()
        except OSError:
            return None

    return {str(file): of(file) for file in sorted({tensor.file for tensor in tensors.values()})}


def _beside(folder: Path, tower: Path | None) -> dict[str, str]:
    """sha256 of what stands beside the weights.

    Raises:
      UserError: a file is a link out of the folder, no regular one, cannot be read, or is a Git LFS pointer.
    """
    files = [inside(folder, name) for name in ("config.json", *FILES)]
    files += [inside(tower, "config.json")] if tower else []
    return {str(file): _whole_digest(file) for file in files if os.path.lexists(file)}


def _whole_digest(file: Path) -> str:
    """sha256 of a file that is there, not only in Git's books."""
    with open_regular(file) as stream:
        refuse_pointer(stream.read(_START), file)
    return file_digest(file)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration that states another dtype, wherever it states one."""
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None:
            changed[key] = dtype
        elif isinstance(value, dict):
            changed[key] = with_dtype(value, dtype)
    return changed


def _locate(source: str | Path, revision: str | None) -> Path:
    """The folder of a model; `.bin` files of a hub id are fetched only where it has no others."""
    folder = locate(source, revision)
    if not user_path(source).is_dir() and not any(folder.glob("*.safetensors")):
        folder = locate(source, revision, weights="pytorch_model*.bin")
    return folder
