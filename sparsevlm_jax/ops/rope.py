"""Rotary position embedding of queries and keys.

Axis letters: b batch, l sequence length, n heads, h head dim, a axes of a position (one for text; three, for time,
height and width, in M-RoPE).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsevlm_jax.rotary import Rope


def turn(positions: Int[Array, "b l a"], rope: Rope) -> tuple[Float[Array, "b l half"], Float[Array, "b l half"]]:
    """Cosine and sine of every pair's angle, float32: position on the pair's axis times its frequency."""
    axes = sorted(set(rope.axes))
    on_axis = positions.astype(jnp.float32)
    on_axis = on_axis[..., axes[0] : axes[0] + 1] if len(axes) == 1 else on_axis[..., np.asarray(rope.axes)]
    angles = on_axis * np.asarray(rope.frequencies, np.float32)[None, None, :]
    if rope.scale == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * np.float32(rope.scale), jnp.sin(angles) * np.float32(rope.scale)


def apply_rope(x: Float[Array, "b l n h"], positions: Int[Array, "b l a"], rope: Rope) -> Float[Array, "b l n h"]:
    """Rotates queries or keys by their positions; channel i pairs with i + h/2, as in Hugging Face's Llama."""
    cos, sin = (table[:, :, None, :] for table in turn(positions, rope))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
