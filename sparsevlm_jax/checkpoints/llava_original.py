"""The layout of the LLaVA authors' own checkpoints, 1.5 and 1.6: configuration, tower, tokenizer and processor.

They are a language model with a projector (`model.layers. ...`, `model.mm_projector. ...`), mark an image by the id
-200, which no table of embeddings has, and leave the CLIP tower to another checkpoint; 1.6 trained it further and holds
it. The vocabulary stays as it is: the marker becomes a token behind its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsevlm_jax.checkpoints.safetensors import Tensor
from sparsevlm_jax.config import refuse_quantised, refuse_temporal_attention
from sparsevlm_jax.errors import UserError, shown
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
_ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}

# The towers of published checkpoints that hold its weights and not its sizes.
_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
}


class _Turns(NamedTuple):
    """How a prompt is written: the system text where a conversation brings none, and what stands around it, each
    question and each answer."""

    default: str
    system: tuple[str, str]
    question: tuple[str, str]
    answer: tuple[str, str]  # "" at its end: the tokenizer's end token


_VICUNA = _Turns(PROMPT_START.split(" USER: ")[0], ("", " "), ("USER: ", ""), (PROMPT_END + " ", ""))
_MISTRAL = _Turns("", ("", "\n"), ("[INST] ", " [/INST]"), (" ", ""))
_CHATML = _Turns(  # LLaVA 1.6 34B
    "Answer the questions.",
    ("<|im_start|>system\n", "<|im_end|>"),
    ("<|im_start|>user\n", "<|im_end|>"),
    ("<|im_start|>assistant\n", "<|im_end|>"),
)


def family_name(config: Mapping[str, Any]) -> str:
    """The family that a checkpoint of the original layout is of."""
    return "llava" if config.get("mm_patch_merge_type") in (None, "flat") else "llava_next"


def hf_config(config: Mapping[str, Any], tower: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """config.json in the Hugging Face form, all but the image token.

    Args:
      config: of the checkpoint.
      tower: config.json of its CLIP model, or None where the checkpoint states the tower's geometry itself.

    Raises:
      UserError: a variant that is neither LLaVA-1.5 nor LLaVA-NeXT, or a geometry that stands nowhere.
    """
    refuse_quantised(config, source)
    refuse_temporal_attention(config, source)
    family, decoder = family_name(config), _decoder(config, source)
    projector, select = config.get("mm_projector_type", "linear"), config.get("mm_vision_select_feature", "patch")
    if projector != "mlp2x_gelu":
        raise UserError(f'{source}: mm_projector_type is "{projector}", expected "mlp2x_gelu"')
    if not isinstance(select, str) or select not in _SELECT:
        raise UserError(f'{source}: mm_vision_select_feature is "{select}", expected one of {", ".join(_SELECT)}')
    if config.get("mm_use_im_start_end"):
        raise UserError(f"{source}: mm_use_im_start_end is set: images between special tokens are not supported")
    tiles = _tiles(config, source) if family == "llava_next" else _require_whole(config, source)
    name = str(config.get("mm_vision_tower"))
    vision = config.get("vision_config") or config.get("tiny_vision_config") or _TOWERS.get(name)
    if tower is not None:
        vision = tower.get("vision_config", tower)
    if not isinstance(vision, dict):
        raise UserError(f"{source}: {ask_for_tower(config)}")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        **tiles,
        **({"dtype": dtype} if dtype else {}),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _SELECT[select],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "vision_config": {**vision, "model_type": "clip_vision_model"},
        "text_config": {
            "model_type": decoder,
            # That a window is null says something: left out, Mistral's is 4096.
            **{key: config[key] for key in _TEXT_FIELDS if config.get(key) is not None},
            **{key: config[key] for key in ("sliding_window",) if key in config},
        },
    }


def _decoder(config: Mapping[str, Any], source: str) -> str:
    """The decoder's model type.

    Raises:
      UserError: another than Llama's and Mistral's.
    """
    kind, named = config.get("model_type"), config.get("architectures")
    if kind == "llava_mistral" or (kind == "llava" and named == ["LlavaMistralForCausalLM"]):
        return "mistral"
    if kind not in ("llava", "llava_llama"):
        raise UserError(
            f"{source}: model_type is {shown(kind)}: of the original layout llava_llama and llava_mistral are read"
        )
    return "llama"


def _tiles(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What LLaVA-NeXT's config.json has beside that of LLaVA-1.5.

    Raises:
      UserError: another way to lay out tiles.
    """
    for key, wanted in (("mm_patch_merge_type", "spatial_unpad"), ("image_aspect_ratio", "anyres")):
        if config.get(key) != wanted:
            raise UserError(f'{source}: {key} is {shown(config.get(key))}, expected "{wanted}" (LLaVA-NeXT)')
    pinpoints = config.get("image_grid_pinpoints")
    return {} if pinpoints is None else {"image_grid_pinpoints": pinpoints}


def _require_whole(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Nothing, of a checkpoint that sees each image whole.

    Raises:
      UserError: it cuts them into tiles and does not say how these are laid out.
    """
    aspect = config.get("image_aspect_ratio")
    if isinstance(aspect, str) and "anyres" in aspect:
        raise UserError(f'{source}: image_aspect_ratio is "{aspect}" without mm_patch_merge_type "spatial_unpad"')
    return {}


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
      aspect: `image_aspect_ratio` of the original one. With "pad" images are padded to a square, else cropped.

    Raises:
      UserError: the tokenizer cannot be used.
    """
    tokenizer = _tokenizer(source)
    if tokenizer is None:
        return
    _marker_id(tokenizer, config["text_config"]["vocab_size"])
    tokenizer.chat_template = _template(_turns(tokenizer, config))
    tokenizer.save_pretrained(str(target))
    side = config["vision_config"]["image_size"]
    if config["model_type"] == "llava_next":
        own = {key: config[key] for key in ("image_grid_pinpoints",) if key in config}
        settings = clip_settings("LlavaNextImageProcessor", side, do_pad=True, **own)
    else:
        settings = clip_settings("LlavaImageProcessor", side, do_pad=aspect == "pad")
    (target / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _turns(tokenizer: Any, config: Mapping[str, Any]) -> _Turns:
    """The prompt that the checkpoint was trained with: its configuration does not say."""
    if config["text_config"]["model_type"] == "mistral":
        return _MISTRAL
    return _CHATML if "<|im_start|>" in tokenizer.get_vocab() else _VICUNA


def _template(turns: _Turns) -> str:
    """A chat template of it."""

    def text(of: str) -> str:
        return f"{{{{ {json.dumps(of)} }}}}" if of else ""

    end = text(turns.answer[1]) or "{{ eos_token }}"
    start = text(turns.default.join(turns.system)) if turns.default else ""
    return (
        "{% set turns = messages %}{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        f"{{% set content = messages[0]['content'] %}}{text(turns.system[0])}"
        "{% if content is string %}{{ content }}{% else %}{{ content[0]['text'] }}{% endif %}"
        f"{text(turns.system[1])}{{% else %}}{start}{{% endif %}}"
        "{% for message in turns %}{% set content = message['content'] %}"
        f"{{% if message['role'] == 'user' %}}{text(turns.question[0])}"
        "{% if content is string %}{{ content }}{% else %}"
        f"{{% for part in content if part['type'] == 'image' %}}{text(MARKER + chr(10))}{{% endfor %}}"
        "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
        f"{text(turns.question[1])}{{% else %}}{text(turns.answer[0])}"
        f"{{% if content is string %}}{{{{ content }}}}{{% else %}}{{{{ content[0]['text'] }}}}{{% endif %}}{end}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{text(turns.answer[0].rstrip(' '))}{{% endif %}}"
    )


def _tokenizer(folder: Path) -> Any:
    return read_tokenizer(folder, "llama") if there(folder, TOKENIZER_FILES) else None


def _marker_id(tokenizer: Any, vocabulary: int) -> int:
    """Makes the marker a token and returns its id."""
    from tokenizers import AddedToken

    if MARKER not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(MARKER, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(MARKER))
