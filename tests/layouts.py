"""The tiny recorded LLaVA in every layout that a checkpoint to convert can have: the same weights each time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
HF, ORIGINAL = GOLDEN / "tiny_llava_hf", GOLDEN / "tiny_llava_original"
NAMES = json.loads((GOLDEN / "tiny_llava_key_layouts.json").read_text())  # [5.x, 4.x, original] of every tensor
Weights = dict[str, np.ndarray]


class Layout(NamedTuple):
    folder: Path
    tower: Path | None = None  # for --vision-tower


def weights(column: int = 0) -> Weights:
    """The weights in float32, by the names of a column of NAMES."""
    stored = load_file(HF / "model.safetensors")
    return {names[column]: stored[names[0]] for names in NAMES}


def shard(tensors: Weights, folder: Path, count: int = 3, suffix: str = "safetensors") -> None:
    """Writes shards and their index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, places = list(tensors), {}
    for number in range(count):
        file = f"{stem}-{number + 1:05}-of-{count:05}.{suffix}"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file) if suffix == "safetensors" else save_bin(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_bin(tensors: Weights, file: Path) -> None:
    import torch

    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, file)


def transformers_5(folder: Path) -> Layout:
    shutil.copyfile(HF / "model.safetensors", _folder(folder, HF) / "model.safetensors")
    return Layout(folder)


def transformers_4(folder: Path) -> Layout:
    """In shards, with the buffers that older releases stored."""
    extras = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    shard(weights(1) | extras, _folder(folder, HF))
    return Layout(folder)


def one_bin(folder: Path) -> Layout:
    save_bin(weights(1), _folder(folder, HF) / "pytorch_model.bin")
    return Layout(folder)


def bin_shards(folder: Path) -> Layout:
    shard(weights(0), _folder(folder, HF), suffix="bin")
    return Layout(folder)


def original(folder: Path) -> Layout:
    """The authors' layout in float32, the tower inside."""
    save_file(weights(2), _folder(folder, ORIGINAL) / "model.safetensors")
    return Layout(folder)


def original_with_clip(folder: Path) -> Layout:
    """As published: `.bin` shards, the tower in a CLIP model with a text side."""
    config = json.loads((ORIGINAL / "config.json").read_text())
    vision = config.pop("tiny_vision_config")
    mine, tower = (
        {},
        {"logit_scale": np.ones(1, np.float32), "text_model.final_layer_norm.bias": np.ones(4, np.float32)},
    )
    for name, array in weights(2).items():
        inside = name.find("vision_model.")
        (mine if inside < 0 else tower)[name if inside < 0 else name[inside:]] = array
    shard(mine, _folder(folder, ORIGINAL), suffix="bin")
    (folder / "config.json").write_text(json.dumps(config))
    clip = folder.with_name("clip")
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    save_bin(tower, clip / "pytorch_model.bin")
    return Layout(folder, clip)


def original_with_bare_tower(folder: Path) -> Layout:
    """The tower as transformers 5.x saves a CLIPVisionModel."""
    layout = original_with_clip(folder)
    assert layout.tower is not None
    config = json.loads((layout.tower / "config.json").read_text())
    (layout.tower / "config.json").write_text(
        json.dumps({"model_type": "clip_vision_model", **config["vision_config"]})
    )
    (layout.tower / "pytorch_model.bin").unlink()
    tower = {name: array for name, array in weights(2).items() if "vision_model." in name}
    tower = {name.split("vision_model.")[1]: array for name, array in tower.items()}
    save_file(tower, layout.tower / "model.safetensors")
    return layout


LAYOUTS: tuple[Callable[[Path], Layout], ...] = (
    transformers_5,
    transformers_4,
    one_bin,
    bin_shards,
    original,
    original_with_clip,
    original_with_bare_tower,
)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder, byte for byte, with its time."""
    files = sorted(item for item in folder.rglob("*") if item.is_file())
    return {str(item.relative_to(folder)): (item.read_bytes(), item.stat().st_mtime_ns) for item in files}


def _folder(folder: Path, like: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(like / "config.json", folder / "config.json")
    return folder
