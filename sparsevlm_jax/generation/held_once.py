"""Images that several rows of a batch show: held once, and seen once by the tower.

Axis letters: m images held, n images shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.inputs.packing import TiledImages
from sparsevlm_jax.inputs.pixels import Visual
from sparsevlm_jax.inputs.processor import Inputs
from sparsevlm_jax.models.embedding import encode_images
from sparsevlm_jax.models.stages import ImageFeatures, Params


def held_once(inputs: Inputs, visuals: Sequence[Visual], config: ModelConfig) -> tuple[Inputs, np.ndarray | None]:
    """The inputs with images that several rows show held once, padded to one of a few numbers of images.

    Of a family with tiles the packing says which tiles each row shows; elsewhere the order does.
    """
    places: dict[int, int] = {}
    order = np.array([places.setdefault(id(visual), len(places)) for visual in visuals], np.int32)
    if not len(order):
        return inputs, None
    size = len(order)
    while size > 1 and -(-size // 4) >= len(places):
        size = -(-size // 4)
    first = np.unique(order, return_index=True)[1]
    taken = np.resize(first, size)
    each = len(inputs.pixel_values) // len(order)
    pixels = inputs.pixel_values.reshape(len(order), each, *inputs.pixel_values.shape[1:])[taken]
    inputs = inputs._replace(pixel_values=pixels.reshape(-1, *inputs.pixel_values.shape[1:]))
    if inputs.packing is not None:
        patches = each * config.tile_tokens
        index = inputs.packing.index
        own = np.where(index < 0, index, order[index // patches] * patches + index % patches)
        inputs = inputs._replace(packing=inputs.packing._replace(index=own.astype(np.int32)))
    return inputs, order


@partial(jax.jit, static_argnames=("config",))
def encode_held_once(
    params: Params,
    images: Float[Array, "m 3 height width"] | TiledImages,
    order: Int[Array, "n"],
    *,
    config: ModelConfig,
) -> ImageFeatures:
    """Visual tokens of all rows, from images that are held once."""
    features = encode_images(params, images, config)
    if isinstance(images, TiledImages):
        return features
    each = len(features.tokens) // len(images)
    tokens = features.tokens.reshape(-1, each, features.tokens.shape[1])[order]
    saliency = features.saliency.reshape(-1, each)[order]
    return features._replace(tokens=tokens.reshape(-1, tokens.shape[2]), saliency=saliency.reshape(-1))
