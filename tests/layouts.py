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


# How the authors of LLaVA-NeXT begin what transformers 5 writes.
NEXT_NAMES = {
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def original_next(hf: Path, folder: Path, model_type: str = "llava", **changed: Any) -> Layout:
    """A LLaVA-NeXT checkpoint of transformers in the authors' layout: its own tower inside, the sizes of that beside
    it, in a CLIP model whose weights are others."""
    folder.mkdir()
    tensors = load_file(hf / "model.safetensors")
    renamed = {_renamed(name): array for name, array in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    config = json.loads((hf / "config.json").read_text())
    text = {key: value for key, value in config["text_config"].items() if key not in ("model_type", "rope_parameters")}
    own = {
        "architectures": ["LlavaMistralForCausalLM" if model_type == "llava_mistral" else "LlavaLlamaForCausalLM"],
        "model_type": model_type,
        "rope_theta": config["text_config"]["rope_parameters"]["rope_theta"],
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config["vision_feature_layer"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "unfreeze_mm_vision_tower": True,
    }
    (folder / "config.json").write_text(json.dumps(text | own | changed))
    for name in TOKENIZER:
        if (hf / name).exists():
            shutil.copyfile(hf / name, folder / name)
    clip = folder.with_name(f"{folder.name}_clip")
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config["vision_config"]}))
    other = {name.removeprefix("vision_tower."): array for name, array in tensors.items() if "vision_tower" in name}
    save_file({f"vision_model.{name}": array + 1 for name, array in other.items()}, clip / "model.safetensors")
    return Layout(folder, clip)


def _renamed(name: str) -> str:
    begins = next(begins for begins in NEXT_NAMES if name.startswith(begins))
    return NEXT_NAMES[begins] + name.removeprefix(begins)
