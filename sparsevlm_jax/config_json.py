"""How the parts of a config.json become configurations: completed by transformers, resolved by their model type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sparsevlm_jax import bounds
from sparsevlm_jax.config import (
    SiglipConfig,
    TextConfig,
    TowerConfig,
    VisionConfig,
    check_size,
    pick,
    refuse_quantised,
    typed,
)
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.rotary import Rope, rope_from_hf

# Entries of a config.json that are read beside its parts, and entries of a part beside the fields of its class.
_TOP = (
    "model_type",
    "image_token_index",
    "image_token_id",
    "video_token_index",
    "video_token_id",
    "image_grid_pinpoints",
    "vision_feature_layer",
    "vision_feature_layers",
    "vision_feature_select_strategy",
    "projector_hidden_act",
    "projector_layernorm_eps",
    "multimodal_projector_bias",
    "tie_word_embeddings",
    "eos_token_id",
    "pad_token_id",
)
_BESIDE = ("model_type", "eos_token_id", "pad_token_id")
_OF_TEXT = (
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "attention_bias",
    "sliding_window",
    "use_sliding_window",
    "use_bidirectional_attention",
)

VISION_MODELS: dict[str, type[TowerConfig]] = {"clip_vision_model": VisionConfig, "siglip_vision_model": SiglipConfig}


def vision_config(vision: Mapping[str, Any], source: str) -> TowerConfig:
    """A tower's configuration out of a complete `vision_config`.

    Raises:
      UserError: a value that is none.
    """
    return pick(VISION_MODELS[vision["model_type"]], vision, f"{source}: vision_config")


@dataclass(frozen=True)
class TextModel:
    """How the decoders of one Hugging Face `model_type` differ from Llama's. None: the configuration says it.

    Attributes:
      qkv_bias, out_bias: biases of the attention's projections.
      qk_norm, norm_offset, embed_scale, joined_weights: see `TextConfig`.
      window: whether the entry `sliding_window` holds, given the configuration.
    """

    qkv_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: bool = False
    norm_offset: bool = False
    embed_scale: bool = False
    joined_weights: bool = False
    window: Callable[[Mapping[str, Any]], bool] = lambda text: False


TEXT_MODELS = {
    "llama": TextModel(),
    "mistral": TextModel(qkv_bias=False, out_bias=False, window=lambda text: True),
    "qwen2": TextModel(qkv_bias=True, out_bias=False, window=lambda text: bool(text.get("use_sliding_window"))),
    "qwen3": TextModel(qk_norm=True, window=lambda text: bool(text.get("use_sliding_window"))),
    # Words alone are scaled, as transformers 5 does: its table of embeddings scales what is looked up in it. 4.x scaled
    # the whole prompt, visual tokens included.
    "gemma": TextModel(norm_offset=True, embed_scale=True),
    "phi3": TextModel(qkv_bias=False, out_bias=False, joined_weights=True, window=lambda text: True),
}
# Relatives that look alike in a config.json, and what of them is not computed.
_NOT_COMPUTED = {
    "gemma2": "its logits and its attention are soft-capped, and norms stand behind its layers' parts too",
    "gemma3": "most of its layers see a window, with another rotary embedding than the others",
    "gemma3_text": "most of its layers see a window, with another rotary embedding than the others",
    "phi": "its attention and MLP run side by side, behind one layer norm",
}


def text_config(text: Mapping[str, Any], source: str) -> TextConfig:
    """A decoder's configuration out of a complete `text_config`.

    Every layer sees the whole prompt here. A model with a window that is shorter than its context therefore takes
    prompts up to its window only, within which both are the same.

    Raises:
      UserError: a value that is none, or a rotary embedding that is not computed.
    """
    part, kind = f"{source}: text_config", TEXT_MODELS[text["model_type"]]
    heads = typed(text["num_attention_heads"], "int", f"{part}.num_attention_heads")
    values = {
        **text,
        "head_dim": text.get("head_dim") or typed(text["hidden_size"], "int", f"{part}.hidden_size") // heads,
    }
    stated = text.get("attention_bias", False)
    values["qkv_bias"] = stated if kind.qkv_bias is None else kind.qkv_bias
    values["out_bias"] = stated if kind.out_bias is None else kind.out_bias
    values["mlp_bias"] = text.get("mlp_bias", False)
    values |= {key: getattr(kind, key) for key in ("qk_norm", "norm_offset", "embed_scale", "joined_weights")}
    if text.get("use_bidirectional_attention"):
        raise UserError(f"{part}.use_bidirectional_attention is set: only causal attention is computed")
    window, values["windowed"] = text.get("sliding_window"), False
    if window is not None and kind.window(text):
        window = typed(window, "int", f"{part}.sliding_window")
        context = typed(values["max_position_embeddings"], "int", f"{part}.max_position_embeddings")
        values |= {"max_position_embeddings": min(window, context), "windowed": window < context}
    return pick(TextConfig, {**values, "rope": rope_of(values, source)}, part)


def complete(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A parsed config.json with what it leaves out filled in from transformers' configuration classes.

    They get no more than what is used here, and no number beyond `bounds`: other entries make them build tables of any
    length.

    Raises:
      UserError: another architecture, quantised weights, or transformers does not accept it.
    """
    refuse_quantised(config, source)
    given = {key: config[key] for key in _TOP if key in config}
    for part, cls, model_types, beside in (
        ("vision_config", TowerConfig, tuple(VISION_MODELS), ()),
        ("text_config", TextConfig, tuple(TEXT_MODELS), _OF_TEXT),
    ):
        keys = (*(field.name for field in fields(cls)), *_BESIDE, *beside)
        given[part] = _known(config.get(part) or {}, keys, model_types, f"{source}: {part}")
    from transformers import AutoConfig  # here, not above: it imports torch where torch is installed

    try:
        full = AutoConfig.for_model(**given).to_dict()
    except Exception as error:  # transformers raises its validation errors as many unrelated types
        reason = shown(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{source}: transformers does not accept this configuration: {reason}") from error
    text = full["text_config"]
    # The whole model's entry decides. LLaVA's class copies a True of the decoder's there.
    text["tie_word_embeddings"] = full.get("tie_word_embeddings", False)
    full.setdefault("image_token_index", full.get("image_token_id"))
    return full


def rope_of(text: dict[str, Any], source: str) -> Rope:
    """The rotary embedding of a text_config: in `rope_parameters` (5.x), or `rope_scaling` and `rope_theta` (4.x).

    Raises:
      UserError: see `rope_from_hf`; or only a part of each head is rotated.
    """
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: rope_parameters of text_config is {shown(rope)}, expected a JSON object")
    partial = rope.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"{source}: partial_rotary_factor of text_config is {shown(partial)}: only whole heads turn")
    theta = rope.get("rope_theta", text.get("rope_theta"))
    head_dim = typed(text["head_dim"], "int", f"{source}: text_config.head_dim")
    return rope_from_hf({**rope, "rope_theta": theta}, head_dim, source)


def _known(values: Any, keys: Sequence[str], model_types: Sequence[str], part: str) -> dict[str, Any]:
    """The entries of a part of config.json that are used, each within its bound."""
    if not isinstance(values, dict):
        raise UserError(f"{part} is {shown(values)}, expected a JSON object")
    if (stated := values.get("model_type", model_types[0])) not in model_types:
        expected = " or ".join(f'"{name}"' for name in model_types)
        reason = _NOT_COMPUTED.get(stated) if isinstance(stated, str) else None
        raise UserError(
            f"{part}.model_type is {shown(stated)}, expected {expected}" + (f": {reason}" if reason else "")
        )
    for key, most in bounds.SIZES.items():
        if values.get(key) is not None:
            check_size(values[key], most, f"{part}.{key}")
    return {key: values[key] for key in keys if key in values}
