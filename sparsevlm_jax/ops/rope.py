"""Rotary position embedding of queries and keys.

Axis letters: b batch, l sequence length, n heads, h head dim, a axes of a position (one for text; three, for time,
height and width, in M-RoPE).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsevlm_jax.ops.attention import traced_for
from sparsevlm_jax.rotary import Rope

PIECES = 4  # of a sequence, whose angles a CPU computes in turn


class Rotation(NamedTuple):
    """Cosine and sine of the angle by which each pair of channels is turned, float32."""

    cos: Float[Array, "b l half"]
    sin: Float[Array, "b l half"]


def rotation(positions: Int[Array, "b l a"], rope: Rope) -> Rotation:
    """The angle of every pair: position on the pair's axis times its frequency."""
    axes = sorted(set(rope.axes))
    on_axis = positions.astype(jnp.float32)
    on_axis = on_axis[..., axes[0] : axes[0] + 1] if len(axes) == 1 else on_axis[..., np.asarray(rope.axes)]
    angles = on_axis * np.asarray(rope.frequencies, np.float32)[None, None, :]
    if rope.scale == 1.0:
        return Rotation(jnp.cos(angles), jnp.sin(angles))
    return Rotation(jnp.cos(angles) * np.float32(rope.scale), jnp.sin(angles) * np.float32(rope.scale))


def rotation_of_all(positions: Int[Array, "b l a"], rope: Rope) -> Rotation:
    """`rotation`, computed once: XLA would otherwise compute the cosines again for every head of every layer.

    On CPUs a barrier does not keep XLA from that, a loop does: over pieces of the sequence.
    """
    if traced_for() != "cpu":
        with jax.named_scope("rotary"):
            return jax.lax.optimization_barrier(rotation(positions, rope))
    batch, length, axes = positions.shape
    padded = jnp.pad(positions, ((0, 0), (0, -length % PIECES), (0, 0)))
    in_turn = jnp.moveaxis(padded.reshape(batch, PIECES, -1, axes), 1, 0)
    tables = jax.lax.map(lambda piece: rotation(piece, rope), in_turn)
    return Rotation(*(jnp.moveaxis(x, 0, 1).reshape(batch, -1, x.shape[-1])[:, :length] for x in tables))


def rotate(x: Float[Array, "b l n h"], by: Rotation) -> Float[Array, "b l n h"]:
    """Rotates queries or keys; channel i pairs with i + h/2, as in Hugging Face's Llama."""
    cos, sin = (table[:, :, None, :] for table in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def apply_rope(x: Float[Array, "b l n h"], positions: Int[Array, "b l a"], rope: Rope) -> Float[Array, "b l n h"]:
    """Rotates queries or keys by their positions."""
    return rotate(x, rotation(positions, rope))
