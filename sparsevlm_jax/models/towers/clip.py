"""CLIP's vision tower.

Axis letters: m images, v patches (and the class token), d width, n heads, h head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsevlm_jax.config import VisionConfig
from sparsevlm_jax.models.towers.layers import PatchEmbedding, TowerLayer, resize_positions, run_layers
from sparsevlm_jax.ops.attention import attention_rows
from sparsevlm_jax.ops.layers import LayerNorm


class ClipTower(nn.Module):
    """CLIP vision transformer; returns the hidden states that LLaVA asks for."""

    config: VisionConfig
    feature_layers: tuple[int, ...]  # hidden states, 0 the embedding; negative ones count from the last layer

    def setup(self) -> None:
        c = self.config
        self.class_embedding = self.param("class_embedding", nn.initializers.normal(0.02), (c.hidden_size,))
        self.patch_embedding = PatchEmbedding(c, use_bias=False)
        self.position_embedding = nn.Embed(c.grid**2 + 1, c.hidden_size)
        self.pre_layernorm = LayerNorm(c.layer_norm_eps)
        self.layers = [TowerLayer(c) for _ in range(c.num_hidden_layers)]
        self.post_layernorm = LayerNorm(c.layer_norm_eps)

    def __call__(
        self, pixel_values: Float[Array, "m 3 height width"]
    ) -> tuple[Float[Array, "m v d"], Float[Array, "m v"]]:
        """Hidden states, class token first, concatenated over `feature_layers` along d; and how much the class token
        looks at each token in the last layer that runs.

        Images smaller than the configuration's get position embeddings interpolated to their grid.
        """
        parts, every = (self.layers, self.post_layernorm), self.is_initializing()
        return run_layers(self.embed(pixel_values), *parts, self.feature_layers, _look_of_class_token, every=every)

    def embed(self, pixel_values: Float[Array, "m 3 height width"]) -> Float[Array, "m v d"]:
        """Patches behind the class token, plus positions, normalised ("pre_layrnorm" in Hugging Face's spelling)."""
        positions = self.position_embedding.embedding
        patches = self.patch_embedding(pixel_values)
        images, grid, _, width = patches.shape
        if grid != self.config.grid:
            positions = _interpolate_positions(positions, self.config.grid, grid)
        first = jnp.broadcast_to(self.class_embedding[None, None, :], (images, 1, width))
        x = jnp.concatenate([first, patches.reshape(images, grid * grid, width)], axis=1) + positions[None]
        return self.pre_layernorm(x)


def _look_of_class_token(
    query: Float[Array, "m v n h"], key: Float[Array, "m v n h"], lengths: Int[Array, "m"]
) -> Float[Array, "m v"]:
    """How much the class token looks at each token, mean over heads."""
    whole_row = lengths[:, None] - 1  # the class token sees every token, as the last row of a causal mask does
    return jnp.mean(attention_rows(query[:, :1], key, whole_row, lengths), axis=(1, 2))


def _interpolate_positions(table: Float[Array, "_v d"], old: int, new: int) -> Float[Array, "v d"]:
    """Position embeddings of another grid; the class token's stays."""
    resized = resize_positions(table[1:], old, new)
    return jnp.concatenate([table[:1], resized.astype(table.dtype)])
