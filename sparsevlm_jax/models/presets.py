"""Configurations by name, so that a schedule can be planned without a checkpoint."""

from __future__ import annotations

from dataclasses import fields, replace

from sparsevlm_jax.config import TextConfig, VisionConfig
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.video_llava import VideoLlavaConfig
from sparsevlm_jax.rotary import plain_rope


def llava_15_7b() -> LlavaConfig:
    """LLaVA-1.5-7B: CLIP ViT-L/14-336 and Vicuna-7B v1.5, as in `llava-hf/llava-1.5-7b-hf`."""
    return _llava_15(hidden=4096, ffn=11008, layers=32, heads=32)


def llava_15_13b() -> LlavaConfig:
    """LLaVA-1.5-13B: CLIP ViT-L/14-336 and Vicuna-13B v1.5, as in `llava-hf/llava-1.5-13b-hf`."""
    return _llava_15(hidden=5120, ffn=13824, layers=40, heads=40)


def tiny() -> LlavaConfig:
    """A model for tests and examples: 16 visual tokens, 5 decoder layers of width 64."""
    return LlavaConfig(
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            num_channels=3,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        ),
        text=TextConfig(
            vocab_size=192,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            hidden_act="silu",
            rms_norm_eps=1e-5,
            rope=plain_rope(16, 10000.0),
            max_position_embeddings=2048,
            windowed=False,
            qkv_bias=False,
            out_bias=False,
            qk_norm=False,
            norm_offset=False,
            embed_scale=False,
            joined_weights=False,
            mlp_bias=False,
            tie_word_embeddings=False,
        ),
        image_token_id=190,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        projector_bias=True,
        attention="auto",
    )


def video_llava_7b() -> VideoLlavaConfig:
    """Video-LLaVA-7B: two CLIP ViT-L/14-224 and Vicuna-7B v1.5, as in `LanguageBind/Video-LLaVA-7B-hf`."""
    base = llava_15_7b()
    own = {"vision": replace(base.vision, image_size=224), "model_type": "video_llava", "video_token_id": 32001}
    return VideoLlavaConfig(**{field.name: getattr(base, field.name) for field in fields(base)} | own)


PRESETS = {
    "llava-1.5-7b": llava_15_7b,
    "llava-1.5-13b": llava_15_13b,
    "video-llava-7b": video_llava_7b,
    "tiny": tiny,
}


def _llava_15(hidden: int, ffn: int, layers: int, heads: int) -> LlavaConfig:
    return LlavaConfig(
        vision=VisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            num_channels=3,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        ),
        text=TextConfig(
            vocab_size=32064,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hidden // heads,
            hidden_act="silu",
            rms_norm_eps=1e-5,
            rope=plain_rope(hidden // heads, 10000.0),
            max_position_embeddings=4096,
            windowed=False,
            qkv_bias=False,
            out_bias=False,
            qk_norm=False,
            norm_offset=False,
            embed_scale=False,
            joined_weights=False,
            mlp_bias=False,
            tie_word_embeddings=False,
        ),
        image_token_id=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        projector_bias=True,
        attention="auto",
    )
