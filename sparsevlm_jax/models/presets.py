"""Configurations by name, so that a schedule can be planned without a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparsevlm_jax.config import TextConfig, VisionConfig
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.llava_next import LlavaNextConfig
from sparsevlm_jax.models.video_llava import VideoLlavaConfig
from sparsevlm_jax.rotary import plain_rope


def llava_15_7b() -> LlavaConfig:
    """LLaVA-1.5-7B: CLIP ViT-L/14-336 and Vicuna-7B v1.5, as in `llava-hf/llava-1.5-7b-hf`."""
    return _llava(_vicuna_7b())


def llava_15_13b() -> LlavaConfig:
    """LLaVA-1.5-13B: CLIP ViT-L/14-336 and Vicuna-13B v1.5, as in `llava-hf/llava-1.5-13b-hf`."""
    return _llava(_vicuna_13b())


def llava_next_7b() -> LlavaNextConfig:
    """LLaVA-NeXT-7B: the tower on tiles, and Vicuna-7B v1.5, as in `llava-hf/llava-v1.6-vicuna-7b-hf`."""
    return _llava_next(_vicuna_7b())


def llava_next_13b() -> LlavaNextConfig:
    """LLaVA-NeXT-13B: the tower on tiles, and Vicuna-13B v1.5, as in `llava-hf/llava-v1.6-vicuna-13b-hf`."""
    return _llava_next(_vicuna_13b())


def llava_next_mistral_7b() -> LlavaNextConfig:
    """LLaVA-NeXT on Mistral-7B-Instruct v0.2, without its window, as in `llava-hf/llava-v1.6-mistral-7b-hf`."""
    text = _text(4096, 14336, 32, 32, kv_heads=8, theta=1e6, context=32768)
    return _llava_next(text)


def llava_next_llama3_8b() -> LlavaNextConfig:
    """LLaVA-NeXT on Llama-3-8B-Instruct, as in `llava-hf/llama3-llava-next-8b-hf`."""
    text = _text(4096, 14336, 32, 32, kv_heads=8, theta=5e5, context=8192, vocab=128320)
    return replace(_llava_next(text), image_token_id=128256)


def video_llava_7b() -> VideoLlavaConfig:
    """Video-LLaVA-7B: two towers of 224 pixels, and Vicuna-7B v1.5, as in `LanguageBind/Video-LLaVA-7B-hf`."""
    return replace(VideoLlavaConfig(**_shared(_vicuna_7b())), vision=replace(_CLIP_L, image_size=224))


def tiny() -> LlavaConfig:
    """A model for tests and examples: 16 visual tokens, 5 decoder layers of width 64."""
    vision = replace(
        _CLIP_L, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56
    )
    text = _text(64, 96, 5, 4, context=2048, vocab=192)
    return replace(_llava(text), vision=vision, image_token_id=190)


PRESETS = {
    "llava-1.5-7b": llava_15_7b,
    "llava-1.5-13b": llava_15_13b,
    "llava-next-7b": llava_next_7b,
    "llava-next-13b": llava_next_13b,
    "llava-next-mistral-7b": llava_next_mistral_7b,
    "llava-next-llama3-8b": llava_next_llama3_8b,
    "video-llava-7b": video_llava_7b,
    "tiny": tiny,
}

_CLIP_L = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    num_channels=3,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)


def _vicuna_7b() -> TextConfig:
    return _text(4096, 11008, 32, 32)


def _vicuna_13b() -> TextConfig:
    return _text(5120, 13824, 40, 40)


def _text(
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    theta: float = 10000.0,
    context: int = 4096,
    vocab: int = 32064,
) -> TextConfig:
    """A Llama decoder, or Mistral's, which is one."""
    return TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=hidden // heads,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope=plain_rope(hidden // heads, theta),
        max_position_embeddings=context,
        windowed=False,
        qkv_bias=False,
        out_bias=False,
        qk_norm=False,
        norm_offset=False,
        embed_scale=False,
        joined_weights=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )


def _llava(text: TextConfig) -> LlavaConfig:
    return LlavaConfig(**_shared(text))


def _llava_next(text: TextConfig) -> LlavaNextConfig:
    return LlavaNextConfig(**_shared(text))


def _shared(text: TextConfig) -> dict[str, Any]:
    """What all families have: all but what the family itself says."""
    return {
        "vision": _CLIP_L,
        "text": text,
        "image_token_id": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "projector_bias": True,
        "attention": "auto",
    }
