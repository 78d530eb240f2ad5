"""The papers: which words rate, what they rate, who stays, and how the rest is recycled.

Pure functions of arrays and ints; no model, no Flax. Sources: SparseVLM (arXiv 2410.04417) and the
authors' released code, which is followed where the two differ.

Axis letters: b batch, l sequence length, v visual tokens, t text tokens, n heads, r raters, m pool of
recycled tokens, c clusters, d width, i layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsevlm_jax.ops.attention import on_one_cpu
from sparsevlm_jax.pruning.positions import after_cut
from sparsevlm_jax.pruning.tokens import Tokens, scatter_true

EXACT = jax.lax.Precision.HIGHEST


class Recycled(NamedTuple):
    """Merged tokens and how density-peak clustering found them. Rows past a row's own counts mean nothing."""

    merged: Float[Array, "b c d"]
    weights: Float[Array, "b c m"]  # merged = weights @ pool: 1 / members of the cluster, nearly
    centers: Int[Array, "b c"]  # in the pool
    assignment: Int[Array, "b m"]
    density: Float[Array, "b m"]
    distance: Float[Array, "b m"]  # to the nearest denser token
    peak: Float[Array, "b m"]  # density * distance, which chooses the centres


class Selection(NamedTuple):
    """What becomes of every token of a sequence at one pruning layer."""

    kept: Bool[Array, "b l"]  # visual tokens that stay
    kept_at: Int[Array, "b k"]  # their places, by falling score; those past their number mean nothing
    pool: Int[Array, "b m"]  # places of visual tokens that are recycled, by falling score
    kept_count: Int[Array, "b"]
    pool_count: Int[Array, "b"]
    cluster_count: Int[Array, "b"]


def positions_where(mask: Bool[Array, "b l"], size: int) -> Int[Array, "b {size}"]:
    """Ascending positions of the True entries of each row; places past their number hold l - 1."""
    length = mask.shape[1]
    places = jnp.where(mask, jnp.arange(length)[None, :], length)
    return jnp.minimum(jnp.sort(places, axis=1)[:, :size], length - 1)


def take(values: Array, index: Int[Array, "b i"]) -> Array:
    """values[b, index[b, i]], whatever axes follow."""
    return jax.vmap(lambda row, at: row[at])(values, index)


def text_after_image(visual: Bool[Array, "b l"], lengths: Int[Array, "b"]) -> Bool[Array, "b l"]:
    """Text that may rate: everything valid after the last visual token, the template's words included."""
    places = jnp.arange(visual.shape[1])[None, :]
    last = jnp.max(jnp.where(visual, places, -1), axis=1, keepdims=True)
    return (places > last) & (places < lengths[:, None])


def rate_text(
    hidden_visual: Float[Array, "b v d"],
    hidden_text: Float[Array, "b t d"],
    visual: Bool[Array, "b v"],
    text: Bool[Array, "b t"],
) -> tuple[Bool[Array, "b t"], Float[Array, "b t"]]:
    """Raters: text tokens more relevant to the image than the average (section 3.2, equation 3).

    relevance = mean over v of softmax over t of H_v H_tᵀ, on the decoder's input embeddings, unscaled. A rater is
    strictly above the mean (the released code; the paper writes >=). The masks say which rows are real. Where no
    token is above the mean all valid text tokens rate (the code's scores would be NaN there).

    Returns:
      The raters and the relevance (float32, 0 where the mask is False).
    """
    sim = jnp.einsum(
        "bvd,btd->bvt",
        hidden_visual.astype(jnp.float32),
        hidden_text.astype(jnp.float32),
        precision=EXACT,
    )
    attention = jax.nn.softmax(jnp.where(text[:, None, :], sim, -jnp.inf), axis=-1, where=text[:, None, :])
    relevance = _mean_where(attention, visual[:, :, None], axis=1)
    above = text & (relevance > _mean_where(relevance, text, axis=1)[:, None])
    return jnp.where(jnp.any(above, axis=1, keepdims=True), above, text), relevance


def choose_raters(
    hidden: Float[Array, "b l d"], visual: Bool[Array, "b l"], lengths: Int[Array, "b"], visual_tokens: int
) -> Bool[Array, "b l"]:
    """`rate_text` on a packed sequence: the raters are text after the last image.

    Where no text follows the image, all other tokens of the row rate. They stand before it and, under the causal
    mask, see none of it: every score is zero then and the first visual tokens are kept.

    Args:
      visual_tokens: at most that many in a row (static).
    """
    length = hidden.shape[1]
    text = text_after_image(visual, lengths)
    visual_at = positions_where(visual, visual_tokens)
    text_at = positions_where(text, length - visual_tokens)
    valid_visual = jnp.take_along_axis(visual, visual_at, axis=1)
    # Unused places repeat position l - 1, which may be text itself: count them off instead of looking there.
    valid_text = jnp.arange(length - visual_tokens)[None, :] < jnp.sum(text, axis=1, keepdims=True)
    above, _ = rate_text(take(hidden, visual_at), take(hidden, text_at), valid_visual, valid_text)
    raters = scatter_true(text_at, above, length)
    others = (jnp.arange(length)[None, :] < lengths[:, None]) & ~visual
    return jnp.where(jnp.any(text, axis=1, keepdims=True), raters, others)


def score_visual(attention: Float[Array, "b n r l"], raters: Bool[Array, "b r"]) -> Float[Array, "b l"]:
    """Score of every token: its attention probability, mean over heads, then over raters (section 3.2, equation 4).

    Probabilities are the pruning layer's own, all keys in the softmax, so a row does not sum to 1 over the image.
    """
    return _mean_where(sum_of_heads(attention) / attention.shape[1], raters[:, :, None], axis=1)


def sum_of_heads(values: Float[Array, "b n r l"]) -> Float[Array, "b r l"]:
    """On one CPU head by head: XLA's loop for a reduction over an outer axis is three times as slow there."""
    if on_one_cpu():
        return reduce(jnp.add, (values[:, head] for head in range(values.shape[1])))
    return jnp.sum(values, axis=1)


def select(
    scores: Float[Array, "b l"],
    visual: Bool[Array, "b l"],
    kept_count: Int[Array, "b"],
    pool_count: Int[Array, "b"],
    cluster_count: Int[Array, "b"],
    *,
    keep: int,
    pool: int,
) -> Selection:
    """One top-k, cut into kept tokens, recycle pool, and dropped tokens. Ties go to the lower index.

    Args:
      scores: of every token; those of tokens that are not visual are not looked at.
      kept_count, pool_count, cluster_count: of each row.
      keep, pool: the most that any row has (static).
    """
    # Adding zero makes -0.0 and 0.0 one value, which top_k would tell apart.
    ranked = jnp.where(visual, scores + 0.0, -jnp.inf)
    _, order = jax.lax.top_k(ranked, min(keep + pool, scores.shape[1]))
    # For the record: what is built from this takes the places.
    kept = scatter_true(order[:, :keep], jnp.arange(keep)[None, :] < kept_count[:, None], scores.shape[1])
    # A row's pool starts where its kept tokens end: at `keep`, unless the row has fewer visual tokens than others.
    slots = jnp.minimum(kept_count[:, None] + jnp.arange(pool)[None, :], order.shape[1] - 1)
    pooled = jnp.take_along_axis(order, slots, axis=1)
    return Selection(kept, order[:, :keep], pooled, kept_count, pool_count, cluster_count)


def recycle(
    pool: Float[Array, "b m d"],
    pool_count: Int[Array, "b"],
    cluster_count: Int[Array, "b"],
    clusters: int,
    jitter: Float[Array, "b m"] | None = None,
) -> Recycled:
    """Density-peak clustering of the recycled tokens, each cluster merged into its mean (section 3.3).

        distance_ij = |x_i - x_j| / sqrt(d)
        density_i   = exp(-mean of the squared distances to the c nearest tokens, itself included)
        delta_i     = distance to the nearest token of strictly higher density; the largest distance for the densest
        centres     = the c largest density * delta;  every token joins its nearest centre

    Differs from the paper, as the released code does: Euclidean assignment for cosine, a mean for a sum. The code
    adds noise of 1e-6 to the densities, which changes none in 16 bit; here there is none, ties go to the lower
    index, and recorded noise can be replayed.

    Args:
      pool: hidden states of the recycled tokens, by falling score.
      pool_count, cluster_count: of each row; what stands past them takes part in nothing.
      clusters: the most that any row makes (static).
      jitter: what to add to the densities, amplitude included.
    """
    x = pool.astype(jnp.float32)
    size, width = x.shape[1:]
    real = jnp.arange(size)[None, :] < pool_count[:, None]
    real_cluster = jnp.arange(clusters)[None, :] < cluster_count[:, None]
    both_real = real[:, :, None] & real[:, None, :]

    # From differences, never from a Gram matrix: two tokens that are each other's nearest must tie exactly.
    squares = jnp.sum(jnp.square(x[:, :, None, :] - x[:, None, :, :]), axis=-1)
    distances = jnp.sqrt(squares) / jnp.sqrt(jnp.float32(width))

    nearest = -jax.lax.top_k(jnp.where(both_real, -distances, -jnp.inf), clusters)[0]
    squares = jnp.where(real_cluster[:, None, :] & real[:, :, None], jnp.square(nearest), 0.0)
    neighbours = jnp.where(real, cluster_count[:, None], 0).astype(jnp.float32)
    density = jnp.exp(-jnp.sum(squares, axis=2) / jnp.maximum(neighbours, 1.0))
    density = density if jitter is None else density + jitter

    farthest = jnp.max(jnp.where(both_real, distances, 0.0), axis=(1, 2))[:, None, None]
    denser = both_real & (density[:, None, :] > density[:, :, None])
    distance = jnp.min(jnp.where(denser, distances, farthest), axis=2)

    peak = density * distance
    centers = jax.lax.top_k(jnp.where(real, peak, -jnp.inf), clusters)[1]
    to_center = jnp.take_along_axis(distances, centers[:, None, :], axis=2, mode="promise_in_bounds")
    own = jnp.arange(size)[None, :, None] == centers[:, None, :]
    to_center = jnp.where(own, -1.0, to_center)  # a centre joins itself, whatever else is as near
    assignment = jnp.argmin(jnp.where(real_cluster[:, None, :], to_center, jnp.inf), axis=2)
    labels = jnp.arange(clusters)[None, :]

    member = (assignment[:, None, :] == labels[:, :, None]) & real[:, None, :]
    member = member.astype(jnp.float32)
    # Apart, or a GPU would make it piece by piece inside of the product.
    weights = jax.lax.optimization_barrier(member / (jnp.sum(member, axis=2, keepdims=True) + 1e-6))
    merged = jnp.einsum("bcm,bmd->bcd", weights, x, precision=EXACT).astype(pool.dtype)
    return Recycled(merged, weights, centers, assignment, density, distance, peak)


def rebuild(
    tokens: Tokens, selection: Selection, recycled: Recycled | None, *, length: int, renumber: bool
) -> tuple[Tokens, Int[Array, "b {length}"]]:
    """The shorter sequence: survivors in order, merged tokens after the last kept visual one.

    Args:
      length: static length of the result, for the row that keeps most.
      renumber: see `positions.after_cut`.

    Returns:
      The sequence, and where each of its tokens comes from: its old place, or behind those the number of a merged
      token. Places in the padding mean nothing.
    """
    bits = (0 if recycled is None else recycled.centers.shape[1]).bit_length()
    keys = _keys(tokens, selection, bits)[:, :length]
    source = _source(keys, bits, tokens.visual.shape[1])

    def gather(values: Array, merge: Callable[[Array, Recycled], Array]) -> Array:
        if recycled is not None:
            values = jnp.concatenate([values, merge(values, recycled)], axis=1)
        return take(values, source)

    def of_center(values: Array, recycled: Recycled) -> Array:
        return take(take(values, selection.pool), recycled.centers)

    def mean(values: Array, recycled: Recycled) -> Array:
        pool = take(values, selection.pool)
        merged = jnp.einsum("bcm,bm...->bc...", recycled.weights, pool.astype(jnp.float32), precision=EXACT)
        return merged.astype(pool.dtype)

    # int32, as everywhere: in 64-bit mode jax would count in int64 from here on.
    lengths = (tokens.text_count + selection.kept_count + selection.cluster_count).astype(jnp.int32)
    in_row = jnp.arange(length)[None, :] < lengths[:, None]
    shorter = Tokens(
        hidden=gather(tokens.hidden, lambda _, recycled: recycled.merged),
        positions=after_cut(tokens.positions, lambda held: gather(held, of_center), in_row.shape, renumber=renumber),
        visual=keys & 1 == 1,
        rater_rows=_found(keys, (tokens.rater_rows + 1) << bits + 1),
        rater_count=tokens.rater_count,
        text_count=tokens.text_count,
        lengths=lengths,
        saliency=None if tokens.saliency is None else gather(tokens.saliency, mean),
        add=None if tokens.add is None else gather(tokens.add, mean),
        frame=None if tokens.frame is None else gather(tokens.frame, of_center),
        counts=None if tokens.counts is None else tokens.counts[1:],
    )
    return shorter, source


def _keys(tokens: Tokens, selection: Selection, bits: int) -> Int[Array, "b n"]:
    """The tokens of the shorter sequence in order, one number each, then padding.

    From high bits to low: the old place, counted from 1; so many `bits` for the number of a merged token, from 1, or 0
    for none; whether it is visual. Merged tokens have the place of the last kept visual token or, with none kept, the
    one before the first visual token. So one sort of one array is all that a GPU has to launch.
    """
    old_length, shift = tokens.visual.shape[1], bits + 1
    gone = (old_length + 1) << shift
    if gone > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"{old_length} tokens and {2**bits - 1} merged ones are more than int32 can number")
    places = jnp.arange(1, old_length + 1, dtype=jnp.int32)[None, :]
    kept = jnp.arange(selection.kept_at.shape[1])[None, :] < selection.kept_count[:, None]
    kept_at = jnp.where(kept, selection.kept_at + 1, 0)
    parts = [
        jnp.where(tokens.valid & ~tokens.visual, places << shift, gone),
        jnp.where(kept, (kept_at << shift) + 1, gone),
    ]
    if bits:
        before = jnp.min(jnp.where(tokens.visual, places, old_length + 1), axis=1, keepdims=True) - 1
        anchor = jnp.maximum(jnp.max(kept_at, axis=1, initial=0, keepdims=True), before)
        numbers = jnp.arange(1, 2**bits, dtype=jnp.int32)[None, :]
        merged = numbers <= selection.cluster_count[:, None]
        parts.append(jnp.where(merged, (anchor << shift) + (numbers << 1) + 1, gone))
    return jnp.sort(jnp.concatenate(parts, axis=1), axis=1)


def _source(keys: Int[Array, "b l"], bits: int, old_length: int) -> Int[Array, "b l"]:
    """What `rebuild` says of where its tokens come from, out of `_keys`."""
    merged = (keys >> 1) & (2**bits - 1)
    place = jnp.minimum((keys >> bits + 1) - 1, old_length - 1)
    return jnp.where(merged == 0, place, old_length - 1 + merged)


def _found(keys: Int[Array, "b l"], wanted: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Places of numbers among ascending ones; the last place for those that are larger than all."""
    below = jnp.sum(keys[:, None, :] < wanted[:, :, None], axis=2, dtype=jnp.int32)
    return jnp.minimum(below, keys.shape[1] - 1)


def _mean_where(values: Array, where: Array, axis: int) -> Array:
    """Mean over the entries of an axis where a mask is True; 0 where it is True nowhere."""
    count = jnp.maximum(jnp.sum(where, axis=axis).astype(jnp.float32), 1.0)
    return jnp.sum(jnp.where(where, values, 0.0), axis=axis) / count
