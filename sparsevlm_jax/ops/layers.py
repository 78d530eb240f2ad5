"""Layers that every tower and decoder is made of: Linen declares the parameters, arrays do the work.

Axis letters: b batch, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsevlm_jax.ops.attention import exact

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # the exact, erf one
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def apart(x: Array, uses: int) -> list[Array]:
    """The same array several times over, as values that XLA does not know to be equal.

    Products of one value with several matrices are otherwise merged on GPUs by joining the matrices first, at every
    call: 1.4 ms of LLaVA-1.5-7B's prefill on an H100. What computes the value is not repeated for each use, either.
    """
    return jax.lax.optimization_barrier([x] * uses)


def linear(features: int, use_bias: bool) -> nn.Dense:
    """A dense layer in the dtype of its input; float32 is computed as float32 on every backend."""
    return nn.Dense(features, use_bias=use_bias, dot_general=_dot_general)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * scale, in float32, cast back before the scale as Hugging Face's Llama does.

    With `offset` times 1 + scale, and cast back behind it, as Gemma does.
    """

    eps: float
    offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), x.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        shape = (1,) * (x.ndim - 1) + (-1,)
        if self.offset:
            return (normed * (1 + scale.astype(jnp.float32).reshape(shape))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.reshape(shape)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias in float32, cast back. Flax's own mixes dtypes in 16 bit."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        shape = (1,) * (x.ndim - 1) + (-1,)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), x.dtype).astype(jnp.float32).reshape(shape)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), x.dtype).astype(jnp.float32).reshape(shape)
        centred = x.astype(jnp.float32)
        centred -= jnp.mean(centred, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * (jax.lax.rsqrt(variance + self.eps) * scale) + bias).astype(x.dtype)


def _dot_general(lhs: Array, rhs: Array, dims: Any, precision: Any = None, **options: Any) -> Array:
    return jax.lax.dot_general(lhs, rhs, dims, precision=exact(lhs.dtype), **options)
