"""Weights in eight bits: which they are, and how they become so.

Of every linear layer in the decoder's layers the `weight` becomes int8 values, and beside it in the tree stands a
float32 `scale` for each output: weight ≈ values * scale, the largest of an output's weights being 127 times its scale.
`ops.layers.Linear` takes either. Tables of words, the head, norms, biases, projector and towers keep their dtype: of a
7B model they are 8 % of the weights.

Axis letters: i inputs, o outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int8

from sparsevlm_jax.config import QUANTIZATIONS
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.names import DECODER, Entry

ParamPath = tuple[str, ...]
_WEIGHT = re.compile(rf"{DECODER}/layers_\d+/.+/weight")
_LARGEST = 127
_SMALLEST = 1e-30  # of an output's largest weight: what divides by the scale must not divide by zero


def check_quantize(quantize: str | None) -> None:
    """Refuses a name that is none.

    Raises:
      UserError: it is not in QUANTIZATIONS.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise UserError(f'quantize="{quantize}" is not supported: choose {", ".join(QUANTIZATIONS)}')


def scale_of(path: ParamPath, quantize: str | None = "int8") -> ParamPath | None:
    """Where the scale of a weight in eight bits stands; None for all parameters that are not held so."""
    return (*path[:-1], "scale") if quantize and _WEIGHT.fullmatch("/".join(path)) else None


def held_as(path: ParamPath, parameter: Array | np.ndarray, quantize: str | None) -> dict[ParamPath, Any]:
    """What holds a parameter, by path: itself, or values and scale."""
    scale = scale_of(path, quantize)
    return {path: parameter} if scale is None else dict(zip((path, scale), in_eight_bits(parameter), strict=True))


def quantize_params(params: Mapping[str, Any], quantize: str | None = "int8") -> dict[str, Any]:
    """A parameter tree with its weights in eight bits; everything else is the same array."""
    flat: dict[ParamPath, Any] = dict(traverse_util.flatten_dict(params))
    parts: dict[ParamPath, Array] = {}
    for path, leaf in flat.items():
        parts |= held_as(path, leaf, quantize)
    return traverse_util.unflatten_dict(parts)


def quantization_of(params: Mapping[str, Any]) -> str | None:
    """How the weights of a parameter tree are held; None as they always were."""
    return "int8" if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(params)) else None


def entries_held(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of a model's parameters as its weights are in eight bits: a scale behind each of these."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        found[name] = entry
        if (path := scale_of(entry.path)) is not None:
            found[f"{name}_scale"] = Entry(f"{name}_scale", path, entry.shape[:1])
    return found


@jax.jit
def in_eight_bits(weight: Float[Array, "o i"]) -> tuple[Int8[Array, "o i"], Float[Array, "o"]]:
    """The nearest values, and the scale of each output."""
    wide = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=1), _SMALLEST) / _LARGEST
    return jnp.round(wide / scale.reshape(-1, 1)).astype(jnp.int8), scale
