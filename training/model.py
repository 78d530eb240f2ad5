"""Shapes of the models that are trained, and where training starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsevlm_jax.config import TowerConfig
from sparsevlm_jax.models.embedding import encode_images
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.parameters import init_params
from sparsevlm_jax.models.stages import Params
from training.scenes import COLOURS, PATCH, PIXELS, PLACES
from training.words import BEGIN, END, IMAGE, PAD, VOCABULARY

PATCH_WORDS = (*map(str, range(10)), *COLOURS, *PLACES)  # what is said of patches


def llava_config(*, pixels: int, patch: int, words: int, layers: int) -> dict[str, Any]:
    """Hugging Face's config.json of a small LLaVA for square images, with a vocabulary of so many words."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float16",
        "image_token_index": IMAGE,
        "image_seq_length": (pixels // patch) ** 2,
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
            "image_size": pixels,
            "patch_size": patch,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": words,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "hidden_act": "silu",
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": PAD,
        },
    }


CONFIG = llava_config(pixels=PIXELS, patch=PATCH, words=len(VOCABULARY), layers=12)


def config() -> LlavaConfig:
    """The demo model's, as the package's own configuration."""
    return LlavaConfig.from_hf(CONFIG)


def start(config: LlavaConfig, seed: int) -> Params:
    """Random parameters with a tower that learns to see in few steps.

    Its position embeddings start as waves and its heads looking at neighbouring patches, as a convolution would: a
    digit is nine patches that have to find each other.
    """
    params = init_params(config, jax.random.key(seed), jnp.float32)
    tower = params["vision_tower"]
    tower["position_embedding"]["embedding"] = jnp.asarray(_waves(config.vision), jnp.float32)
    for number in range(config.vision.num_hidden_layers):
        attention = tower[f"layers_{number}"]["self_attn"]
        query, key = _look_aside(config.vision, OFFSETS[number % len(OFFSETS)])
        attention["q_proj"]["weight"] = jnp.asarray(query.T, jnp.float32)
        attention["k_proj"]["weight"] = jnp.asarray(key.T, jnp.float32)
    return params


NORM = 8.0  # of the words and, on average, of the image's tokens: what a layer adds is neither more nor much less


def normalise_embeddings(params: Params, config: LlavaConfig, pixels: np.ndarray) -> Params:
    """The same tower, with words of equal length and the image's tokens centred and as long as words.

    Alignment leaves tokens with a large vector in common and embeddings of very different lengths: what the first
    decoder layer adds would drown the short ones.

    Args:
      pixels: images to measure on, float32 [m, 3, h, w].
    """
    found = jax.jit(encode_images, static_argnums=2)(params, jnp.asarray(pixels), config).tokens
    mean = jnp.mean(found, axis=0)
    scale = NORM / jnp.mean(jnp.linalg.norm(found - mean[None], axis=-1))
    projector, decoder = params["multi_modal_projector"], params["language_model"]
    last = projector["linear_2"]
    last = {"weight": last["weight"] * scale, "bias": (last["bias"] - mean) * scale}
    table = decoder["embed_tokens"]["embedding"]
    table = NORM * table / jnp.linalg.norm(table, axis=1, keepdims=True)
    return params | {
        "multi_modal_projector": projector | {"linear_2": last},
        "language_model": decoder | {"embed_tokens": {"embedding": table}},
    }


WORD_MARK_NORM = 4.0  # length of the direction that words have in common and the image's tokens have not
SELF_REPULSION = 4.0  # how strongly that direction repels, or attracts
WORD_SIMILARITY = 0.3  # weight of resemblance where words read words
ROTATION = 0.3  # radians over 200 tokens: what a rotary pair may turn by to count as slow
NOISE = 0.3
MLP_INIT_SCALE = 0.2  # MLPs start that much smaller
FIRST_READER = 3  # the first layer whose attention brings something home
EARLY_OUTPUT_SCALE = 0.05  # size of the outputs of the layers before it


def init_lookup_heads(params: Params, config: LlavaConfig, seed: int, said: Sequence[int]) -> Params:
    """The same tower, projector and words, with a decoder that looks things up from its first step.

    Layers take turns. In some a token attends to what resembles it in the span of the words that are said of patches,
    and shuns words, itself first of all: so "red" finds the red patches. In the others it attends to words: so
    "assistant:" finds what "red" has found. Both compare in rotary pairs too slow to tell positions apart. Outputs are
    transposed values, both orthogonal, so that what is carried over is still readable; the head is the embedding table.
    The layers before FIRST_READER look at patches and carry next to nothing over: were the answer read at once, pruning
    could not do harm.

    Args:
      params: balanced.
      said: ids of the words that are said of patches.
    """
    text, random = config.text, np.random.default_rng(seed)
    table = np.asarray(params["language_model"]["embed_tokens"]["embedding"])
    patch_words, _ = np.linalg.qr(table[list(said)].T)
    words, _ = np.linalg.qr(table.T)
    mark = random.standard_normal(text.hidden_size)
    mark -= words @ (words.T @ mark)
    mark /= np.linalg.norm(mark)
    decoder = init_params(config, jax.random.key(seed), jnp.float32)["language_model"]
    for number in range(text.num_hidden_layers):
        layer = decoder[f"layers_{number}"]
        reads_words = number > FIRST_READER and (number - FIRST_READER) % 2 == 1
        query, key = _resemblance(config, patch_words, mark, reads_words=reads_words, random=random)
        value, _ = np.linalg.qr(random.standard_normal((text.hidden_size, text.hidden_size)))
        output = value.T if number >= FIRST_READER else EARLY_OUTPUT_SCALE * value.T
        for name, matrix in (("q_proj", query), ("k_proj", key), ("v_proj", value), ("o_proj", output)):
            layer["self_attn"][name]["weight"] = jnp.asarray(matrix.T, jnp.float32)
        layer["mlp"]["down_proj"]["weight"] *= MLP_INIT_SCALE
    decoder["embed_tokens"]["embedding"] = jnp.asarray(table + WORD_MARK_NORM * mark, jnp.float32)
    decoder["lm_head"]["weight"] = jnp.asarray(table / NORM)
    return params | {"language_model": decoder}


def _resemblance(
    config: LlavaConfig, said: np.ndarray, mark: np.ndarray, *, reads_words: bool, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Query and key matrices [d, heads * head dim] of one layer.

    Args:
      said: orthonormal directions of the words that are said of patches, [d, n].
      mark: the direction that words have in common, [d].
    """
    text, pairs = config.text, config.text.head_dim // 2
    slow = np.flatnonzero(200 * np.asarray(config.text.rope.frequencies) < ROTATION)
    slow, slowest = slow[:-1], slow[-1]
    coordinates = np.concatenate([slow, slow + pairs])
    queries, keys = [], []
    for _ in range(text.num_attention_heads):
        common = NOISE * random.standard_normal((text.hidden_size, text.head_dim)) / text.hidden_size**0.5
        turn, _ = np.linalg.qr(random.standard_normal((len(coordinates), said.shape[1])))
        query, key = common.copy(), common.copy()
        query[:, coordinates] += (WORD_SIMILARITY if reads_words else 1.0) * said @ turn.T
        key[:, coordinates] += said @ turn.T
        query[:, slowest] += (SELF_REPULSION if reads_words else -SELF_REPULSION) * mark
        key[:, slowest] += mark
        queries.append(query)
        keys.append(key)
    return np.concatenate(queries, axis=1), np.concatenate(keys, axis=1)


# Rows and columns between a patch and the one that each head of a tower layer looks at in the beginning.
OFFSETS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
)
SHARPNESS = 8.0
LOUDNESS = 2.0  # of positions, against what the patches show


def _frequencies(vision: TowerConfig) -> np.ndarray:
    """Of the waves along either axis, radians per patch, [d / 4]."""
    return np.linspace(0.05, 1.6, vision.hidden_size // 4)


def _waves(vision: TowerConfig) -> np.ndarray:
    """Position embeddings, [1 + grid², d]: sines and cosines of row and column; none for the class token."""
    row, column = (axis.reshape(-1, 1) for axis in np.indices((vision.grid, vision.grid)))
    angles = row * _frequencies(vision), column * _frequencies(vision)
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return LOUDNESS * np.concatenate([np.zeros((1, vision.hidden_size)), table])


def _look_aside(vision: TowerConfig, offsets: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Query and key matrices [d, heads * head dim] of heads that each attend at an offset from their own patch.

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
