"""What a checkpoint decides: frozen, hashable configurations of decoders and towers, and what a file may say of them.

Every hyper-parameter of a decoder or a tower is a field without default, filled from a config.json or by a preset.
The dataclasses are hashable so that a configuration can be a static argument of `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.files import inside, read_json
from sparsevlm_jax.layout import ImageLayout, Size
from sparsevlm_jax.rotary import Rope

DTYPES = ("float32", "bfloat16", "float16")  # to compute in and to store weights in
QUANTIZATIONS = ("int8",)  # how else linear weights may be held: see models.quantize
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
# What checkpoints in the layout of LLaVA's authors, which `sparsevlm convert` reads, call themselves, beside "llava".
_ORIGINAL_TYPES = ("llava_llama", "llava_mistral", "llava_qwen", "llava_mpt")
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


@dataclass(frozen=True)
class TextConfig:
    """A Llama decoder, or one that differs from it by what is said here: see `config_json.TEXT_MODELS`."""

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


@runtime_checkable
class ModelConfig(Protocol):
    """What planning, packing, the processor and the decoder ask of a model, whatever its family: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def model_type(self) -> str:
        """The family, as config.json names it."""
        ...

    @property
    def text(self) -> TextConfig: ...
    @property
    def vision(self) -> TowerConfig: ...
    @property
    def image_token_id(self) -> int: ...
    @property
    def video_token_id(self) -> int | None:
        """What stands for a video in token ids from a tokenizer; None where there are no videos. In the ids that a
        model takes every visual token is `image_token_id`, of images and videos alike."""
        ...

    @property
    def attention(self) -> str:
        """The implementation of the decoder's attention: see `ops.attention.attend`."""
        ...

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that an image becomes; where its size decides (see `image_layout`), at most."""
        ...

    @property
    def image_grid(self) -> int | None:
        """Visual tokens per side of an image; None where they are no square of patches."""
        ...

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Hidden states of the tower that feed the projector: 0 is its embedding, -1 its last layer."""
        ...

    @property
    def tile_tokens(self) -> int:
        """Features that the projector makes of one tile."""
        ...

    @property
    def most_tiles(self) -> int:
        """Tiles that an image becomes at most; where it is more than 1, the image's size decides how many."""
        ...

    @property
    def packs_images(self) -> bool:
        """Whether images come with where each visual token lies (`inputs.packing.TiledImages`), or as pixels alone."""
        ...

    @property
    def fullest_image(self) -> Size:
        """An image of these sides becomes `tokens_per_image` visual tokens."""
        ...

    @property
    def image_options(self) -> dict[str, Any]:
        """What the checkpoint's image processor has to be told of the model."""
        ...

    def image_layout(self, size: Size) -> ImageLayout:
        """The visual tokens of an image of this size."""
        ...

    def video_layout(self, frames: int) -> ImageLayout:
        """The visual tokens of a video of so many frames.

        Raises:
          UserError: the family has no videos.
        """
        ...

    def visual_bucket(self, tokens: int) -> int:
        """To how many visual tokens a row with so many is padded."""
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


def refuse_temporal_attention(config: Mapping[str, Any], source: str) -> None:
    """The authors' layout of Video-LLaVA calls itself "llava" and is another model than the converted one.

    Raises:
      UserError: the configuration is of that layout.
    """
    if found := [key for key in ("mm_video_tower", "mm_image_tower") if key in config]:
        raise UserError(
            f"{source}: the original Video-LLaVA layout ({' and '.join(found)}), whose video tower attends over frames "
            "(its temporal_attn, temporal_layer_norm1 and temporal_embedding): that is not computed; give a converted "
            'checkpoint (model_type "video_llava"), which is a model without it'
        )


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether names and entries are those of the LLaVA authors; early checkpoints of theirs say "llava" too."""
    return config.get("model_type") in _ORIGINAL_TYPES or "mm_vision_tower" in config


def refuse_original(config: Mapping[str, Any], source: str) -> None:
    """Whose names and entries are those of the LLaVA authors, and not of any family.

    Raises:
      UserError: the configuration is such a one.
    """
    refuse_temporal_attention(config, source)
    if is_original(config):
        raise UserError(f"{source}: the original LLaVA layout; convert it with `sparsevlm convert`")


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


def check_size(value: Any, most: int, name: str) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {shown(value)}, expected a positive integer")
    if value > most:
        raise UserError(f"{name} is {shown(value)}, expected at most {most:,}")


def pick(cls: type, values: Mapping[str, Any], part: str) -> Any:
    """The fields of a configuration class out of a part of config.json."""
    picked = {field.name: typed(values[field.name], field.type, f"{part}.{field.name}") for field in fields(cls)}
    return cls(**picked)


def typed(value: Any, kind: Any, name: str) -> Any:
    """A value of a field, if it is of the field's type."""
    if kind == "int":
        check_size(value, bounds.SIZES[name.rpartition(".")[2]], name)
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
