"""What a checkpoint decides: frozen, hashable configurations of a LLaVA model.

Every hyper-parameter is a field without default, filled by `LlavaConfig.from_hf` or by a preset.
The dataclasses are hashable so that a configuration can be a static argument of `jax.jit`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparsevlm_jax.errors import UserError

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer (Hugging Face `clip_vision_model`)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels per side
    patch_size: int  # pixels per side
    num_channels: int
    hidden_act: str
    layer_norm_eps: float

    def __post_init__(self) -> None:
        _check_activation("vision_config.hidden_act", self.hidden_act)
        _check_divides("vision_config.num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        _check_divides("vision_config.patch_size", self.patch_size, "image_size", self.image_size)

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TextConfig:
    """A Llama decoder (Hugging Face `llama`), multi-head or grouped-query."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        _check_activation("text_config.hidden_act", self.hidden_act)
        _check_divides(
            "text_config.num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads
        )
        if self.head_dim % 2:
            raise UserError(f"text_config.head_dim is {self.head_dim}: rotary position embeddings need an even number")


@dataclass(frozen=True)
class LlavaConfig:
    """CLIP tower, two-layer projector, Llama decoder.

    `attention` names the implementation of the decoder's attention (see `attention.attend`); it is
    the one field that a checkpoint does not decide.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    vision_feature_layer: int | tuple[int, ...]
    vision_feature_select_strategy: str
    projector_hidden_act: str
    projector_bias: bool
    attention: str

    def __post_init__(self) -> None:
        _check_activation("projector_hidden_act", self.projector_hidden_act)
        strategy = self.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise UserError(f'vision_feature_select_strategy is "{strategy}": expected "default" or "full"')
        depth = self.vision.num_hidden_layers
        for layer in self.feature_layers:
            if not -depth - 1 <= layer <= depth:
                raise UserError(f"vision_feature_layer {layer} is out of range for a tower of {depth} layers")

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Hidden states of the tower that feed the projector, concatenated: 0 is its embedding, -1 its last layer."""
        layers = self.vision_feature_layer
        return layers if isinstance(layers, tuple) else (layers,)

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that one picture becomes: 576 for LLaVA-1.5 (its class token is dropped)."""
        class_token = self.vision_feature_select_strategy == "full"
        return self.vision.grid**2 + class_token

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str = "config.json") -> LlavaConfig:
        """Reads a Hugging Face `config.json` of model type "llava".

        Args:
          config: the parsed file, as transformers 4.x or 5.x wrote it. Published files are sparse: what they leave
            out comes from transformers' own configuration class of each `model_type`.
          source: what to call the file in errors.

        Raises:
          UserError: another architecture, or a variant of it that this package does not compute.
        """
        model_type = config.get("model_type")
        # Early checkpoints of the original layout call themselves "llava" too.
        if model_type == "llava_llama" or "mm_vision_tower" in config:
            raise UserError(f"{source}: the original LLaVA layout; convert it with `sparsevlm convert`")
        if model_type != "llava":
            raise UserError(
                f'{source}: model_type is "{model_type}", expected "llava" (LLaVA-1.5 in the Hugging Face layout)'
            )
        full = complete(config, source)
        vision, text = full["vision_config"], full["text_config"]
        for part, found, wanted in (
            ("vision_config", vision["model_type"], "clip_vision_model"),
            ("text_config", text["model_type"], "llama"),
        ):
            if found != wanted:
                raise UserError(f'{source}: {part}.model_type is "{found}", expected "{wanted}"')
        layer = full["vision_feature_layer"]
        return cls(
            vision=_pick(VisionConfig, vision, f"{source}: vision_config"),
            text=_pick(TextConfig, {**text, "rope_theta": _rope_theta(text, source)}, f"{source}: text_config"),
            image_token_id=full["image_token_index"],
            vision_feature_layer=layer if isinstance(layer, int) else tuple(layer),
            vision_feature_select_strategy=full["vision_feature_select_strategy"],
            projector_hidden_act=full["projector_hidden_act"],
            projector_bias=full["multimodal_projector_bias"],
            attention="auto",
        )

    @classmethod
    def from_file(cls, path: str | Path) -> LlavaConfig:
        """Reads `config.json`, or the `config.json` of a folder.

        Raises:
          UserError: no such file, not JSON, or not a LLaVA configuration.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text())
        except FileNotFoundError:
            raise UserError(f"{file}: no such file (a model folder holds config.json and its weights)") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{file}: cannot be read as JSON: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{file}: expected a JSON object, found {type(config).__name__}")
        return cls.from_hf(config, str(file))


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
            rope_theta=10000.0,
            max_position_embeddings=2048,
            attention_bias=False,
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


PRESETS = {"llava-1.5-7b": llava_15_7b, "llava-1.5-13b": llava_15_13b, "tiny": tiny}


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
            rope_theta=10000.0,
            max_position_embeddings=4096,
            attention_bias=False,
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


def complete(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A parsed config.json with what it leaves out filled in from transformers' configuration classes.

    Raises:
      UserError: transformers does not accept it.
    """
    from transformers import AutoConfig  # here, not above: it imports torch where torch is installed

    try:
        full = AutoConfig.for_model(**config).to_dict()
    except Exception as error:  # transformers raises its validation errors as many unrelated types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: transformers does not accept this configuration: {reason}") from error
    text = full["text_config"]
    text["tie_word_embeddings"] = text.get("tie_word_embeddings", False) or full.get("tie_word_embeddings", False)
    full.setdefault("image_token_index", full.get("image_token_id"))
    return full


def _rope_theta(text: dict[str, Any], source: str) -> float:
    """The rotary base: inside `rope_parameters` (5.x) or at the top level (4.x)."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f'{source}: rope type "{kind}" is not supported, only "default" (LLaVA-1.5 uses no scaling)')
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"{source}: rope_theta of text_config is {theta}, expected a positive number")
    return float(theta)


def _pick(cls: type, values: dict[str, Any], part: str) -> Any:
    """The fields of a configuration class out of a part of config.json."""
    picked = {field.name: values[field.name] for field in fields(cls)}
    for field in fields(cls):
        value = picked[field.name]
        if field.type == "int" and not (isinstance(value, int) and value >= 1):
            raise UserError(f"{part}.{field.name} is {value}, expected a positive integer")
    return cls(**picked)


def _check_activation(field: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise UserError(f'{field} is "{name}": supported activations are {", ".join(ACTIVATIONS)}')


def _check_divides(field: str, divisor: int, whole_name: str, whole: int) -> None:
    if divisor <= 0 or whole % divisor:
        raise UserError(f"{field} is {divisor} and does not divide {whole_name} {whole}")
