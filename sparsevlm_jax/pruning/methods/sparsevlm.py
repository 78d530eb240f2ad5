"""SparseVLM (arXiv 2410.04417): the question's own words rate the patches.

Three generations, as released: v1 chooses the number of tokens from a matrix rank, v1.5 takes fixed numbers, v2.0
("SparseVLM+") corrects the attention for distance and listens to some heads only.

Axis letters: b batch, l sequence length, n heads, r raters, h head dim.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsevlm_jax.config import TextConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.ops.attention import traced_for
from sparsevlm_jax.ops.rope import apply_rope
from sparsevlm_jax.pruning.methods.base import Method, PruningContext, Scores
from sparsevlm_jax.pruning.options import HeadOptions, RankOptions
from sparsevlm_jax.pruning.settings import V1_PRUNING_LAYERS, Budget, Sparsity
from sparsevlm_jax.pruning.sparsify import EXACT, score_visual, sum_of_heads, take
from sparsevlm_jax.rotary import Rope


def score_by_raters(layer: PruningContext, sparsity: Sparsity) -> Scores:
    """v1.5: the raters' attention, mean over heads, then over raters (section 3.2, equation 4)."""
    rows, raters = layer.rater_rows()
    return Scores(score_visual(layer.attention(rows), raters))


def score_by_rank(layer: PruningContext, sparsity: Sparsity) -> Scores:
    """v1: scores as in v1.5; int(rank * scale + bias) tokens stay, at most all but one.

    rank is that of the raters × visual matrix of head-mean attention. Where it equals the number of visual tokens
    nothing is pruned. Source: released code of October 2024; the paper's law is "delete lambda (v - rank)".
    """
    rows, raters = layer.rater_rows()
    attention = layer.attention(rows)
    visual = layer.tokens.visual
    relation = jnp.where(raters[:, :, None] & visual[:, None, :], jnp.mean(attention, axis=1), 0.0)
    rank, singular_values = numerical_rank(relation, jnp.sum(raters, axis=1), jnp.sum(visual, axis=1))
    count = jnp.sum(visual, axis=1)
    by_rank = jnp.asarray([kept_by_rank(sparsity, r) for r in range(relation.shape[2] + 1)], jnp.int32)
    keep = jnp.minimum(by_rank[rank], jnp.maximum(count - 1, 0))
    keep = jnp.where(rank == count, count, keep)
    return Scores(score_visual(attention, raters), keep, {"rank": rank, "singular_values": singular_values})


def score_by_selected_heads(layer: PruningContext, sparsity: Sparsity) -> Scores:
    """v2.0: attention divided by rotary gravity, mean over the heads that look at the image most, then over raters.

    Gravity changes sign at distances beyond about 1700 (head dim 128, base 10000); the released code divides all the
    same, so far tokens can get huge or negative scores, and so they do here. A pair whose gravity is exactly zero
    counts as zero; `gravity_floor` above zero bounds gravity from below, which keeps every score finite and
    in the order of the attention (the choice for inputs longer than the released models take).
    """
    options = head_options(sparsity)
    rows, raters = layer.rater_rows()
    tokens = layer.tokens
    weight = gravity(tokens.positions, rows, layer.rope)
    if options.gravity_floor:
        weight = jnp.maximum(weight, options.gravity_floor)
    weight = weight[:, None]
    pairs = (raters[:, :, None] & tokens.visual[:, None, :])[:, None]
    corrected = jnp.where(pairs & (weight != 0), layer.attention(rows) / jnp.where(weight == 0, 1.0, weight), 0.0)
    sums = jnp.sum(corrected, axis=(2, 3))
    heads = select_heads(sums, options.heads)
    selected = sum_of_heads(jnp.where(heads[:, :, None, None], corrected, 0.0))[:, None] / options.heads
    return Scores(score_visual(selected, raters), details={"head_sums": sums, "heads": heads, "gravity": weight[:, 0]})


def gravity(positions: Int[Array, "b l a"], rows: Int[Array, "b r"], rope: Rope) -> Float[Array, "b r l"]:
    """Rotary kernel of all-ones query and key at the distance of each chosen row to each token.

    w(x) = 2 / sqrt(h) * sum_i cos(x theta^(-2i/h)): what the rotary embedding alone makes of a distance of x. Computed
    as the released code does, from rotated vectors of ones: where w comes near zero another way shows.
    """
    ones = jnp.ones((*positions.shape[:2], 1, rope.head_dim), jnp.float32)
    rotated = apply_rope(ones, positions, rope)[:, :, 0]
    return jnp.einsum("brh,blh->brl", take(rotated, rows), rotated, precision=EXACT) / math.sqrt(rope.head_dim)


def select_heads(sums: Float[Array, "b n"], count: int) -> Bool[Array, "b n"]:
    """The `count` heads with the largest sums; ties go to the lower index."""
    _, chosen = jax.lax.top_k(sums, count)
    return jnp.any(chosen[:, :, None] == jnp.arange(sums.shape[1])[None, None, :], axis=1)


def numerical_rank(
    matrix: Float[Array, "b r l"], rows: Int[Array, "b"], columns: Int[Array, "b"]
) -> tuple[Int[Array, "b"], Float[Array, "b s"]]:
    """Rank with the default tolerance of torch.linalg.matrix_rank: max(rows, columns) * eps * largest singular value.

    Args:
      matrix: zero outside the rows and columns that count; zeros change no other singular value.
      rows, columns: how many count, for the tolerance.

    Returns:
      The rank and the singular values, falling.
    """
    values = _singular_values(matrix)
    size = jnp.maximum(rows, columns).astype(jnp.float32)
    tolerance = size * jnp.finfo(jnp.float32).eps * jnp.max(values, axis=1)
    return jnp.sum(values > tolerance[:, None], axis=1), values


def _singular_values(matrix: Float[Array, "b r l"]) -> Float[Array, "b s"]:
    """Of each matrix, falling. On CPUs one after the other: jax divides a batch among the threads of a pool in one of
    which it waits, for ever where another program does so at the same time (seen with jax 0.10.2)."""
    one = partial(jnp.linalg.svd, compute_uv=False)
    return jax.lax.map(one, matrix) if traced_for() == "cpu" else one(matrix)


def kept_by_rank(sparsity: Sparsity, rank: int) -> int:
    """v1's law: int(rank * scale + bias), never below zero."""
    options = rank_options(sparsity)
    assert options.scale is not None and options.bias is not None
    return max(int(rank * options.scale + options.bias), 0)


def rank_options(sparsity: Sparsity) -> RankOptions:
    """v1's own options, out of its settings."""
    assert isinstance(sparsity.options, RankOptions)
    return sparsity.options


def head_options(sparsity: Sparsity) -> HeadOptions:
    """v2.0's own options, out of its settings."""
    assert isinstance(sparsity.options, HeadOptions)
    return sparsity.options


def _settle_v1(keep: int | None = None, scale: float | None = None, bias: float | None = None, **others) -> Sparsity:  # noqa: ANN003
    return Sparsity.v1(keep, scale, bias).changed(**others)


def _require_heads(sparsity: Sparsity, text: TextConfig) -> None:
    heads = head_options(sparsity).heads
    if heads > text.num_attention_heads:
        raise UserError(f"v2.0 selects {heads} heads, the decoder has {text.num_attention_heads}: set `heads` to fewer")


V1 = Method(
    Sparsity("v1", Budget(published_layers=V1_PRUNING_LAYERS), options=RankOptions()),
    score_by_rank,
    "SparseVLM, released code of October 2024 (rank-adaptive)",
    summary="v1: scores as in v1.5; int(rank * scale + bias) tokens stay, at most all but one",
    guided=True,
    budgets=("keep",),
    no_budget="its counts follow from `scale` and `bias`",
    settle=_settle_v1,
    kept_by_rank=kept_by_rank,
    stage_by_stage=lambda sparsity: rank_options(sparsity).ladder,
)
V15 = Method(
    Sparsity.v15(),
    score_by_raters,
    "SparseVLM (ICML 2025), released code of March 2025",
    summary="v1.5: the raters' attention, mean over heads, then over raters (section 3.2, equation 4)",
    guided=True,
    published_counts={192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
)
V20 = Method(
    Sparsity.v20(),
    score_by_selected_heads,
    "SparseVLM+, released code of December 2025",
    summary="v2.0: attention divided by rotary gravity, mean over the heads that look at the image most, "
    "then over raters",
    guided=True,
    require=_require_heads,
    published_counts={192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
)
