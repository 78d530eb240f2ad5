"""SigLIP's vision tower (arXiv 2303.15343): CLIP's without class token and first norm, its patch convolution biased.

Axis letters: m images, v patches, d width, n heads, h head dim.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsevlm_jax.config import SiglipConfig
from sparsevlm_jax.models.towers.layers import PatchEmbedding, TowerLayer, resize_positions, run_layers
from sparsevlm_jax.ops.attention import attention_rows
from sparsevlm_jax.ops.layers import LayerNorm


class SiglipTower(nn.Module):
    """SigLIP vision transformer without its pooling head; returns the hidden states that LLaVA asks for."""

    config: SiglipConfig
    feature_layers: tuple[int, ...]  # hidden states, 0 the embedding; negative ones count from the last layer

    def setup(self) -> None:
        c = self.config
        self.patch_embedding = PatchEmbedding(c, use_bias=True)
        self.position_embedding = nn.Embed(c.grid**2, c.hidden_size)
        self.layers = [TowerLayer(c) for _ in range(c.num_hidden_layers)]
        self.post_layernorm = LayerNorm(c.layer_norm_eps)

    def __call__(
        self, pixel_values: Float[Array, "m 3 height width"]
    ) -> tuple[Float[Array, "m v d"], Float[Array, "m v"]]:
        """Hidden states, concatenated over `feature_layers` along d; and how much each patch is looked at by all others
        in the last layer that runs.

        Images smaller than the configuration's get position embeddings interpolated to their grid.
        """
        parts, every = (self.layers, self.post_layernorm), self.is_initializing()
        return run_layers(self.embed(pixel_values), *parts, self.feature_layers, look_of_all_patches, every=every)

    def embed(self, pixel_values: Float[Array, "m 3 height width"]) -> Float[Array, "m v d"]:
        """Patches plus positions. What a last, partial patch would hold is not seen."""
        positions = self.position_embedding.embedding
        patches = self.patch_embedding(pixel_values)
        images, grid, _, width = patches.shape
        if grid != self.config.grid:
            positions = resize_positions(positions, self.config.grid, grid).astype(positions.dtype)
        return patches.reshape(images, grid * grid, width) + positions[None]


def look_of_all_patches(
    query: Float[Array, "m v n h"], key: Float[Array, "m v n h"], lengths: Int[Array, "m"]
) -> Float[Array, "m v"]:
    """Attention that each patch receives: mean over heads and over the patches that look, float32.

    A head at a time: [m, v, v] probabilities are the most that is held.
    """
    whole_rows = jnp.broadcast_to(lengths[:, None] - 1, key.shape[:2])  # as the last row of a causal mask

    def of_head(head: tuple[Array, Array]) -> Array:
        one_query, one_key = (x[:, :, None, :] for x in head)
        return jnp.mean(attention_rows(one_query, one_key, whole_rows, lengths), axis=(1, 2))

    by_head = (jnp.moveaxis(query, 2, 0), jnp.moveaxis(key, 2, 0))
    return jnp.mean(jax.lax.map(of_head, by_head), axis=0)
