"""A pruning step: score, select, recycle, rebuild.

Axis letters: b batch, l sequence length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sparsevlm_jax.ops.attention import padded_length
from sparsevlm_jax.pruning.budgets import kept_table
from sparsevlm_jax.pruning.frames import take_turns
from sparsevlm_jax.pruning.methods import METHODS, PruningContext, Scores
from sparsevlm_jax.pruning.plan import Plan, StagePlan
from sparsevlm_jax.pruning.positions import renumbers
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.pruning.sparsify import Recycled, Selection, Tokens, rebuild, recycle, select, take


class PruningStep(NamedTuple):
    """One pruning layer, recorded: what scored how, what was chosen, and the sequence after it."""

    layer: int
    before: Tokens  # the layer's output, which was scored and pruned
    scores: Scores
    selection: Selection
    recycled: Recycled | None
    source: Int[Array, "b _length"]  # of every token after it: see `rebuild`
    after: Tokens


def kept_by_row(plan: Plan, visual: Int[Array, "b"], lengths: Int[Array, "b"]) -> tuple[Int[Array, "b"], ...] | None:
    """How many tokens rows of so many visual ones keep at each pruning layer; None where the plan's counts hold.

    A row whose number the plan does not know follows the largest below it that it does; where there is none it keeps
    nothing.

    Args:
      lengths: all tokens of each row, of which the others are text.
    """
    if plan.rows is None:
        return None
    counts, texts, table = plan.rows.counts, plan.rows.texts, kept_table(plan)
    number = jnp.minimum((visual - counts[0]) // counts.step, len(counts) - 1)
    row = number
    if len(texts) > 1:
        text = jnp.searchsorted(jnp.asarray(texts[:-1], jnp.int32), lengths - visual)
        row = text.astype(jnp.int32) * len(counts) + number
    return tuple(jnp.where(number < 0, 0, jnp.asarray(kept, jnp.int32)[row]) for kept in table.T)


def length_after(stage: StagePlan, text: int, columns: int) -> int:
    """Columns of the sequence behind a stage: `text` for tokens that are not visual, those of the visual tokens left,
    and what the backend adds (`ops.attention.padded_length`); never more than its own `columns`."""
    return min(padded_length(text + stage.standing), columns)


def prune(layer: PruningContext, sparsity: Sparsity, jitter: Array | None) -> tuple[Tokens, PruningStep]:
    """Scores, selects, recycles, and rebuilds the sequence after one layer."""
    tokens, stage = layer.tokens, layer.stage
    score = METHODS[sparsity.method].score
    assert score is not None and stage.keep is not None
    with jax.named_scope("score"):
        scores = score(layer, sparsity)
    with jax.named_scope("select"):
        kept_count = layer.kept if scores.keep is None else scores.keep
        dropped = tokens.visual_count - kept_count
        pool, clusters = (
            jnp.asarray(counts, jnp.int32)[dropped] for counts in sparsity.recycled(np.arange(stage.visual + 1))
        )
        if tokens.keep is not None:
            # A row of a number that the plan does not know may drop more than those that it was made for.
            pool = jnp.minimum(pool, stage.pool)
            clusters = jnp.minimum(clusters, jnp.minimum(stage.clusters, stage.standing - kept_count))
        ranked = scores.values
        if tokens.frame is not None:
            ranked = take_turns(ranked, tokens.visual, tokens.frame)
        selection = select(ranked, tokens.visual, kept_count, pool, clusters, keep=stage.keep, pool=stage.pool)
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
        length = length_after(stage, tokens.rater_rows.shape[1], tokens.visual.shape[1])
        after, source = rebuild(tokens, selection, recycled, length=length, renumber=renumbers(sparsity))
    return after, PruningStep(stage.stop - 1, tokens, scores, selection, recycled, source, after)
