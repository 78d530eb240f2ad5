"""Llama decoder layers: Linen declares the parameters, arrays do the work.

Axis letters: b batch, l sequence length, d width, n heads, k key-value heads, h head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsevlm_jax.attention import apply_rope, exact
from sparsevlm_jax.config import TextConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # the exact, erf one
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

# (query [b l n h], key [b l k h], value [b l k h]) -> (attended [b l n h], whatever the caller wants back)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def _dot_general(lhs: Array, rhs: Array, dims: Any, precision: Any = None, **options: Any) -> Array:
    return jax.lax.dot_general(lhs, rhs, dims, precision=exact(lhs.dtype), **options)


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
    """x / sqrt(mean(x²) + eps) * scale, in float32, cast back before the scale as Hugging Face's Llama does."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), x.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class Attention(nn.Module):
    """Projections of grouped-query attention; the attention itself is the caller's."""

    config: TextConfig

    def setup(self) -> None:
        c = self.config
        self.q_proj = linear(c.num_attention_heads * c.head_dim, c.attention_bias)
        self.k_proj = linear(c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.v_proj = linear(c.num_key_value_heads * c.head_dim, c.attention_bias)
        self.o_proj = linear(c.hidden_size, c.attention_bias)

    def __call__(
        self, x: Float[Array, "b l d"], positions: Int[Array, "b l"], attend: Attend
    ) -> tuple[Float[Array, "b l d"], Any]:
        for_query, for_key, for_value = apart(x, 3)
        query, key = self.queries_and_keys(for_query, for_key, positions)
        attended, extra = attend(query, key, self.v_proj(for_value).reshape(*x.shape[:2], -1, self.config.head_dim))
        return self.o_proj(attended.reshape(*x.shape[:2], -1)), extra

    def queries_and_keys(
        self, for_query: Float[Array, "b l d"], for_key: Float[Array, "b l d"], positions: Int[Array, "b l"]
    ) -> tuple[Float[Array, "b l n h"], Float[Array, "b l k h"]]:
        """Rotated, by head. Both get one input, `apart`."""
        c = self.config
        heads = (*for_query.shape[:2], -1, c.head_dim)
        query = apply_rope(self.q_proj(for_query).reshape(heads), positions, c.rope_theta)
        return query, apply_rope(self.k_proj(for_key).reshape(heads), positions, c.rope_theta)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    config: TextConfig

    def setup(self) -> None:
        c = self.config
        self.gate_proj = linear(c.intermediate_size, c.mlp_bias)
        self.up_proj = linear(c.intermediate_size, c.mlp_bias)
        self.down_proj = linear(c.hidden_size, c.mlp_bias)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        for_gate, for_up = apart(x, 2)
        return self.down_proj(ACTIVATIONS[self.config.hidden_act](self.gate_proj(for_gate)) * self.up_proj(for_up))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: TextConfig

    def setup(self) -> None:
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.self_attn = Attention(self.config)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.mlp = MLP(self.config)

    def __call__(
        self, x: Float[Array, "b l d"], positions: Int[Array, "b l"], attend: Attend
    ) -> tuple[Float[Array, "b l d"], Any]:
        attended, extra = self.self_attn(self.input_layernorm(x), positions, attend)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), extra

    def queries_and_keys(
        self, x: Float[Array, "b l d"], positions: Int[Array, "b l"]
    ) -> tuple[Float[Array, "b l n h"], Float[Array, "b l k h"]]:
        """What this layer would ask and answer to on an input, without running it."""
        for_query, for_key = apart(self.input_layernorm(x), 2)
        return self.self_attn.queries_and_keys(for_query, for_key, positions)


class Llama(nn.Module):
    """Embedding table, decoder layers, final norm and head: the parts, which `llava` runs stage by stage."""

    config: TextConfig

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size)
        self.layers = [DecoderLayer(c) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = linear(c.vocab_size, use_bias=False)

    def queries_and_keys(
        self, layer: int, x: Float[Array, "b l d"], positions: Int[Array, "b l"]
    ) -> tuple[Float[Array, "b l n h"], Float[Array, "b l k h"]]:
        """Of a layer that has not run yet."""
        return self.layers[layer].queries_and_keys(x, positions)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        """Final norm and head, in float32."""
        normed = self.norm(hidden)
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding
            return jnp.einsum("...d,vd->...v", normed, table, precision=exact(table.dtype)).astype(jnp.float32)
        return self.lm_head(normed).astype(jnp.float32)
