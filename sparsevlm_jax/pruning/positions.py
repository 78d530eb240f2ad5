"""Where rotary positions are decided: of a prompt, after a cut, and of every new token.

By what angles a position turns the channels is another matter: `rotary` and `ops.rope`.

Axis letters: b batch, l sequence length, a axes of a position (one for text; three, for time, height and width, in
M-RoPE).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsevlm_jax.pruning.settings import Sparsity


def prompt_positions(given: Int[Array, "b l a"] | None, shape: tuple[int, ...], axes: int) -> Int[Array, "b l a"]:
    """Those that a prompt brings along (M-RoPE's), else 0, 1, 2, ... on every axis."""
    return counted(shape, axes) if given is None else given


def counted(shape: tuple[int, ...], axes: int) -> Int[Array, "b l a"]:
    """0, 1, 2, ... on every axis.

    Args:
      shape: rows and columns.
    """
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :, None], (*shape, axes))


def renumbers(sparsity: Sparsity) -> bool:
    """Whether what is left after a cut is counted anew (v1, v1.5), or stands where it stood (v2.0)."""
    return sparsity.positions == "renumber"


def after_cut(
    held: Int[Array, "b l a"], carry: Callable[[Array], Array], shape: tuple[int, ...], *, renumber: bool
) -> Int[Array, "b m a"]:
    """Of the shorter sequence.

    Args:
      held: those before the cut.
      carry: takes values of the old sequence along to the new one; a merged token gets those of its cluster's centre.
      shape: rows and columns of the new sequence.
      renumber: see `renumbers`.
    """
    return counted(shape, held.shape[2]) if renumber else carry(held)


def next_positions(
    held: Int[Array, "b"], lengths: Int[Array, "b"], given: Int[Array, "b"] | None, sparsity: Sparsity
) -> Int[Array, "b"]:
    """Of the first new token in the layers of a stage; every further one stands one behind.

    Args:
      held: tokens in these layers: the position of the next one where survivors are renumbered.
      lengths: tokens of the prompt as it was: the position where they are kept,
      given: unless the prompt says what stands behind it.
    """
    behind = lengths if given is None else given
    return held if renumbers(sparsity) else behind.astype(jnp.int32)


def on_all_axes(positions: Int[Array, "b"], axes: int) -> Int[Array, "b 1 a"]:
    """A decoded token stands at the same position on every axis."""
    return jnp.broadcast_to(positions[:, None, None], (len(positions), 1, axes))
