"""The demo model's shape, and where its training starts from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsevlm_jax.config import LlavaConfig, VisionConfig
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
    """Random parameters from which seeing and looking things up are learned in few steps.

    In the decoder keys start as queries, outputs as half the transposed values, the head as the embedding table: what
    resembles a token attends to it, and what is carried over is still readable. In the tower, position embeddings start
    as waves and heads looking at neighbouring patches, as a convolution would: a digit is nine patches that have to
    find each other.
    """
    params = init_params(config, jax.random.key(seed), jnp.float32)
    decoder = params["language_model"]
    for number in range(config.text.num_hidden_layers):
        attention = decoder[f"layers_{number}"]["self_attn"]
        attention["k_proj"]["kernel"] = jnp.array(attention["q_proj"]["kernel"])
        attention["o_proj"]["kernel"] = attention["v_proj"]["kernel"].T / 2
    tower = params["vision_tower"]
    tower["position_embedding"]["embedding"] = jnp.asarray(_waves(config.vision), jnp.float32)
    for number in range(config.vision.num_hidden_layers):
        attention = tower[f"layers_{number}"]["self_attn"]
        query, key = _look_aside(config.vision, OFFSETS[number % len(OFFSETS)])
        attention["q_proj"]["kernel"] = jnp.asarray(query, jnp.float32)
        attention["k_proj"]["kernel"] = jnp.asarray(key, jnp.float32)
    return params


# Rows and columns between a patch and the one that each head of a tower layer looks at in the beginning.
OFFSETS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
)
SHARPNESS = 8.0
LOUDNESS = 2.0  # of positions, against what the patches show


def _frequencies(vision: VisionConfig) -> np.ndarray:
    """Of the waves along either axis, radians per patch, [d / 4]."""
    return np.linspace(0.05, 1.6, vision.hidden_size // 4)


def _waves(vision: VisionConfig) -> np.ndarray:
    """Position embeddings, [1 + grid², d]: sines and cosines of row and column; none for the class token."""
    row, column = (axis.reshape(-1, 1) for axis in np.indices((vision.grid, vision.grid)))
    angles = row * _frequencies(vision), column * _frequencies(vision)
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return LOUDNESS * np.concatenate([np.zeros((1, vision.hidden_size)), table])


def _look_aside(vision: VisionConfig, offsets: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Query and key kernels [d, heads * head dim] of heads that each attend at an offset from their own patch.

    A head takes every fourth frequency. Its key is a patch's waves there, its query those of the patch at the offset:
    sin(a + b) and cos(a + b) are a rotation of sin a and cos a.
    """
    waves, heads = vision.hidden_size // 4, vision.num_attention_heads
    shape = (vision.hidden_size, heads, vision.head_dim)
    query, key = np.zeros(shape), np.zeros(shape)
    for head, offset in enumerate(offsets):
        own = np.arange(head, waves, heads)
        for axis, distance in enumerate(offset):
            angle = _frequencies(vision)[own] * distance
            sine, cosine = 2 * waves * axis + own, 2 * waves * axis + waves + own
            to_sine = 2 * len(own) * axis + np.arange(len(own))
            to_cosine = to_sine + len(own)
            key[sine, head, to_sine] = key[cosine, head, to_cosine] = 1
            query[sine, head, to_sine] = query[cosine, head, to_cosine] = np.cos(angle)
            query[cosine, head, to_sine], query[sine, head, to_cosine] = np.sin(angle), -np.sin(angle)
    scale = SHARPNESS**0.5
    return scale * query.reshape(vision.hidden_size, -1), scale * key.reshape(vision.hidden_size, -1)
