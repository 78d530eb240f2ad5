"""What a checkpoint decides: frozen, hashable configurations of decoders and towers, and how config.json is read.

Every hyper-parameter is a field without default, filled from a config.json or by a preset.
The dataclasses are hashable so that a configuration can be a static argument of `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.files import inside, read_json
from sparsevlm_jax.rotary import Rope, rope_from_hf

DTYPES = ("float32", "bfloat16", "float16")  # to compute in and to store weights in
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
# One of these is in a folder that holds more than an adapter.
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_WHOLE_MODELS = ("model*.safetensors", "pytorch_model*.bin", "manifest.json")


@dataclass(frozen=True)
class TowerConfig:
    """What vision transformers have in common."""

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
        check_activation("vision_config.hidden_act", self.hidden_act)
        _check_divides("vision_config.num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def class_tokens(self) -> int:
        """Hidden states in front of the patches."""
        raise NotImplementedError


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """A CLIP vision transformer (Hugging Face `clip_vision_model`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_divides("vision_config.patch_size", self.patch_size, "image_size", self.image_size)

    @property
    def class_tokens(self) -> int:
        return 1


@dataclass(frozen=True)
class SiglipConfig(TowerConfig):
    """A SigLIP vision transformer (Hugging Face `siglip_vision_model`): no class token, every hidden state is a patch.

    The patches need not fill the image: 27 of 14 pixels leave 6 of 384 unseen.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise UserError(f"vision_config.patch_size is {self.patch_size}, more than image_size {self.image_size}")

    @property
    def class_tokens(self) -> int:
        return 0


VISION_MODELS: dict[str, type[TowerConfig]] = {"clip_vision_model": VisionConfig, "siglip_vision_model": SiglipConfig}


def vision_config(vision: Mapping[str, Any], source: str) -> TowerConfig:
    """A tower's configuration out of a complete `vision_config`.

    Raises:
      UserError: a value that is none.
    """
    return pick(VISION_MODELS[vision["model_type"]], vision, f"{source}: vision_config")


@dataclass(frozen=True)
class TextConfig:
    """A Llama decoder, or one that differs from it by what is said here: see `TEXT_MODELS`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int  # tokens that a prompt and its answer may have
    windowed: bool  # these are as many as its layers look back at: its context is longer
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # queries and keys are normalised over the head dim before they are rotated
    norm_offset: bool  # norms multiply by 1 + scale, in float32
    joined_weights: bool  # of its checkpoint: one tensor for q, k and v there, and one for gate and up
    embed_scale: bool  # embeddings of words, and not visual tokens, are multiplied by sqrt(hidden_size)
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        check_activation("text_config.hidden_act", self.hidden_act)
        _check_divides(
            "text_config.num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads
        )
        if self.head_dim % 2:
            raise UserError(f"text_config.head_dim is {self.head_dim}: rotary position embeddings need an even number")
        if self.rope.head_dim != self.head_dim:
            raise UserError(f"text_config.head_dim is {self.head_dim}, the rotary embedding has {self.rope.head_dim}")

    @property
    def limit(self) -> str:
        """What bounds a prompt and its answer, for messages."""
        return f"{'sliding window' if self.windowed else 'context'} of {self.max_position_embeddings}"


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


@runtime_checkable
class ModelConfig(Protocol):
    """What planning, packing, the processor and the decoder ask of a model, whatever its family."""

    @property
    def text(self) -> TextConfig: ...
    @property
    def vision(self) -> TowerConfig: ...
    @property
    def image_token_id(self) -> int: ...
    @property
    def attention(self) -> str:
        """The implementation of the decoder's attention: see `ops.attention.attend`."""
        ...

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that one picture becomes."""
        ...

    @property
    def image_grid(self) -> int | None:
        """Visual tokens per side of a picture; None where they are no square."""
        ...


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


def check_depth(config: ModelConfig, tensors: int, source: str) -> None:
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
            _size(values[key], most, f"{part}.{key}")
    return {key: values[key] for key in keys if key in values}


def _size(value: Any, most: int, name: str) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {shown(value)}, expected a positive integer")
    if value > most:
        raise UserError(f"{name} is {shown(value)}, expected at most {most:,}")


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


def pick(cls: type, values: Mapping[str, Any], part: str) -> Any:
    """The fields of a configuration class out of a part of config.json."""
    picked = {field.name: typed(values[field.name], field.type, f"{part}.{field.name}") for field in fields(cls)}
    return cls(**picked)


def typed(value: Any, kind: Any, name: str) -> Any:
    """A value of a field, if it is of the field's type."""
    if kind == "int":
        _size(value, bounds.SIZES[name.rpartition(".")[2]], name)
    elif kind == "float":
        return bounds.positive(value, name)
    elif type(value).__name__ != kind:
        raise UserError(f"{name} is {shown(value)}, expected {'true or false' if kind == 'bool' else 'a name'}")
    return value


def check_activation(field: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise UserError(f"{field} is {shown(name)}: supported activations are {', '.join(ACTIVATIONS)}")


def _check_divides(field: str, divisor: int, whole_name: str, whole: int) -> None:
    if divisor <= 0 or whole % divisor:
        raise UserError(f"{field} is {divisor} and does not divide {whole_name} {whole}")
