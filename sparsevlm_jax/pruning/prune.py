"""A pruning step: score, select, recycle, rebuild.

Axis letters: b batch, l sequence length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsevlm_jax.pruning.methods import METHODS, Layer, Scores
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.pruning.sparsify import Recycled, Selection, Tokens, rebuild, recycle, select, take


class Event(NamedTuple):
    """One pruning layer, recorded: what scored how, what was chosen, and the sequence after it."""

    layer: int
    before: Tokens  # the layer's output, which was scored and pruned
    scores: Scores
    selection: Selection
    recycled: Recycled | None
    source: Int[Array, "b _length"]  # of every token after it: see `rebuild`
    after: Tokens


def prune(layer: Layer, sparsity: Sparsity, jitter: Array | None) -> tuple[Tokens, Event]:
    """Scores, selects, recycles, and rebuilds the sequence after one layer."""
    tokens, stage = layer.tokens, layer.stage
    score = METHODS[sparsity.method].score
    assert score is not None and stage.keep is not None
    with jax.named_scope("score"):
        scores = score(layer, sparsity)
    with jax.named_scope("select"):
        kept_count = layer.kept if scores.keep is None else scores.keep
        dropped = jnp.sum(tokens.visual, axis=1) - kept_count
        most = range(stage.visual + 1)
        selection = select(
            scores.values,
            tokens.visual,
            kept_count,
            jnp.asarray([sparsity.pool(n) for n in most], jnp.int32)[dropped],
            jnp.asarray([sparsity.clusters(n) for n in most], jnp.int32)[dropped],
            keep=stage.keep,
            pool=stage.pool,
        )
    recycled = None
    with jax.named_scope("recycle"):
        if stage.clusters:
            recycled = recycle(
                take(tokens.hidden, selection.pool),
                selection.pool_count,
                selection.cluster_count,
                stage.clusters,
                None if jitter is None else take(jitter, selection.pool) * sparsity.jitter,
            )
    with jax.named_scope("rebuild"):
        length = stage.text_tokens(tokens.visual.shape[1]) + stage.standing
        renumber = sparsity.positions == "renumber"
        after, source = rebuild(tokens, selection, recycled, length=length, renumber=renumber)
    return after, Event(stage.stop - 1, tokens, scores, selection, recycled, source, after)
