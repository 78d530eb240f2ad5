"""LLaVA-1.5: its configuration, its parameters, and its way from pixels and ids to a prompt.

Axis letters: b batch, l packed sequence length, v visual tokens, m images, d width.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sparsevlm_jax import bounds
from sparsevlm_jax.config import (
    SiglipConfig,
    TextConfig,
    TowerConfig,
    check_activation,
    read_config,
    token_id,
    typed,
)
from sparsevlm_jax.config_json import complete, text_config, vision_config
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.files import read_json
from sparsevlm_jax.models import fits
from sparsevlm_jax.models.decoder import Llama
from sparsevlm_jax.models.stages import Params, Pictures, Prompt, decoder_of
from sparsevlm_jax.models.towers import tower_of
from sparsevlm_jax.ops.layers import ACTIVATIONS, linear
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan


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
        return self.vision.grid if self.tokens_per_image == self.vision.grid**2 else None

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that one image becomes: 576 for LLaVA-1.5, whose "default" strategy drops the first hidden
        state, the class token."""
        dropped = self.vision_feature_select_strategy == "default"
        return self.vision.grid**2 + self.vision.class_tokens - dropped

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
            vision=vision_config(vision, source),
            text=text_config(text, source),
            image_token_id=token_id(full["image_token_index"], f"{source}: image_token_index"),
            vision_feature_layer=_feature_layer(full["vision_feature_layer"], source),
            vision_feature_select_strategy=full["vision_feature_select_strategy"],
            projector_hidden_act=full["projector_hidden_act"],
            projector_bias=typed(full["multimodal_projector_bias"], "bool", f"{source}: multimodal_projector_bias"),
            attention="auto",
        )
        if made.tokens_per_image > bounds.VISUAL_TOKENS:
            raise UserError(
                f"{source}: a picture becomes {made.tokens_per_image:,} visual tokens (image_size and patch_size of "
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
    def from_file(cls, path: str | Path) -> LlavaConfig:
        """Reads `config.json`, or the `config.json` of a folder.

        Raises:
          UserError: no such file, not JSON, or not a LLaVA configuration.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        return cls.from_hf(read_config(path) if path.is_dir() else read_json(path), str(file))


class Projector(nn.Module):
    """Linear, activation, linear: from the tower's width to the decoder's."""

    config: LlavaConfig

    def setup(self) -> None:
        c = self.config
        self.linear_1 = linear(c.text.hidden_size, c.projector_bias)
        self.linear_2 = linear(c.text.hidden_size, c.projector_bias)

    def __call__(self, x: Float[Array, "m v d_tower"]) -> Float[Array, "m v d"]:
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


def encode_images(
    params: Params, pixel_values: Float[Array, "m 3 height width"], config: LlavaConfig, plan: Plan | None = None
) -> Pictures:
    """Pictures to visual tokens: tower, feature selection, projector; shrunk where the plan says so."""
    grid, shrink_images, shrink_features = None, None, None
    if plan is not None and plan.grid is not None:
        grid, method = plan.grid, METHODS[plan.sparsity.method]
        shrink_images, shrink_features = method.shrink_images, method.shrink_features
    if grid is not None and shrink_images is not None:
        pixel_values = shrink_images(pixel_values, grid * config.vision.patch_size)
    # Under the names that they have in the tree: a profile tells phases by them.
    tower = tower_of(config.vision, config.feature_layers, name="vision_tower")
    projector = Projector(config, name="multi_modal_projector")
    features, saliency = cast(tuple[Array, Array], tower.apply({"params": params["vision_tower"]}, pixel_values))
    if config.vision_feature_select_strategy == "default":
        features, saliency = features[:, 1:], saliency[:, 1:]
    tokens: Any = projector.apply({"params": params["multi_modal_projector"]}, features)
    if grid is not None and shrink_features is not None:
        tokens, saliency = shrink_features(tokens, grid), shrink_features(saliency[..., None], grid)[..., 0]
    return Pictures(tokens, saliency)


def embed(
    params: Params,
    input_ids: Int[Array, "b l"],
    lengths: Int[Array, "b"],
    pictures: Float[Array, "m 3 height width"] | Pictures | None,
    config: LlavaConfig,
    plan: Plan | None = None,
) -> Prompt:
    """Token ids and pictures to a prompt: visual tokens go, in order, where the image markers stand.

    Args:
      input_ids: packed rows; every visual token stands as one `config.image_token_id`.
      lengths: valid ids of each row.
      pictures: those of all rows, in order, or those of one row, which then go with every row: pixels, or what
        `encode_images` made of them; None for text only.
      plan: that of the prefill. It has to be given where it shrinks pictures.

    Returns:
      The prompt. Its embeddings are NaN where the markers are not as many as the visual tokens of the pictures.

    Raises:
      ValueError: pictures of another model or plan.
    """
    if pictures is not None and not isinstance(pictures, Pictures):
        pictures = encode_images(params, pictures, config, plan) if pictures.shape[0] else None
    if pictures is not None:
        fits.require_pictures(pictures, input_ids.shape[0], config, plan)
    valid = jnp.arange(input_ids.shape[1])[None, :] < lengths[:, None]
    visual = (input_ids == config.image_token_id) & valid
    # The marker may lie outside the table (-200 in original LLaVA checkpoints).
    words = decoder_of(params, config).embed_words(jnp.clip(input_ids, 0, config.text.vocab_size - 1))
    if pictures is None:
        # A marker without its picture has no embedding.
        words = fits.or_nan(words, ~jnp.any(visual, axis=1))
        return Prompt(words, jnp.zeros_like(visual), lengths)
    tokens = pictures.tokens.reshape(-1, words.shape[-1]).astype(words.dtype)
    given, marked = tokens.shape[0], jnp.sum(visual, axis=1)
    # A row's own pictures for each row, or one row's pictures for all: the same index either way.
    index = jnp.maximum(jnp.cumsum(visual.reshape(-1)) - 1, 0).reshape(visual.shape) % given
    embeddings = jnp.where(visual[:, :, None], tokens[index], words)
    matching = (jnp.sum(marked) == given) | jnp.all(marked == given)
    embeddings = fits.or_nan(embeddings, jnp.broadcast_to(matching, lengths.shape))
    return Prompt(embeddings, visual, lengths, jnp.where(visual, pictures.saliency.reshape(-1)[index], 0.0))


def init_params(config: LlavaConfig, key: Array, dtype: DTypeLike) -> Params:
    """Random parameters, for tests and benchmarks."""
    shape = (1, config.vision.num_channels, config.vision.image_size, config.vision.image_size)
    params = Llava(config).init(key, jnp.zeros(shape, jnp.float32), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract_params(config: LlavaConfig, dtype: DTypeLike) -> Params:
    """Shapes and dtypes of the parameter tree, without making it."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(config))


@cache
def _shapes(config: LlavaConfig) -> Params:
    """`abstract_params` in float32: tracing a whole model takes a second, and costs are asked for again and again."""
    return jax.eval_shape(lambda key: init_params(config, key, jnp.float32), jax.random.key(0))


def _feature_layer(layer: Any, source: str) -> int | tuple[int, ...]:
    """One layer of the tower or several, whose range `LlavaConfig` checks."""
    layers, most = layer if isinstance(layer, list) else [layer], bounds.SIZES["num_hidden_layers"]
    if not 0 < len(layers) <= most or not all(type(number) is int for number in layers):
        raise UserError(
            f"{source}: vision_feature_layer is {shown(layer)}, expected a layer of the tower or a list of layers"
        )
    return tuple(layers) if isinstance(layer, list) else layer
