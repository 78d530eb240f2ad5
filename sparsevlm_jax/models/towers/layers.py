"""What the vision transformers share: their layers, and how hidden states are chosen.

Axis letters: m images, v tokens of an image, d width, n heads, h head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsevlm_jax.config import TowerConfig
from sparsevlm_jax.ops.attention import attend
from sparsevlm_jax.ops.layers import ACTIVATIONS, LayerNorm, Linear, initial_weight

# (query [m v n h], key [m v n h], v of each image [m]) -> how much each token is looked at [m v], float32
Saliency = Callable[[Array, Array, Array], Array]


class PatchEmbedding(nn.Module):
    """One vector for each patch: a convolution whose windows stand side by side. A last, partial patch is not seen."""

    config: TowerConfig
    use_bias: bool

    @nn.compact
    def __call__(self, pixels: Float[Array, "m channels height width"]) -> Float[Array, "m rows columns d"]:
        c = self.config
        patch = (c.patch_size, c.patch_size)
        weight = self.param("weight", initial_weight, (c.hidden_size, c.num_channels, *patch))
        patches = jax.lax.conv_general_dilated(
            pixels.astype(weight.dtype),
            weight,
            window_strides=patch,
            padding="VALID",
            dimension_numbers=("NCHW", "OIHW", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        if not self.use_bias:
            return patches
        bias = self.param("bias", nn.initializers.zeros, (c.hidden_size,))
        return patches + bias.reshape(1, 1, 1, -1)


class TowerAttention(nn.Module):
    """Bidirectional multi-head attention with biases."""

    config: TowerConfig

    def setup(self) -> None:
        width = self.config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, use_bias=True) for _ in range(4))

    def __call__(
        self, x: Float[Array, "m v d"], saliency: Saliency | None
    ) -> tuple[Float[Array, "m v d"], Float[Array, "m v"] | None]:
        """Attended values, and the tokens' saliency where it is asked for."""
        heads = (*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)
        query, key, value = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        lengths = jnp.full((x.shape[0],), x.shape[1], jnp.int32)
        attended = attend(query, key, value, lengths, causal=False, implementation="auto")
        looked_at = None if saliency is None else saliency(query, key, lengths)
        return self.out_proj(attended.reshape(x.shape)), looked_at


class TowerMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    config: TowerConfig

    def setup(self) -> None:
        self.fc1 = Linear(self.config.intermediate_size, use_bias=True)
        self.fc2 = Linear(self.config.hidden_size, use_bias=True)

    def __call__(self, x: Float[Array, "m v d"]) -> Float[Array, "m v d"]:
        return self.fc2(ACTIVATIONS[self.config.hidden_act](self.fc1(x)))


class TowerLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    config: TowerConfig

    def setup(self) -> None:
        self.layer_norm1 = LayerNorm(self.config.layer_norm_eps)
        self.self_attn = TowerAttention(self.config)
        self.layer_norm2 = LayerNorm(self.config.layer_norm_eps)
        self.mlp = TowerMLP(self.config)

    def __call__(
        self, x: Float[Array, "m v d"], saliency: Saliency | None
    ) -> tuple[Float[Array, "m v d"], Float[Array, "m v"] | None]:
        attended, looked_at = self.self_attn(self.layer_norm1(x), saliency)
        x = x + attended
        return x + self.mlp(self.layer_norm2(x)), looked_at


def run_layers(
    x: Float[Array, "m v d"],
    layers: Sequence[TowerLayer],
    post_layernorm: LayerNorm,
    feature_layers: Sequence[int],
    saliency: Saliency,
    *,
    every: bool,
) -> tuple[Float[Array, "m v d_all"], Float[Array, "m v"]]:
    """Runs a tower from its embedding to the last hidden state that is asked for.

    Args:
      x: its embedding, hidden state 0.
      layers: all of the tower's.
      post_layernorm: in every checkpoint, but no hidden state that is asked for passes through it.
      feature_layers: numbers of hidden states; negative ones count from the last layer.
      saliency: what is asked of the last layer that runs.
      every: run all layers and the norm, to initialise them.

    Returns:
      Hidden states, concatenated along d, and saliency: zeros where no layer runs.
    """
    wanted = [layer % (len(layers) + 1) for layer in feature_layers]
    run = len(layers) if every else max(wanted)
    hidden, looked_at = [x], jnp.zeros(x.shape[:2], jnp.float32)
    for number, layer in enumerate(layers[:run], start=1):
        asked = saliency if number == run else None
        if every:
            x, found = layer(x, asked)
        else:
            x, found = _run_layer(layer.variables["params"], x, layer.config, asked)
        looked_at = looked_at if found is None else found
        hidden.append(x)
    if every:
        post_layernorm(x)
    return jnp.concatenate([hidden[layer] for layer in wanted], axis=-1), looked_at


@partial(jax.jit, static_argnames=("config", "saliency"))
def _run_layer(
    params: Any, x: Float[Array, "m v d"], config: TowerConfig, saliency: Saliency | None
) -> tuple[Float[Array, "m v d"], Float[Array, "m v"] | None]:
    """A function of its own, which jax traces once for all layers; XLA sees through it."""
    found = TowerLayer(config, parent=None).apply({"params": params}, x, saliency)
    return cast(tuple[Array, Array | None], found)


def resize_positions(table: Float[Array, "_v d"], old: int, new: int) -> Float[Array, "v d"]:
    """Position embeddings of old x old patches for new x new ones, bicubic, in float32."""
    square = table.astype(jnp.float32).reshape(old, old, -1)
    return jax.image.resize(square, (new, new, square.shape[-1]), "cubic").reshape(new * new, -1)
