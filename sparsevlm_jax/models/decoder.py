"""Llama decoder layers: Linen declares the parameters, arrays do the work.

Axis letters: b batch, l sequence length, d width, n heads, k key-value heads, h head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsevlm_jax.config import TextConfig
from sparsevlm_jax.ops.attention import exact
from sparsevlm_jax.ops.layers import ACTIVATIONS, Linear, RMSNorm, apart
from sparsevlm_jax.ops.rope import Rotation, rotate, rotation
from sparsevlm_jax.parallel.inside import divides, gathered, rows_of

# (query [b l n h], key [b l k h], value [b l k h]) -> (attended [b l n h], whatever the caller wants back)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def _norm(config: TextConfig) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, config.norm_offset)


class Attention(nn.Module):
    """Projections of grouped-query attention; the attention itself is the caller's."""

    config: TextConfig

    def setup(self) -> None:
        c = self.config
        self.q_proj = Linear(c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.hidden_size, c.out_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = _norm(c), _norm(c)

    def __call__(self, x: Float[Array, "b l d"], turned: Rotation, attend: Attend) -> tuple[Float[Array, "b l d"], Any]:
        for_query, for_key, for_value = apart(x, 3)
        query, key = self.queries_and_keys(for_query, for_key, turned)
        attended, extra = attend(query, key, self.v_proj(for_value).reshape(*x.shape[:2], -1, self.config.head_dim))
        return self.o_proj(attended.reshape(*x.shape[:2], -1)), extra

    def queries_and_keys(
        self, for_query: Float[Array, "b l d"], for_key: Float[Array, "b l d"], turned: Rotation
    ) -> tuple[Float[Array, "b l n h"], Float[Array, "b l k h"]]:
        """Rotated, by head. Both get one input, `apart`."""
        c = self.config
        heads = (*for_query.shape[:2], -1, c.head_dim)
        query, key = self.q_proj(for_query).reshape(heads), self.k_proj(for_key).reshape(heads)
        if c.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, turned), rotate(key, turned)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    config: TextConfig

    def setup(self) -> None:
        c = self.config
        self.gate_proj = Linear(c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.hidden_size, c.mlp_bias)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        for_gate, for_up = apart(x, 2)
        return self.down_proj(ACTIVATIONS[self.config.hidden_act](self.gate_proj(for_gate)) * self.up_proj(for_up))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: TextConfig

    def setup(self) -> None:
        self.input_layernorm = _norm(self.config)
        self.self_attn = Attention(self.config)
        self.post_attention_layernorm = _norm(self.config)
        self.mlp = MLP(self.config)

    def __call__(self, x: Float[Array, "b l d"], turned: Rotation, attend: Attend) -> tuple[Float[Array, "b l d"], Any]:
        attended, extra = self.self_attn(self.input_layernorm(x), turned, attend)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), extra

    def queries_and_keys(
        self, x: Float[Array, "b l d"], turned: Rotation
    ) -> tuple[Float[Array, "b l n h"], Float[Array, "b l k h"]]:
        """What this layer would ask and answer to on an input, without running it."""
        for_query, for_key = apart(self.input_layernorm(x), 2)
        return self.self_attn.queries_and_keys(for_query, for_key, turned)


class Llama(nn.Module):
    """Embedding table, decoder layers, final norm and head: the parts, which `stages` runs."""

    config: TextConfig

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size)
        self.layers = [DecoderLayer(c) for _ in range(c.num_hidden_layers)]
        self.norm = _norm(c)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.vocab_size, use_bias=False)

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l vocab"]:
        """Touches every parameter, for initialisation; nothing attends."""
        positions = jnp.zeros((*ids.shape, self.config.rope.position_axes), jnp.int32)
        hidden, turned = self.embed_words(ids), rotation(positions, self.config.rope)
        for layer in self.layers:
            hidden, _ = layer(hidden, turned, lambda query, key, value: (query, None))
        return self.logits(hidden)

    def embed_words(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """What ids enter the first layer as; visual tokens enter it as the projector makes them."""
        cut = divides(self.config.vocab_size)
        words = rows_of(self.embed_tokens.embedding, ids) if cut else self.embed_tokens(ids)
        return words * jnp.asarray(self.config.hidden_size**0.5, words.dtype) if self.config.embed_scale else words

    def queries_and_keys(
        self, layer: int, x: Float[Array, "b l d"], positions: Int[Array, "b l a"]
    ) -> tuple[Float[Array, "b l n h"], Float[Array, "b l k h"]]:
        """Of a layer that has not run yet."""
        return self.layers[layer].queries_and_keys(x, rotation(positions, self.config.rope))

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        """Final norm and head, in float32."""
        normed = self.norm(hidden)
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding
            found = jnp.einsum("...d,vd->...v", normed, table, precision=exact(table.dtype))
        else:
            found = self.lm_head(normed)
        return gathered(found).astype(jnp.float32)
