"""A pruning method of your own: keep the visual tokens with the longest hidden states. Importing it adds it."""

import jax.numpy as jnp

import sparsevlm_jax as sv
from sparsevlm_jax.pruning.methods import Method, PruningContext, Scores


def score_by_length(layer: PruningContext, sparsity: sv.Sparsity) -> Scores:
    """Scores of all tokens of the layer's output, [b, l]; the visual tokens with the highest stay."""
    return Scores(jnp.linalg.norm(layer.tokens.hidden.astype(jnp.float32), axis=-1))


LOUD = Method(
    settings=sv.Sparsity("loud", sv.Budget(layers=(1, 3), ratio=0.5), positions="keep"),
    score=score_by_length,
    source="an example: half of what is left after layers 1 and 3; the dropped are merged, positions kept",
)
sv.METHODS[LOUD.name] = LOUD
