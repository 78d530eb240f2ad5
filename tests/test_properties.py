"""What pruning promises whatever the prompt: rows of any make-up, all within one compiled rectangle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsevlm_jax import Plan, Prompt, make_plan, sparsity
from sparsevlm_jax.pruning import sparsify
from tests import models

MODEL = models.config(layers=2)
TEXT, VISUAL, BATCH = 24, 40, 3
SETTINGS: dict[str, Any] = {
    "v1.5": {"keep_at": ((0, 12), (1, 5))},
    "v2.0": {"keep_at": ((0, 12), (1, 5)), "heads": 2},
    "v1": {"layers": (0, 1), "scale": 1.5, "bias": 1.0},
}
METHODS = pytest.mark.parametrize("method", SETTINGS)
choose_raters = jax.jit(sparsify.choose_raters, static_argnames="visual_tokens")

# A row is words and images by turns, words first and last: word counts at even places, visual counts at odd ones.
Segments = tuple[int, ...]


def fits(row: Segments) -> bool:
    return 0 < sum(row[::2]) <= TEXT and sum(row[1::2]) <= VISUAL


words, patches = st.integers(0, 9), st.integers(0, VISUAL)
rows = st.one_of(
    st.tuples(words, patches, words),
    st.tuples(words, st.integers(0, 25), words, st.integers(0, 15), words),
    st.tuples(words, st.integers(0, 20), words, st.integers(0, 10), words, st.integers(0, 10), st.integers(0, 3)),
).filter(fits)
batches = st.lists(rows, min_size=BATCH, max_size=BATCH)
seeds = st.integers(0, 2**31)
EDGES: list[Segments] = [(5, 0, 0), (4, 1, 3), (6, 2, 0)]  # no visual token, one, and no word behind two


def plan_of(method: str) -> Plan:
    return make_plan(sparsity(method, **SETTINGS[method]), MODEL, VISUAL, TEXT)


def prompt(batch: list[Segments], seed: int) -> Prompt:
    random = np.random.default_rng(seed)
    shape = (len(batch), TEXT + VISUAL)
    visual = np.zeros(shape, bool)
    for i, row in enumerate(batch):
        kinds = np.repeat(np.arange(len(row)) % 2 == 1, row)
        visual[i, : len(kinds)] = kinds
    values = random.normal(0, 0.5, (*shape, models.WIDTH)).astype(np.float32)
    lengths = np.array([sum(row) for row in batch], np.int32)
    values[np.arange(shape[1])[None] >= lengths[:, None]] = 30  # padding is loud
    return Prompt(jnp.asarray(values), jnp.asarray(visual), jnp.asarray(lengths))


def run(method: str, batch: list[Segments], seed: int) -> tuple[np.ndarray, Any, Any]:
    """Logits, cache and trace, as NumPy."""
    compiled = models.compiled_prefill(MODEL, plan_of(method), 1, trace=True)
    return jax.tree.map(np.asarray, compiled(models.params(MODEL), prompt(batch, seed)))


class Pruned(NamedTuple):
    """One row at one pruning layer; indices are places in the sequence before it."""

    visual: np.ndarray  # places of visual tokens
    words: np.ndarray  # places of the others
    kept: np.ndarray
    pool: np.ndarray
    weights: np.ndarray  # [c, m] of the merged tokens
    before: np.ndarray  # hidden states, padding cut off
    after: np.ndarray
    visual_after: np.ndarray  # mask
    scores: np.ndarray
    event: Any


def pruned_rows(method: str, batch: list[Segments], seed: int) -> Iterator[Pruned]:
    _, _, trace = run(method, batch, seed)
    for event in trace.events:
        for i in range(len(batch)):
            length, new_length = event.before.lengths[i], event.after.lengths[i]
            selection, recycled = event.selection, event.recycled
            visual = event.before.visual[i, :length]
            members, clusters = selection.pool_count[i], selection.cluster_count[i]
            yield Pruned(
                np.flatnonzero(visual),
                np.flatnonzero(~visual),
                np.flatnonzero(selection.kept[i]),
                selection.pool[i, :members],
                np.zeros((0, 0)) if recycled is None else recycled.weights[i, :clusters],
                event.before.hidden[i, :length],
                event.after.hidden[i, :new_length],
                event.after.visual[i, :new_length],
                event.scores.values[i],
                event,
            )


any_batch = given(batch=batches, seed=seeds)
some = settings(max_examples=20)


@METHODS
@some
@any_batch
@example(batch=EDGES, seed=0)
def test_prefix_and_text_are_never_dropped(method: str, batch: list[Segments], seed: int) -> None:
    for row in pruned_rows(method, batch, seed):
        np.testing.assert_array_equal(row.after[~row.visual_after], row.before[row.words])


@METHODS
@some
@any_batch
@example(batch=EDGES, seed=0)
def test_kept_tokens_are_visual_and_stay_in_order(method: str, batch: list[Segments], seed: int) -> None:
    for row in pruned_rows(method, batch, seed):
        assert np.all(np.isin(row.kept, row.visual))
        standing = row.after[row.visual_after]
        np.testing.assert_array_equal(standing[: len(row.kept)], row.before[row.kept])


@METHODS
@some
@any_batch
@example(batch=EDGES, seed=0)
def test_kept_tokens_score_above_the_pool_and_the_pool_above_the_rest(
    method: str, batch: list[Segments], seed: int
) -> None:
    for row in pruned_rows(method, batch, seed):
        rest = np.setdiff1d(row.visual, np.r_[row.kept, row.pool])
        assert len(set(row.kept) | set(row.pool)) == len(row.kept) + len(row.pool)
        assert np.all(np.isin(row.pool, row.visual))
        assert np.all(np.diff(row.scores[row.pool]) <= 0)
        for better, worse in ((row.kept, row.pool), (np.r_[row.kept, row.pool], rest)):
            if len(better) and len(worse):
                assert row.scores[better].min() >= row.scores[worse].max()


@pytest.mark.parametrize("method", ["v1.5", "v2.0"])
@some
@any_batch
@example(batch=EDGES, seed=0)
def test_counts_are_exact(method: str, batch: list[Segments], seed: int) -> None:
    keep = dict(SETTINGS[method]["keep_at"])
    for row in pruned_rows(method, batch, seed):
        kept = min(keep[int(row.event.layer)], max(len(row.visual) - 1, 0))
        dropped = len(row.visual) - kept
        pool = int(0.3 * dropped) + 1 if dropped and method == "v1.5" else 0
        merged = int(pool / 10) + 1 if pool else 0
        assert (len(row.kept), len(row.pool), len(row.weights)) == (kept, pool, merged)
        assert row.visual_after.sum() == kept + merged
        assert len(row.after) == len(row.words) + kept + merged


@some
@any_batch
@example(batch=EDGES, seed=0)
def test_v1_keeps_what_its_rank_says(batch: list[Segments], seed: int) -> None:
    _, _, trace = run("v1", batch, seed)
    for event in trace.events:
        for i, rank in enumerate(event.scores.details["rank"]):
            visual = event.before.visual[i].sum()
            raters = event.before.raters[i].sum()
            assert rank <= min(raters, visual)
            expected = visual if rank == visual else min(int(rank * 1.5 + 1), visual - 1)
            assert event.selection.kept[i].sum() == expected


@pytest.mark.parametrize("method", ["v1.5", "v1"])
@some
@any_batch
@example(batch=EDGES, seed=0)
def test_recycled_tokens_are_means_over_the_pool(method: str, batch: list[Segments], seed: int) -> None:
    for row in pruned_rows(method, batch, seed):
        weights, members = row.weights, len(row.pool)
        assert np.all(weights >= 0)
        assert np.all(weights[:, members:] == 0)
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
        assert np.all(np.count_nonzero(weights[:, :members], axis=0) == 1)  # every member is in one cluster
        merged = row.after[row.visual_after][len(row.kept) :]
        np.testing.assert_allclose(merged, weights[:, :members] @ row.before[row.pool], atol=1e-4, rtol=0)


@METHODS
@some
@any_batch
@example(batch=EDGES, seed=0)
@example(batch=[(3, 9, 2, 9, 2, 9, 3), (0, 20, 5, 20, 0), (2, 12, 4, 1, 1)], seed=0)
def test_merged_tokens_stand_directly_behind_the_last_kept_one(method: str, batch: list[Segments], seed: int) -> None:
    """Words between images stay where they are, in order."""
    for row in pruned_rows(method, batch, seed):
        survivors = np.sort(np.r_[row.words, row.kept])
        first = row.visual[0] if len(row.visual) else len(row.before)
        at = np.searchsorted(survivors, row.kept[-1], side="right") if len(row.kept) else np.sum(survivors < first)
        merged = row.weights[:, : len(row.pool)] @ row.before[row.pool] if len(row.weights) else row.before[:0]
        expected = np.concatenate([row.before[survivors[:at]], merged, row.before[survivors[at:]]])
        np.testing.assert_allclose(row.after, expected, atol=1e-4, rtol=0)


@METHODS
@some
@any_batch
@example(batch=EDGES, seed=0)
@example(batch=[(1, 40, 0), (1, 0, 0), (0, 1, 1)], seed=0)
def test_every_visual_token_has_one_origin_or_shares_that_sum_to_one(
    method: str, batch: list[Segments], seed: int
) -> None:
    _, _, trace = run(method, batch, seed)
    for i in range(len(batch)):
        for event, origins in zip(trace.events, models.origins(trace, i)[1:], strict=True):
            np.testing.assert_allclose(origins.sum(axis=1), event.after.visual[i], atol=1e-5)


@METHODS
@some
@any_batch
@example(batch=EDGES, seed=0)
@example(batch=[(1, 40, 0), (1, 0, 0), (0, 1, 1)], seed=0)
def test_nothing_is_ever_nan(method: str, batch: list[Segments], seed: int) -> None:
    for leaf in jax.tree.leaves(run(method, batch, seed)):
        assert np.all(np.isfinite(leaf))


@METHODS
@some
@given(batch=batches, seed=seeds, order=st.permutations(range(BATCH)))
def test_permuting_a_batch_permutes_its_logits(method: str, batch: list[Segments], seed: int, order: list[int]) -> None:
    compiled, weights = models.compiled_prefill(MODEL, plan_of(method), 1, trace=True), models.params(MODEL)
    straight = prompt(batch, seed)
    shuffled = Prompt(*(part[np.array(order)] for part in straight[:3]))
    expected = np.asarray(compiled(weights, straight)[0])[order]
    np.testing.assert_allclose(compiled(weights, shuffled)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["v1.5", "v2.0"])
@settings(max_examples=15)
@given(seed=seeds)
def test_a_padded_row_equals_its_unpadded_self(method: str, seed: int) -> None:
    row = (7, 30, 12)
    padded, bare = (models.prompt([row], text=t, visual=v, seeds=[seed]) for t, v in ((TEXT, VISUAL), (19, 30)))
    own_plan = make_plan(sparsity(method, **SETTINGS[method]), MODEL, 30, 19)
    weights = models.params(MODEL)
    logits, held, _ = models.compiled_prefill(MODEL, plan_of(method), 0)(weights, padded)
    expected, own, _ = models.compiled_prefill(MODEL, own_plan, 0)(weights, bare)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(held.lengths, own.lengths)


# Raters


def raters_of(batch: Prompt) -> np.ndarray:
    return np.asarray(choose_raters(*batch[:3], visual_tokens=VISUAL))


@some
@any_batch
@example(batch=EDGES, seed=0)
def test_raters_are_words_behind_the_last_image(batch: list[Segments], seed: int) -> None:
    inputs = prompt(batch, seed)
    for visual, length, chosen in zip(*inputs[1:3], raters_of(inputs), strict=True):
        last = np.max(np.flatnonzero(visual), initial=-1)
        places = np.flatnonzero(chosen)
        assert len(places)
        assert np.all(places < length)
        assert np.all(places > last) or last == length - 1


@some
@any_batch
def test_equal_words_behind_the_image_all_rate(batch: list[Segments], seed: int) -> None:
    batch = [(3, 11, count % 8 + 1) for count, *_ in batch]
    inputs = prompt(batch, seed)
    alike = jnp.where(inputs.visual[:, :, None], inputs.embeddings, inputs.embeddings[:1, :1])
    raters = raters_of(inputs._replace(embeddings=alike))
    for row, chosen in zip(batch, raters, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(chosen), np.arange(14, sum(row)))


@some
@any_batch
def test_without_words_behind_the_image_all_other_words_rate(batch: list[Segments], seed: int) -> None:
    batch = [(count % 8 + 1, 11, 0) for count, *_ in batch]
    raters = raters_of(prompt(batch, seed))
    for row, chosen in zip(batch, raters, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(chosen), np.arange(row[0]))


@pytest.mark.parametrize("heads", [1, 3, 16])
def test_the_sum_over_heads_is_one(heads):
    values = np.random.default_rng(heads).random((2, heads, 7, 33)).astype(np.float32)
    exact = np.sum(values.astype(np.float64), axis=1)
    np.testing.assert_allclose(jax.jit(sparsify.sum_of_heads)(values), exact, rtol=1e-6)
