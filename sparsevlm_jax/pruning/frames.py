"""Frames of a video that compete each for itself. Ours: neither the papers nor the released code know them.

Axis letters: b batch, l sequence length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def take_turns(
    scores: Float[Array, "b l"], visual: Bool[Array, "b l"], frame: Int[Array, "b l"]
) -> Float[Array, "b l"]:
    """Scores by which a top-k takes the best token of every frame, then the second best of every frame, and so on.

    Within such a round the better score comes first; a frame that has no token left is passed over. Not in the papers
    nor in the released code, which lets all frames compete.
    """

    def of_row(scores: Array, visual: Array, frame: Array) -> Array:
        places = jnp.arange(len(scores))
        falling = jnp.where(visual, -(scores + 0.0), jnp.inf)
        by_frame = jnp.lexsort((falling, frame, ~visual))
        first = jnp.concatenate([jnp.ones(1, bool), jnp.diff(frame[by_frame]) != 0])
        turn = places - jax.lax.cummax(jnp.where(first, places, 0))
        order = jnp.lexsort((falling, jnp.zeros_like(places).at[by_frame].set(turn), ~visual))
        return jnp.zeros(len(scores), jnp.float32).at[order].set(-places.astype(jnp.float32))  # 16 bit count to 256

    return jax.vmap(of_row)(scores, visual, frame)
