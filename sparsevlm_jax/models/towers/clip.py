"""CLIP vision tower and LLaVA's projector.

Axis letters: m images, v patches (and the class token), d width, n heads, h head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsevlm_jax.config import VisionConfig
from sparsevlm_jax.ops.attention import attend, attention_rows
from sparsevlm_jax.ops.layers import ACTIVATIONS, LayerNorm, linear


class TowerAttention(nn.Module):
    """Bidirectional multi-head attention with biases."""

    config: VisionConfig

    def setup(self) -> None:
        width = self.config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear(width, use_bias=True) for _ in range(4))

    def __call__(self, x: Float[Array, "m v d"]) -> tuple[Float[Array, "m v d"], Float[Array, "m v"]]:
        """Attended values, and how much the class token looks at each token (mean over heads, float32)."""
        heads = (*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)
        query, key, value = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        lengths = jnp.full((x.shape[0],), x.shape[1], jnp.int32)
        attended = attend(query, key, value, lengths, causal=False, implementation="xla")
        whole_row = lengths[:, None] - 1  # the class token sees every token, as the last row of a causal mask does
        class_row = jnp.mean(attention_rows(query[:, :1], key, whole_row, lengths), axis=(1, 2))
        return self.out_proj(attended.reshape(x.shape)), class_row


class TowerMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    config: VisionConfig

    def setup(self) -> None:
        self.fc1 = linear(self.config.intermediate_size, use_bias=True)
        self.fc2 = linear(self.config.hidden_size, use_bias=True)

    def __call__(self, x: Float[Array, "m v d"]) -> Float[Array, "m v d"]:
        return self.fc2(ACTIVATIONS[self.config.hidden_act](self.fc1(x)))


class TowerLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: VisionConfig

    def setup(self) -> None:
        self.layer_norm1 = LayerNorm(self.config.layer_norm_eps)
        self.self_attn = TowerAttention(self.config)
        self.layer_norm2 = LayerNorm(self.config.layer_norm_eps)
        self.mlp = TowerMLP(self.config)

    def __call__(self, x: Float[Array, "m v d"]) -> tuple[Float[Array, "m v d"], Float[Array, "m v"]]:
        attended, class_row = self.self_attn(self.layer_norm1(x))
        x = x + attended
        return x + self.mlp(self.layer_norm2(x)), class_row


class Tower(nn.Module):
    """CLIP vision transformer; returns the hidden states that LLaVA asks for."""

    config: VisionConfig
    feature_layers: tuple[int, ...]  # hidden states, 0 the embedding; negative ones count from the last layer

    def setup(self) -> None:
        c = self.config
        patch = (c.patch_size, c.patch_size)
        self.class_embedding = self.param("class_embedding", nn.initializers.normal(0.02), (c.hidden_size,))
        self.patch_embedding = nn.Conv(
            c.hidden_size, patch, strides=patch, padding="VALID", use_bias=False, precision=jax.lax.Precision.HIGHEST
        )
        self.position_embedding = nn.Embed(c.grid**2 + 1, c.hidden_size)
        self.pre_layernorm = LayerNorm(c.layer_norm_eps)
        self.layers = [TowerLayer(c) for _ in range(c.num_hidden_layers)]
        self.post_layernorm = LayerNorm(c.layer_norm_eps)  # in every checkpoint; LLaVA's features leave it out

    def __call__(
        self, pixel_values: Float[Array, "m 3 height width"]
    ) -> tuple[Float[Array, "m v d"], Float[Array, "m v"]]:
        """Hidden states, class token first, concatenated over `feature_layers` along d; and how much the class token
        looks at each token in the last layer that runs.

        Pictures smaller than the configuration's get position embeddings interpolated to their grid.
        """
        depth = self.config.num_hidden_layers
        wanted = [layer % (depth + 1) for layer in self.feature_layers]
        run = depth if self.is_initializing() else max(wanted)
        x = self.embed(pixel_values)
        hidden, class_row = [x], jnp.zeros(x.shape[:2], jnp.float32)
        for layer in self.layers[:run]:
            x, class_row = layer(x)
            hidden.append(x)
        if self.is_initializing():
            self.post_layernorm(x)
        return jnp.concatenate([hidden[layer] for layer in wanted], axis=-1), class_row

    def embed(self, pixel_values: Float[Array, "m 3 height width"]) -> Float[Array, "m v d"]:
        """Patches behind the class token, plus positions, normalised ("pre_layrnorm" in Hugging Face's spelling)."""
        positions = self.position_embedding.embedding
        patches = self.patch_embedding(jnp.transpose(pixel_values, (0, 2, 3, 1)).astype(positions.dtype))
        images, grid, _, width = patches.shape
        if grid != self.config.grid:
            positions = _interpolate_positions(positions, self.config.grid, grid)
        first = jnp.broadcast_to(self.class_embedding[None, None, :], (images, 1, width))
        x = jnp.concatenate([first, patches.reshape(images, grid * grid, width)], axis=1) + positions[None]
        return self.pre_layernorm(x)


def _interpolate_positions(table: Float[Array, "_v d"], old: int, new: int) -> Float[Array, "v d"]:
    """Position embeddings of another grid, bicubic; the class token's stays."""
    square = table[1:].astype(jnp.float32).reshape(old, old, -1)
    resized = jax.image.resize(square, (new, new, square.shape[-1]), "cubic").reshape(new * new, -1)
    return jnp.concatenate([table[:1], resized.astype(table.dtype)])
