"""The layout of the LLaVA authors' own checkpoints: configuration, tower, tokenizer and processor.

They are a language model with a projector (`model.layers. ...`, `model.mm_projector. ...`), mark a picture by the id
-200, which no table of embeddings has, and leave the CLIP tower to another checkpoint. The vocabulary stays as it is:
the marker becomes a token behind its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsevlm_jax.checkpoints.safetensors import Tensor
from sparsevlm_jax.config import refuse_quantised, refuse_temporal_attention
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.inputs.images import clip_settings
from sparsevlm_jax.inputs.processor import MARKER, PROMPT_END, PROMPT_START
from sparsevlm_jax.inputs.side_files import TOKENIZER_FILES, read_tokenizer, there

_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# CLIP models hold more than the tower.
_NOT_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
_SELECT = {"patch": "default", "cls_patch": "full"}

# The Vicuna prompt: a system text, then turns; every answer ends with the end token.
_SYSTEM, _USER = PROMPT_START.split("USER: ")[0], "USER: "
_CHAT_TEMPLATE = (
    "{{ '" + _SYSTEM.replace("'", "\\'") + "' }}{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}{{ '" + _USER + "' }}"
    "{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'image' %}{{ '" + MARKER + "\\n' }}{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% else %}{{ '" + PROMPT_END + " ' }}"
    "{% if content is string %}{{ content }}{% else %}{{ content[0]['text'] }}{% endif %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '" + PROMPT_END + "' }}{% endif %}"
)


def is_original(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llava_llama" or "mm_vision_tower" in config


def hf_config(config: Mapping[str, Any], tower: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """config.json in the Hugging Face form, all but the image token.

    Args:
      config: of the checkpoint.
      tower: config.json of its CLIP model, or None where the checkpoint states the tower's geometry itself.

    Raises:
      UserError: a variant that is not LLaVA-1.5, or a geometry that stands nowhere.
    """
    refuse_quantised(config, source)
    refuse_temporal_attention(config, source)
    projector, select = config.get("mm_projector_type", "linear"), config.get("mm_vision_select_feature", "patch")
    if projector != "mlp2x_gelu":
        raise UserError(f'{source}: mm_projector_type is "{projector}", expected "mlp2x_gelu" (LLaVA-1.5)')
    if not isinstance(select, str) or select not in _SELECT:
        raise UserError(f'{source}: mm_vision_select_feature is "{select}", expected one of {", ".join(_SELECT)}')
    if config.get("mm_use_im_start_end"):
        raise UserError(f"{source}: mm_use_im_start_end is set: pictures between special tokens are not supported")
    vision = config.get("vision_config") or config.get("tiny_vision_config")
    if tower is not None:
        vision = tower.get("vision_config", tower)
    if not isinstance(vision, dict):
        raise UserError(f"{source}: {ask_for_tower(config)}")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        **({"dtype": dtype} if dtype else {}),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _SELECT[select],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "vision_config": {**vision, "model_type": "clip_vision_model"},
        "text_config": {
            "model_type": "llama",
            **{key: config[key] for key in _TEXT_FIELDS if config.get(key) is not None},
        },
    }


def ask_for_tower(config: Mapping[str, Any]) -> str:
    return f"its CLIP tower is another checkpoint; give it as `vision_tower` ({config.get('mm_vision_tower')})"


def tower_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower among the tensors of a CLIP model."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_NOT_TOWER)}


def image_token_id(folder: Path, config: Mapping[str, Any]) -> int:
    """The marker's id: the tokenizer's where it knows it, else the first that is neither a token nor a row."""
    vocabulary = config["text_config"]["vocab_size"]
    tokenizer = _tokenizer(folder)
    return vocabulary if tokenizer is None else _marker_id(tokenizer, vocabulary)


def write_processor(source: Path, target: Path, config: Mapping[str, Any], aspect: str | None) -> None:
    """Writes tokenizer, chat template and image processor, if the source has a tokenizer.

    Args:
      config: in the Hugging Face form.
      aspect: `image_aspect_ratio` of the original one. With "pad" pictures are padded to a square, else cropped.

    Raises:
      UserError: the tokenizer cannot be used.
    """
    tokenizer = _tokenizer(source)
    if tokenizer is None:
        return
    _marker_id(tokenizer, config["text_config"]["vocab_size"])
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(str(target))
    side = config["vision_config"]["image_size"]
    settings = clip_settings("LlavaImageProcessor", side, do_pad=aspect == "pad")
    (target / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _tokenizer(folder: Path) -> Any:
    return read_tokenizer(folder, "llama") if there(folder, TOKENIZER_FILES) else None


def _marker_id(tokenizer: Any, vocabulary: int) -> int:
    """Makes the marker a token and returns its id."""
    from tokenizers import AddedToken

    if MARKER not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(MARKER, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(MARKER))
