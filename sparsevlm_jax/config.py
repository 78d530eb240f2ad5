"""What a checkpoint decides: frozen, hashable configurations of a LLaVA model.

Every hyper-parameter is a field without default, filled by `LlavaConfig.from_hf` or by a preset.
The dataclasses are hashable so that a configuration can be a static argument of `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.files import inside, read_json

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
# Entries of a config.json that are read beside its parts, and entries of a part beside the fields of its class.
_TOP = (
    "model_type",
    "image_token_index",
    "image_token_id",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "projector_hidden_act",
    "multimodal_projector_bias",
    "tie_word_embeddings",
    "eos_token_id",
    "pad_token_id",
)
_BESIDE = ("model_type", "rope_parameters", "rope_scaling", "eos_token_id", "pad_token_id")
# One of these is in a folder that holds more than an adapter.
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_WHOLE_MODELS = ("model*.safetensors", "pytorch_model*.bin", "manifest.json")


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
            raise UserError(f'vision_feature_select_strategy is {shown(strategy)}: expected "default" or "full"')
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
                f'{source}: model_type is {shown(model_type)}, expected "llava" (LLaVA-1.5 in the Hugging Face layout)'
            )
        full = complete(config, source)
        vision, text = full["vision_config"], full["text_config"]
        made = cls(
            vision=_pick(VisionConfig, vision, f"{source}: vision_config"),
            text=_pick(TextConfig, {**text, "rope_theta": _rope_theta(text, source)}, f"{source}: text_config"),
            image_token_id=token_id(full["image_token_index"], f"{source}: image_token_index"),
            vision_feature_layer=_feature_layer(full["vision_feature_layer"], source),
            vision_feature_select_strategy=full["vision_feature_select_strategy"],
            projector_hidden_act=full["projector_hidden_act"],
            projector_bias=_typed(full["multimodal_projector_bias"], "bool", f"{source}: multimodal_projector_bias"),
            attention="auto",
        )
        if made.tokens_per_image > bounds.VISUAL_TOKENS:
            raise UserError(
                f"{source}: a picture becomes {made.tokens_per_image:,} visual tokens (image_size and patch_size of "
                f"vision_config), expected at most {bounds.VISUAL_TOKENS:,}"
            )
        return made

    @classmethod
    def from_file(cls, path: str | Path) -> LlavaConfig:
        """Reads `config.json`, or the `config.json` of a folder.

        Raises:
          UserError: no such file, not JSON, or not a LLaVA configuration.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        return cls.from_hf(read_config(path) if path.is_dir() else read_json(path), str(file))


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model's folder, whatever it says.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    refuse_adapter(folder)
    return read_json(inside(folder, "config.json"))


def refuse_adapter(folder: Path) -> None:
    """Which holds what was trained of a model, and not the model.

    Raises:
      UserError: the folder has an adapter's files and no others.
    """
    adapter = any((folder / name).exists() for name in _ADAPTERS)
    if adapter and not any(any(folder.glob(pattern)) for pattern in _WHOLE_MODELS):
        raise UserError(f"{folder}: an adapter (LoRA, PEFT), not a model: merge it into its base first")


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

    They get no more than what is used here, and no number beyond `bounds`: other entries make them build tables of any
    length.

    Raises:
      UserError: another architecture, quantised weights, or transformers does not accept it.
    """
    refuse_quantised(config, source)
    given = {key: config[key] for key in _TOP if key in config}
    for part, cls, model_type in (
        ("vision_config", VisionConfig, "clip_vision_model"),
        ("text_config", TextConfig, "llama"),
    ):
        given[part] = _known(config.get(part) or {}, cls, model_type, f"{source}: {part}")
    from transformers import AutoConfig  # here, not above: it imports torch where torch is installed

    try:
        full = AutoConfig.for_model(**given).to_dict()
    except Exception as error:  # transformers raises its validation errors as many unrelated types
        reason = shown(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{source}: transformers does not accept this configuration: {reason}") from error
    text = full["text_config"]
    text["tie_word_embeddings"] = text.get("tie_word_embeddings", False) or full.get("tie_word_embeddings", False)
    full.setdefault("image_token_index", full.get("image_token_id"))
    return full


def refuse_quantised(config: Mapping[str, Any], source: str) -> None:
    """Whose weights are packed and scaled: nothing here computes with them.

    Raises:
      UserError: the configuration says so.
    """
    text = config.get("text_config")
    quantised = config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        by = f"quantised with {shown(method)}" if method else "quantised"
        raise UserError(f"{source}: {by} (quantization_config): give the unquantised checkpoint")


def token_id(value: Any, name: str) -> int:
    """An id as a file states it.

    Raises:
      UserError: it is no integer, negative, or does not fit an int32.
    """
    if type(value) is not int or not 0 <= value <= bounds.TOKEN_ID:
        raise UserError(f"{name} is {shown(value)}, expected the id of a token, 0 to {bounds.TOKEN_ID}")
    return value


def check_depth(config: LlavaConfig, tensors: int, source: str) -> None:
    """Before shapes are computed layer by layer: so many layers need at least so many tensors.

    Raises:
      UserError: the weights are of a shallower model.
    """
    depth = config.text.num_hidden_layers + config.vision.num_hidden_layers
    if depth > tensors:
        raise UserError(
            f"{source}: config.json describes {depth} layers, but there are only {tensors} tensors: weights and "
            "config.json are not of the same checkpoint"
        )


def _known(values: Any, cls: type, model_type: str, part: str) -> dict[str, Any]:
    """The entries of a part of config.json that are used, each within its bound."""
    if not isinstance(values, dict):
        raise UserError(f"{part} is {shown(values)}, expected a JSON object")
    if values.get("model_type", model_type) != model_type:
        raise UserError(f'{part}.model_type is {shown(values["model_type"])}, expected "{model_type}"')
    for key, most in bounds.SIZES.items():
        if values.get(key) is not None:
            _size(values[key], most, f"{part}.{key}")
    return {key: values[key] for key in (*(field.name for field in fields(cls)), *_BESIDE) if key in values}


def _size(value: Any, most: int, name: str) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {shown(value)}, expected a positive integer")
    if value > most:
        raise UserError(f"{name} is {shown(value)}, expected at most {most:,}")


def _feature_layer(layer: Any, source: str) -> int | tuple[int, ...]:
    """One layer of the tower or several, whose range `LlavaConfig` checks."""
    layers, most = layer if isinstance(layer, list) else [layer], bounds.SIZES["num_hidden_layers"]
    if not 0 < len(layers) <= most or not all(type(number) is int for number in layers):
        raise UserError(
            f"{source}: vision_feature_layer is {shown(layer)}, expected a layer of the tower or a list of layers"
        )
    return tuple(layers) if isinstance(layer, list) else layer


def _rope_theta(text: dict[str, Any], source: str) -> float:
    """The rotary base: inside `rope_parameters` (5.x) or at the top level (4.x)."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: rope_parameters of text_config is {shown(rope)}, expected a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(
            f'{source}: rope type {shown(kind)} is not supported, only "default" (LLaVA-1.5 uses no scaling)'
        )
    return _typed(rope.get("rope_theta", text.get("rope_theta")), "float", f"{source}: rope_theta of text_config")


def _pick(cls: type, values: dict[str, Any], part: str) -> Any:
    """The fields of a configuration class out of a part of config.json."""
    picked = {field.name: _typed(values[field.name], field.type, f"{part}.{field.name}") for field in fields(cls)}
    return cls(**picked)


def _typed(value: Any, kind: Any, name: str) -> Any:
    """A value of a field, if it is of the field's type."""
    if kind == "int":
        _size(value, bounds.SIZES[name.rpartition(".")[2]], name)
    elif kind == "float":
        if type(value) not in (int, float) or not 0 < value <= bounds.NUMBER:
            raise UserError(f"{name} is {shown(value)}, expected a positive number, at most {bounds.NUMBER:g}")
        return float(value)
    elif type(value).__name__ != kind:
        raise UserError(f"{name} is {shown(value)}, expected {'true or false' if kind == 'bool' else 'a name'}")
    return value


def _check_activation(field: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise UserError(f"{field} is {shown(name)}: supported activations are {', '.join(ACTIVATIONS)}")


def _check_divides(field: str, divisor: int, whole_name: str, whole: int) -> None:
    if divisor <= 0 or whole % divisor:
        raise UserError(f"{field} is {divisor} and does not divide {whole_name} {whole}")
