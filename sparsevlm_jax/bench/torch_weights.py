"""transformers' LLaVA with the hash's weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from sparsevlm_jax.bench import hash_weights
from sparsevlm_jax.models.family import family_of
from sparsevlm_jax.models.llava import LlavaConfig

CHUNK = 2**22  # elements drawn at a time


def load(config: LlavaConfig, dtype: str, device: torch.device, attention: str) -> Any:
    """transformers' LLaVA of a configuration with the hash's weights, made on the device."""
    text = asdict(config.text)
    text["attention_bias"] = text.pop("qkv_bias")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope")["theta"]}
    settings: dict[str, Any] = {
        "vision_config": {**asdict(config.vision), "model_type": "clip_vision_model"},
        "text_config": {**text, "model_type": "llama"},
        "image_token_index": config.image_token_id,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.projector_bias,
    }
    if config.video_token_id is not None:
        settings["video_token_index"] = config.video_token_id
    described = AutoConfig.for_model(config.model_type, **settings, **config.image_options)
    with no_init_weights(), device:
        described._attn_implementation = attention
        model = AutoModelForImageTextToText.from_config(described).to(getattr(torch, dtype)).eval()
    names = family_of(config).names
    for name, parameter in model.named_parameters():
        fill(parameter.data, names.canonical(name) or name)
    return model


def fill(tensor: Tensor, name: str) -> None:
    """Draws a tensor in place, a chunk at a time, so that its int32 copies stay small."""
    draw, flat = hash_weights.draw_of(name, tuple(tensor.shape)), tensor.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        index = torch.arange(start, min(start + CHUNK, flat.numel()), dtype=torch.int32, device=tensor.device)
        integers = hash_weights.numbers(index, draw.seed)
        flat[start : start + CHUNK] = hash_weights.values(integers, draw.scale, draw.norm, lambda x: x.float())
