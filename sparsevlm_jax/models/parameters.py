"""The parameter tree of a model: drawn, as shapes, and as the tensors of a checkpoint."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.models.family import family_of
from sparsevlm_jax.models.names import Entry
from sparsevlm_jax.models.quantize import entries_held, quantize_params
from sparsevlm_jax.models.stages import Params


def init_params(config: ModelConfig, key: Array, dtype: DTypeLike) -> Params:
    """Random parameters, for tests and benchmarks."""
    shape = (1, config.vision.num_channels, config.vision.image_size, config.vision.image_size)
    module = family_of(config).module(config)
    params = module.init(key, jnp.zeros(shape, jnp.float32), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract_params(config: ModelConfig, dtype: DTypeLike, quantize: str | None = None) -> Params:
    """Shapes and dtypes of the parameter tree, without making it; `quantize` as for `load`."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(config))
    return jax.eval_shape(partial(quantize_params, quantize=quantize), shapes) if quantize else shapes


def abstract_pixels(config: ModelConfig, number: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """Shape [number, 3, S, S] and dtype of images, tiles or frames as the tower takes them."""
    vision = config.vision
    return jax.ShapeDtypeStruct((number, vision.num_channels, vision.image_size, vision.image_size), dtype)


def tree_bytes(tree: Any) -> int:
    """Of all arrays, or shapes, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def entries(config: ModelConfig, quantize: str | None = None) -> dict[str, Entry]:
    """Every parameter of a model with the tensor that holds it, by the tensor's canonical name."""
    found = family_of(config).names.entries(_shapes(config))
    return entries_held(found) if quantize else found


@cache
def _shapes(config: ModelConfig) -> Params:
    """`abstract_params` in float32: tracing a whole model takes a second, and costs are asked for again and again."""
    return jax.eval_shape(lambda key: init_params(config, key, jnp.float32), jax.random.key(0))
