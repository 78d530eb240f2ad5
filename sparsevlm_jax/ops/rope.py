"""Rotary position embedding.

Axis letters: b batch, l sequence length, n heads, h head dim.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_frequencies(head_dim: int, theta: float) -> Float[np.ndarray, "half_h"]:
    """Angular frequencies 1 / theta^(2i/h) of rotary position embedding, float32 (RoFormer, section 3.2.2).

    Made on the host and rounded as PyTorch rounds them, power first: v2.0 divides by sums of their cosines, which
    come near zero, so the last bit shows.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def apply_rope(x: Float[Array, "b l n h"], positions: Int[Array, "b l"], theta: float) -> Float[Array, "b l n h"]:
    """Rotates queries or keys by their positions; channel i pairs with i + h/2, as in Hugging Face's Llama."""
    frequencies = rope_frequencies(x.shape[-1], theta)
    angles = (positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :])[:, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
