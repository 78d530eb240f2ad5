"""The trained parameters as a Hugging Face LLaVA folder, 16 bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from sparsevlm_jax.inputs.images import clip_settings
from sparsevlm_jax.models.llava import NAMES
from sparsevlm_jax.models.stages import Params
from training.stages import Task
from training.words import BEGIN, CHAT_TEMPLATE, END, PAD, SPECIAL, UNKNOWN, tokenizer

DTYPE = np.float16


def export(task: Task, params: Params, folder: Path) -> None:
    """Writes config.json, weights, tokenizer and processor files; what was there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _json_files(task.config).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        tokenizer(task.ids, task.spellings).to_str(pretty=True) + "\n", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    leaves = traverse_util.flatten_dict(params)
    tensors = {
        name: np.ascontiguousarray(np.asarray(leaves[entry.path]).astype(DTYPE))
        for name, entry in NAMES.entries(params).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _json_files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ends = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    return {
        "config.json": config,
        "generation_config.json": ends,
        "preprocessor_config.json": clip_settings("CLIPImageProcessor", config["vision_config"]["image_size"]),
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": config["vision_config"]["patch_size"],
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[BEGIN],
            "eos_token": SPECIAL[END],
            "pad_token": SPECIAL[PAD],
            "unk_token": SPECIAL[UNKNOWN],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["text_config"]["max_position_embeddings"],
        },
    }
