"""From images and token ids to a prompt: encode, pack, and put in where the image markers stand.

Axis letters: b batch, l packed sequence length, t tiles, v visual tokens of a tile, n visual tokens of all images, d
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.inputs.packing import ImagePacking, TiledImages
from sparsevlm_jax.models import fits
from sparsevlm_jax.models.family import family_of
from sparsevlm_jax.models.stages import ImageFeatures, Params, Prompt, beside_decoder, decoder_of
from sparsevlm_jax.parallel.inside import by_image, keep
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan

TowerImages = Float[Array, "m 3 height width"] | TiledImages


def encode_images(params: Params, images: TowerImages, config: ModelConfig, plan: Plan | None = None) -> ImageFeatures:
    """Images to visual tokens: tower, projector, packer; shrunk where the plan says so.

    Args:
      images: pixels [m, 3, S, S], or for a family with tiles what the processor made of them.

    Raises:
      ValueError: the one where the other is needed.
    """
    fits.require_tiles(images, config)
    if isinstance(images, TiledImages):
        return _packed_images(params, images, config)
    grid, shrink_images, shrink_features = None, None, None
    if plan is not None and plan.grid is not None:
        grid, method = plan.grid, METHODS[plan.sparsity.method]
        shrink_images, shrink_features = method.shrink_images, method.shrink_features
    pixel_values: Any = images
    if grid is not None and shrink_images is not None:
        pixel_values = shrink_images(pixel_values, grid * config.vision.patch_size)
    tokens, saliency = _encoded(family_of(config).encode, params, pixel_values, config)
    if grid is not None and shrink_features is not None:
        tokens, saliency = shrink_features(tokens, grid), shrink_features(saliency[..., None], grid)[..., 0]
    return ImageFeatures(*_flat(tokens, saliency), grid=None if grid is None else jnp.int32(grid))


def embed(
    params: Params,
    input_ids: Int[Array, "b l"],
    lengths: Int[Array, "b"],
    images: TowerImages | ImageFeatures | None,
    config: ModelConfig,
    plan: Plan | None = None,
) -> Prompt:
    """Token ids and images to a prompt: visual tokens go, in order, where the image markers stand.

    Args:
      input_ids: packed rows; every visual token stands as one `config.image_token_id`.
      lengths: valid ids of each row.
      images: those of all rows, in order, or those of one row, which then go with every row: as `encode_images` takes
        them, or what it made of them; None for text only.
      plan: that of the prefill. It has to be given where it shrinks images.

    Returns:
      The prompt. Its embeddings are NaN where the markers are not as many as the visual tokens of the images.

    Raises:
      ValueError: images of another model or plan.
    """
    if images is not None and not isinstance(images, ImageFeatures):
        tiles = images.tiles if isinstance(images, TiledImages) else images.shape[0]
        images = encode_images(params, images, config, plan) if tiles else None
    if images is not None:
        fits.require_features(images, input_ids.shape[0], config, plan)
    valid = jnp.arange(input_ids.shape[1])[None, :] < lengths[:, None]
    visual = (input_ids == config.image_token_id) & valid
    # The marker may lie outside the table (-200 in original LLaVA checkpoints).
    words = decoder_of(params, config).embed_words(jnp.clip(input_ids, 0, config.text.vocab_size - 1))
    if images is None:
        # A marker without its image has no embedding.
        words = fits.or_nan(words, ~jnp.any(visual, axis=1))
        return Prompt(keep(words), jnp.zeros_like(visual), lengths)
    tokens = images.tokens.astype(words.dtype)
    given, marked = tokens.shape[0] if images.rows is None else jnp.sum(images.rows), jnp.sum(visual, axis=1)
    # A row's own images for each row, or one row's images for all: the same index either way.
    index = jnp.maximum(jnp.cumsum(visual.reshape(-1)) - 1, 0).reshape(visual.shape) % given
    embeddings = jnp.where(visual[:, :, None], tokens[index], words)
    matching = (jnp.sum(marked) == given) | jnp.all(marked == given) if images.rows is None else marked == images.rows
    if images.grid is not None and plan is not None:
        matching &= images.grid == (plan.grid or 0)
    embeddings = fits.or_nan(embeddings, jnp.broadcast_to(matching, lengths.shape))
    saliency = jnp.where(visual, images.saliency[index], 0.0)
    frame = None if images.frame is None else images.frame[index]
    return Prompt(keep(embeddings), visual, lengths, saliency, frame=frame)


def _encoded(
    encode: Callable[..., tuple[Array, Array]], params: Params, tiles: Array, config: ModelConfig
) -> tuple[Float[Array, "t v d"], Float[Array, "t v"]]:
    """What a family's encoder makes of tiles or frames, of which each device of a mesh takes some."""
    return by_image(lambda towers, tiles: encode(towers, tiles, config), beside_decoder(params), tiles)


def _packed_images(params: Params, images: TiledImages, config: ModelConfig) -> ImageFeatures:
    """The visual tokens of images and videos, in the order of the prompts."""
    family, encoded = family_of(config), []
    if len(images.pixel_values):
        encoded.append(_flat(*_encoded(family.encode, params, images.pixel_values, config)))
    if images.frames is not None:
        assert family.encode_frames is not None
        encoded.append(_flat(*_encoded(family.encode_frames, params, images.frames, config)))
    tokens, saliency = (
        encoded[0] if len(encoded) == 1 else (jnp.concatenate(part) for part in zip(*encoded, strict=True))
    )
    own = None if family.rows is None else family.rows(params)
    packing = images.packing
    return ImageFeatures(_packed(tokens, own, packing), _saliency(saliency, packing), packing.rows, frame=packing.frame)


def _flat(
    tokens: Float[Array, "t v d"], saliency: Float[Array, "t v"]
) -> tuple[Float[Array, "patches d"], Float[Array, "patches"]]:
    """The patches of all tiles, one after the other."""
    return tokens.reshape(-1, tokens.shape[-1]), saliency.reshape(-1)


def _packed(
    tokens: Float[Array, "patches d"], own: Float[Array, "r d"] | None, packing: ImagePacking
) -> Float[Array, "n d"]:
    """Every visual token as the weighted sum of patches, or of the family's own rows behind them."""
    rows = tokens if own is None else jnp.concatenate([tokens, own.astype(tokens.dtype)])
    index = jnp.where(packing.index < 0, len(tokens) - 1 - packing.index, packing.index)
    if packing.weight is None:
        return rows[index[:, 0]]
    return jnp.einsum("nk,nkd->nd", packing.weight, rows[index]).astype(tokens.dtype)


def _saliency(saliency: Float[Array, "patches"], packing: ImagePacking) -> Float[Array, "n"]:
    """How much the tower looks at each token; at a newline the mean over the patches of its line."""
    own = packing.index[:, 0] < 0
    taken = jnp.where(packing.index < 0, 0.0, saliency[packing.index])
    at = taken[:, 0] if packing.weight is None else jnp.sum(packing.weight * taken, axis=1)
    in_line = jnp.zeros_like(at).at[packing.line]
    count = in_line.add(jnp.where(own, 0.0, 1.0))
    return jnp.where(own, in_line.add(jnp.where(own, 0.0, at)) / jnp.maximum(count, 1.0), at)
