"""Layers that every tower and decoder is made of: Linen declares the parameters, arrays do the work.

Axis letters: b batch, d width, i inputs, o outputs, r rows of all batches.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from sparsevlm_jax.ops.attention import exact, on_one_cpu

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # the exact, erf one
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
FEW = 32  # rows, at most, whose product with a weight in eight bits takes it block by block on CPUs
BLOCK = 2**16  # values of such a weight that become floats at a time


def apart(x: Array, uses: int) -> list[Array]:
    """The same array several times over, as values that XLA does not know to be equal.

    Products of one value with several matrices are otherwise merged on GPUs by joining the matrices first, at every
    call: 1.4 ms of LLaVA-1.5-7B's prefill on an H100. What computes the value is not repeated for each use, either.
    """
    return jax.lax.optimization_barrier([x] * uses)


class Linear(nn.Module):
    """x @ weight.T + bias in the dtype of x; float32 is computed as float32 on every backend.

    The weight is [outputs, inputs], as checkpoints store it: a CPU reads it faster so than a kernel of Flax, [inputs,
    outputs] (benchmarks/NOTES.md, 37). It may be in eight bits: then its `scale` stands beside it (`models.quantize`).
    """

    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        weight = self.param("weight", initial_weight, (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        scale = self.get_variable("params", "scale")
        if scale is None:
            x, weight, bias = promote_dtype(x, weight, bias, dtype=None)
        made = product(x, weight, scale)
        return made if bias is None else made + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def initial_weight(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """A weight [outputs, inputs, ...], drawn in the order of Flax's kernels: a seed means the same numbers as there."""
    outputs, inputs, *window = shape
    drawn = nn.initializers.lecun_normal()(key, (*window, inputs, outputs), dtype)
    return jnp.moveaxis(drawn, (-1, -2), (0, 1))


def product(x: Float[Array, "*b i"], weight: Array, scale: Float[Array, "o"] | None) -> Float[Array, "*b o"]:
    """x @ weight.T as `Linear` computes it, of one dtype, or with the weight [o, i] in eight bits and its scale."""
    return _dot(x, weight, x.dtype) if scale is None else scaled_product(x, weight, scale)


def scaled_product(
    x: Float[Array, "*b i"], values: Int8[Array, "o i"], scale: Float[Array, "o"]
) -> Float[Array, "*b o"]:
    """x @ values.T * scale: the product with the values in the dtype of x, then the scale in float32.

    Accelerators read the values as they are, in the kernel of the product. XLA's CPU backend would write all of them
    as floats first, at every token: there a few rows take them block by block, as fit a core's cache.
    """
    rows = x.reshape(-1, x.shape[-1])
    if on_one_cpu() and len(rows) <= FEW:
        made = _product_in_blocks(rows, values).reshape(*x.shape[:-1], -1)
    else:
        # Sums of such values overflow in float16.
        made = _dot(x, values, jnp.float32 if x.dtype == jnp.float16 else x.dtype)
    return (made.astype(jnp.float32) * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


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


def _product_in_blocks(x: Float[Array, "r i"], values: Int8[Array, "o i"]) -> Float[Array, "r o"]:
    """`_dot` in float32, some outputs at a time."""
    outputs, inputs = values.shape
    size = next(n for n in range(min(outputs, max(1, BLOCK // inputs)), 0, -1) if outputs % n == 0)
    made = jax.lax.map(lambda block: _dot(x, block, jnp.float32), values.reshape(-1, size, inputs))
    return made.swapaxes(0, 1).reshape(len(x), outputs)


def _dot(x: Float[Array, "*b i"], weight: Array, dtype: DTypeLike) -> Float[Array, "*b o"]:
    """x @ weight.T, the weight [o, i] as the dtype of x, summed in `dtype`."""
    return jax.lax.dot_general(
        x,
        weight.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=exact(x.dtype),
        preferred_element_type=dtype,
    )
