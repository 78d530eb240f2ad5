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
from sparsevlm_jax.pruning.plan import Plan, Rows, StagePlan
from sparsevlm_jax.pruning.positions import renumbers
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.pruning.sparsify import Recycled, Selection, rebuild, recycle, select, take
from sparsevlm_jax.pruning.tokens import Counts, Tokens


class PruningStep(NamedTuple):
    """One pruning layer, recorded: what scored how, what was chosen, and the sequence after it."""

    layer: int
    before: Tokens  # the layer's output, which was scored and pruned
    scores: Scores
    selection: Selection
    recycled: Recycled | None
    source: Int[Array, "b _length"]  # of every token after it: see `rebuild`
    after: Tokens


def counts_ahead(plan: Plan, visual: Int[Array, "b"], lengths: Int[Array, "b"]) -> tuple[Counts, ...] | None:
    """What becomes of each row's visual tokens at every pruning layer; None where data decides that.

    All are looked up at once, behind a barrier: every kernel that masks by one would look it up again.

    Args:
      lengths: all tokens of each row, of which the others are text.
    """
    if METHODS[plan.sparsity.method].counts_are_bounds:
        return None
    if len(plan.stages) == 1:
        return ()
    texts = () if plan.rows is None else plan.rows.texts[:-1]
    text = jnp.searchsorted(jnp.asarray(texts, jnp.int32), lengths - visual)
    found = jax.lax.optimization_barrier(jnp.asarray(counts_table(plan), jnp.int32)[text, visual])
    return tuple(Counts(*(found[:, number, which] for which in range(3))) for number in range(found.shape[1]))


def counts_table(plan: Plan) -> Int[np.ndarray, "t v p 3"]:
    """`Counts` at each pruning layer of a row with so many visual tokens, for each of the lengths of text that
    `plan.rows` counts rows with.

    A row whose number the plan does not know follows the largest below it that it does; where there is none it keeps
    nothing.
    """
    standing = np.arange(plan.visual_tokens + 1)[None, :]
    asked = None if plan.rows is None else _kept_of_all(plan, plan.rows)
    found = []
    for number, stage in enumerate(plan.stages[:-1]):
        assert stage.keep is not None
        if asked is None:
            kept = np.minimum(stage.keep, np.maximum(standing - 1, 0))
        else:
            kept = np.minimum(asked[:, :, number], standing)
        pool, clusters = plan.sparsity.recycled(standing - kept)
        if asked is not None:
            # A row of a number that the plan does not know may drop more than those that it was made for.
            pool = np.minimum(pool, stage.pool)
            clusters = np.minimum(clusters, np.minimum(stage.clusters, stage.standing - kept))
        found.append(np.stack([kept, pool, clusters], axis=-1))
        standing = kept + clusters
    return np.stack(found, axis=2)


def _kept_of_all(plan: Plan, rows: Rows) -> Int[np.ndarray, "t v p"]:
    """What rows of every number of visual tokens are asked to keep, by their length of text."""
    table = kept_table(plan)
    by_text = table.reshape(-1, len(rows.counts), table.shape[1])
    numbers = np.minimum((np.arange(plan.visual_tokens + 1) - rows.counts[0]) // rows.counts.step, len(rows.counts) - 1)
    return np.where(numbers[None, :, None] < 0, 0, by_text[:, np.maximum(numbers, 0)])


def _counts(scores: Scores, tokens: Tokens, stage: StagePlan, sparsity: Sparsity) -> Counts:
    """Those of the plan, or, of a method whose score says how many tokens stay, what follows from that."""
    if (scores.keep is None) != (tokens.counts is not None):
        raise ValueError(f"{sparsity.method}: a score that gives `keep` and a bound, `kept_by_rank`, belong together")
    if tokens.counts is not None:
        return tokens.counts[0]
    assert scores.keep is not None
    dropped = tokens.visual_count - scores.keep
    pool, clusters = (
        jnp.asarray(counts, jnp.int32)[dropped] for counts in sparsity.recycled(np.arange(stage.visual + 1))
    )
    return Counts(scores.keep, pool, clusters)


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
        counts = _counts(scores, tokens, stage, sparsity)
        ranked = scores.values
        if tokens.frame is not None:
            ranked = take_turns(ranked, tokens.visual, tokens.frame)
        selection = select(ranked, tokens.visual, *counts, keep=stage.keep, pool=stage.pool)
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
