"""The demo model's shape, and where its training starts from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.llava import Params, init_params
from training.scenes import PATCH, PIXELS
from training.words import BEGIN, END, IMAGE, PAD, VOCABULARY

# Hugging Face's config.json.
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": "float16",
    "image_token_index": IMAGE,
    "image_seq_length": (PIXELS // PATCH) ** 2,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "projection_dim": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_channels": 3,
        "image_size": PIXELS,
        "patch_size": PATCH,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PAD,
    },
}


def config() -> LlavaConfig:
    """The same as the package's own configuration."""
    return LlavaConfig.from_hf(CONFIG)


def start(config: LlavaConfig, seed: int) -> Params:
    """Random parameters whose decoder can look things up from the first step.

    Keys start as queries, outputs as half the transposed values, the head as the embedding table: what resembles a
    token attends to it, and what is carried over is still readable. From plain random weights look-up does not appear
    in ten times as many steps.
    """
    params = init_params(config, jax.random.key(seed), jnp.float32)
    decoder = params["language_model"]
    for number in range(config.text.num_hidden_layers):
        attention = decoder[f"layers_{number}"]["self_attn"]
        attention["k_proj"]["kernel"] = jnp.array(attention["q_proj"]["kernel"])
        attention["o_proj"]["kernel"] = attention["v_proj"]["kernel"].T / 2
    decoder["lm_head"]["kernel"] = decoder["embed_tokens"]["embedding"].T
    return params
