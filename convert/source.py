"""What is converted: configuration and tensors of a PyTorch checkpoint, in whatever layout; nothing is read yet."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert import bins, original
from sparsevlm_jax import shards
from sparsevlm_jax.checkpoint import locate
from sparsevlm_jax.config import LlavaConfig, check_depth, read_config
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.llava import abstract_params
from sparsevlm_jax.shards import Tensor
from sparsevlm_jax.weights import Entry, assign, canonical, harmless, spec

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


class Source(NamedTuple):
    """A checkpoint to convert."""

    name: str  # hub id, or name of the folder
    folder: Path
    layout: str  # "hf" or "original"
    config: dict[str, Any]  # config.json in the Hugging Face form
    config_digest: str  # sha256 of config.json as it is
    model: LlavaConfig
    pairs: list[tuple[str, Entry]]  # every tensor and its parameter
    tensors: dict[str, Tensor]
    ignored: list[str]  # known extras

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return sorted({tensor.file for tensor in self.tensors.values()})

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
    config_file = folder / "config.json"
    config = read_config(folder)
    tensors = list_tensors(folder)
    layout = "original" if original.is_original(config) else "hf"
    if layout == "hf" and vision_tower is not None:
        raise UserError(f"{source}: --vision-tower is for checkpoints of the original layout, this one has its own")
    if layout == "original":
        tower = None if vision_tower is None else _locate(vision_tower, None)
        tower_config = None if tower is None else read_config(tower)
        config = original.hf_config(config, tower_config, str(config_file))
        if not any((canonical(name) or "").startswith("vision_tower.") for name in tensors):
            if tower is None:
                raise UserError(f"{source}: {original.ask_for_tower(read_config(folder))}")
            tensors |= original.tower_tensors(list_tensors(tower))
        config["image_token_index"] = original.image_token_id(folder, config)
    model = LlavaConfig.from_hf(config, str(config_file))
    check_depth(model, len(tensors), str(source))
    pairs = assign(spec(abstract_params(model, np.dtype(np.float32))), tensors, str(source))
    return Source(
        name=folder.resolve().name if Path(source).expanduser().is_dir() else str(source),
        folder=folder,
        layout=layout,
        config=config,
        config_digest=hashlib.sha256(config_file.read_bytes()).hexdigest(),
        model=model,
        pairs=pairs,
        tensors=tensors,
        ignored=[name for name in tensors if harmless(canonical(name) or "")],
    )


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, safetensors where there are any, else `.bin`.

    Raises:
      UserError: no weights, or whatever is wrong with them.
    """
    safe = (folder / shards.SINGLE).exists() or (folder / shards.INDEX).exists()
    return bins.list_tensors(folder) if bins.holds_bins(folder) and not safe else shards.list_tensors(folder)


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
    if not Path(source).expanduser().is_dir() and not any(folder.glob("*.safetensors")):
        folder = locate(source, revision, weights="pytorch_model*.bin")
    return folder
