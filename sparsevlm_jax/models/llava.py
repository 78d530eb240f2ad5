"""LLaVA-1.5 and its relatives: one tile an image, a vision tower, a two-layer projector, a decoder.

Axis letters: t tiles, v visual tokens of a tile, d width.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
from jaxtyping import Array, Float

from sparsevlm_jax import bounds
from sparsevlm_jax.config import (
    SiglipConfig,
    TextConfig,
    TowerConfig,
    check_activation,
    read_config,
    refuse_original,
    token_id,
    typed,
)
from sparsevlm_jax.config_json import complete, text_config, vision_config
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.files import read_json
from sparsevlm_jax.layout import ImageLayout, Size, one_tile
from sparsevlm_jax.models.decoder import Llama
from sparsevlm_jax.models.names import (
    DECODER_SPELLINGS,
    TOWER,
    VISION_SPELLINGS,
    Table,
    decoder_rows,
    harmless,
    projector_rows,
    projector_spellings,
    vision_rows,
)
from sparsevlm_jax.models.stages import Params
from sparsevlm_jax.models.towers import tower_of
from sparsevlm_jax.ops.layers import ACTIVATIONS, LayerNorm, Linear

NAMES = Table(
    (*vision_rows(), *projector_rows("linear_1", "linear_2"), *decoder_rows()),
    VISION_SPELLINGS
    | projector_spellings(linear_1="model.mm_projector.0.", linear_2="model.mm_projector.2.")
    | DECODER_SPELLINGS,
    harmless(TOWER),
)


@dataclass(frozen=True)
class LlavaConfig:
    """CLIP or SigLIP tower, two-layer projector, Llama decoder or a relative of it.

    `attention` names the implementation of the decoder's attention (see `ops.attention.attend`); it is
    the one field that a checkpoint does not decide.
    """

    vision: TowerConfig
    text: TextConfig
    image_token_id: int
    vision_feature_layer: int | tuple[int, ...]
    vision_feature_select_strategy: str
    projector_hidden_act: str
    projector_bias: bool
    attention: str
    projector_norm_eps: float | None = None  # of a norm in front of the projector; None where there is none
    model_type: str = "llava"
    video_token_id: int | None = None  # of families with videos

    def __post_init__(self) -> None:
        check_activation("projector_hidden_act", self.projector_hidden_act)
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
    def image_grid(self) -> int | None:
        """Visual tokens per side of an image; None where they are no square: with a class token among them, or without
        the first patch of a tower that has none."""
        return self.vision.grid if self.tile_tokens == self.vision.grid**2 else None

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile: the "default" strategy drops the tower's first hidden state, the class token."""
        return self.vision.grid**2 + self.vision.class_tokens - self.dropped

    @property
    def dropped(self) -> int:
        """Hidden states of the tower, in front, that are no visual tokens."""
        return int(self.vision_feature_select_strategy == "default")

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that an image becomes: 576 for LLaVA-1.5 (its class token is dropped)."""
        return self.tile_tokens

    @property
    def most_tiles(self) -> int:
        return 1

    @property
    def packs_images(self) -> bool:
        return self.most_tiles > 1 or self.video_token_id is not None

    @property
    def fullest_image(self) -> Size:
        return self.vision.image_size, self.vision.image_size

    @property
    def image_options(self) -> dict[str, Any]:
        return {}

    def image_layout(self, size: Size) -> ImageLayout:
        return one_tile(self.vision.grid, self.vision.class_tokens, self.dropped)

    def video_layout(self, frames: int) -> ImageLayout:
        raise UserError(f"{self.model_type}: takes images only, no videos")

    def visual_bucket(self, tokens: int) -> int:
        return tokens

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str = "config.json") -> LlavaConfig:
        """Reads a Hugging Face `config.json` of this family; `config_from_hf` reads that of any.

        Args:
          config: the parsed file, as transformers 4.x or 5.x wrote it. Published files are sparse: what they leave
            out comes from transformers' own configuration class of each `model_type`.
          source: what to call the file in errors.

        Raises:
          UserError: another architecture, or a variant of it that this package does not compute.
        """
        refuse_original(config, source)
        if (stated := config.get("model_type")) != cls.model_type:
            raise UserError(f'{source}: model_type is {shown(stated)}, expected "{cls.model_type}"')
        full = complete(config, source)
        vision, text = full["vision_config"], full["text_config"]
        made = cls(
            vision=vision_config(vision, source),
            text=text_config(text, source),
            image_token_id=token_id(full["image_token_index"], f"{source}: image_token_index"),
            vision_feature_layer=_feature_layer(full["vision_feature_layer"], source),
            projector_hidden_act=full["projector_hidden_act"],
            attention="auto",
            **cls.own_fields(full, source),
        )
        if made.tile_tokens > bounds.VISUAL_TOKENS:
            raise UserError(
                f"{source}: an image becomes {made.tile_tokens:,} visual tokens (image_size and patch_size of "
                f"vision_config), expected at most {bounds.VISUAL_TOKENS:,}"
            )
        if isinstance(made.vision, SiglipConfig) and made.vision_feature_select_strategy == "default":
            warnings.warn(
                f'{source}: vision_feature_select_strategy is "default", which drops the first hidden state of the '
                "tower. SigLIP has no class token there: as in transformers, the image's first patch is lost. The "
                'checkpoint may mean "full"',
                stacklevel=2,
            )
        return made

    @classmethod
    def own_fields(cls, full: dict[str, Any], source: str) -> dict[str, Any]:
        """The fields in which a family differs, out of a complete config.json."""
        return {
            "model_type": full["model_type"],
            "vision_feature_select_strategy": full["vision_feature_select_strategy"],
            "projector_bias": typed(full["multimodal_projector_bias"], "bool", f"{source}: multimodal_projector_bias"),
        }

    @classmethod
    def from_file(cls, path: str | Path) -> LlavaConfig:
        """Reads `config.json`, or the `config.json` of a folder.

        Raises:
          UserError: no such file, not JSON, or not a configuration of this family.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        return cls.from_hf(read_config(path) if path.is_dir() else read_json(path), str(file))


class Projector(nn.Module):
    """Linear, activation, linear, behind a norm where the family has one: from the tower's width to the decoder's."""

    config: LlavaConfig

    def setup(self) -> None:
        c = self.config
        if c.projector_norm_eps is not None:
            self.projector_layernorm = LayerNorm(c.projector_norm_eps)
        self.linear_1 = Linear(c.text.hidden_size, c.projector_bias)
        self.linear_2 = Linear(c.text.hidden_size, c.projector_bias)

    def __call__(self, x: Float[Array, "t v d_tower"]) -> Float[Array, "t v d"]:
        x = x if self.config.projector_norm_eps is None else self.projector_layernorm(x)
        return self.linear_2(ACTIVATIONS[self.config.projector_hidden_act](self.linear_1(x)))


class Llava(nn.Module):
    """Parameters of the whole model, and how each is initialised; what computes with them are functions."""

    config: LlavaConfig

    def setup(self) -> None:
        self.vision_tower = tower_of(self.config.vision, self.config.feature_layers)
        self.multi_modal_projector = Projector(self.config)
        self.language_model = Llama(self.config.text)

    def __call__(self, pixel_values: Array, input_ids: Array) -> Array:
        """Touches every parameter once, for initialisation."""
        features, _ = self.vision_tower(pixel_values)
        self.multi_modal_projector(features)
        return self.language_model(input_ids)


def encode_tiles(
    params: Params, pixel_values: Float[Array, "t 3 height width"], config: LlavaConfig
) -> tuple[Float[Array, "t v d"], Float[Array, "t v"]]:
    """Tower, feature selection, projector: the visual tokens of every tile, and how much the tower looks at each."""
    return encode_by(params, pixel_values, config, "vision_tower", config.dropped)


def encode_by(
    params: Params, pixel_values: Float[Array, "t 3 height width"], config: LlavaConfig, name: str, dropped: int
) -> tuple[Float[Array, "t v d"], Float[Array, "t v"]]:
    """`encode_tiles` by one of several towers, without the first so many of its hidden states."""
    # Under the names that they have in the tree: a profile tells phases by them.
    tower = tower_of(config.vision, config.feature_layers, name=name)
    projector = Projector(config, name="multi_modal_projector")
    features, saliency = cast(tuple[Array, Array], tower.apply({"params": params[name]}, pixel_values))
    if dropped:
        features, saliency = features[:, dropped:], saliency[:, dropped:]
    tokens: Any = projector.apply({"params": params["multi_modal_projector"]}, features)
    return tokens, saliency


def _feature_layer(layer: Any, source: str) -> int | tuple[int, ...]:
    """One layer of the tower or several, whose range `LlavaConfig` checks."""
    layers, most = layer if isinstance(layer, list) else [layer], bounds.SIZES["num_hidden_layers"]
    if not 0 < len(layers) <= most or not all(type(number) is int for number in layers):
        raise UserError(
            f"{source}: vision_feature_layer is {shown(layer)}, expected a layer of the tower or a list of layers"
        )
    return tuple(layers) if isinstance(layer, list) else layer
