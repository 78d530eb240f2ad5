"""The library and the NumPy oracle agree on random prompts, schedules and settings.

Each schedule is one compiled program that takes ragged batches of prompts, drawn by hypothesis: the oracle sees each
row alone and unpadded. Rows whose decisions are too close for float32 are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm_jax import LlavaConfig, Sparsity, make_plan, sparsity
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.rotary import plain_rope
from tests import models, oracle
from tests.comparison import (
    SCORES,
    attention_of_last_token,
    check_kept,
    compare,
    near,
    run,
    spread_evenly,
    too_close,
    wanted,
)

LAYERS, TEXT, VISUAL, ROWS, NEW = 3, 10, 14, 6, 3
MOST_DISCARDED = 0.2


def geometry(kv_heads: int, theta: float = 10000.0) -> LlavaConfig:
    base = models.config(kv_heads, layers=LAYERS)
    return replace(base, text=replace(base.text, rope=plain_rope(base.text.head_dim, theta)))


def by_rank(scale: float, bias: float, *layers: int, **recycling: Any) -> Sparsity:
    return sparsity("v1", scale=scale, bias=bias, layers=layers, **recycling)


def gemma() -> LlavaConfig:
    base = geometry(2)
    text = replace(
        base.text,
        head_dim=32,
        rope=plain_rope(32, 10000.0),
        hidden_act="gelu_pytorch_tanh",
        norm_offset=True,
        embed_scale=True,
        tie_word_embeddings=True,
    )
    return replace(base, text=text)


ALL_HEADS, GROUPED = geometry(4), geometry(2)
NEAR_ZERO = geometry(2, theta=60.0)  # gravity (v2.0) is small or negative inside these prompts
SCHEDULES = {
    "dense": (GROUPED, Sparsity.dense()),
    "v1.5 first and last layer": (ALL_HEADS, Sparsity.v15(keep_at=[(0, 9), (2, 3)])),
    "v1.5 count above all": (GROUPED, Sparsity.v15(keep_at=[(1, 20)])),
    "v1.5 every layer, down to none, few to a cluster": (
        GROUPED,
        Sparsity.v15(keep_at=[(0, 10), (1, 4), (2, 0)]).changed(recycle_ratio=0.6, recycle_group=3),
    ),
    "v1.5 one token, most recycled": (
        ALL_HEADS,
        Sparsity.v15(keep_at=[(1, 1)]).changed(recycle_ratio=0.9, recycle_group=2),
    ),
    "v1 at two layers": (ALL_HEADS, by_rank(1.5, 0.0, 0, 1)),
    "v1 few, one of them by bias": (GROUPED, by_rank(0.8, 1.0, 0, 2, recycle_ratio=0.6, recycle_group=3)),
    "v1 more than there are": (GROUPED, by_rank(3.0, 6.0, 1)),
    "v1.5 in Gemma": (gemma(), Sparsity.v15(keep_at=[(0, 9), (2, 3)])),
    "v2.0 first and last layer": (ALL_HEADS, Sparsity.v20(keep_at=[(0, 9), (2, 3)], heads=2)),
    "v2.0 above all, then one": (NEAR_ZERO, Sparsity.v20(keep_at=[(1, 17), (2, 1)], heads=3)),
    "v2.0 none": (GROUPED, Sparsity.v20(keep_at=[(0, 0)], heads=4)),
}


class Case(NamedTuple):
    model: LlavaConfig
    sparsity: Sparsity
    row: models.Row
    seed: int


@st.composite
def rows(draw: st.DrawFn) -> tuple[models.Row, int]:
    prefix = draw(st.integers(0, TEXT // 2))
    text = draw(st.integers(0 if prefix else 1, TEXT // 2))
    return (prefix, draw(st.integers(0, VISUAL)), text), draw(st.integers(0, 10**6))


@pytest.mark.parametrize("name", SCHEDULES)
def test_library_agrees_with_the_oracle_on_random_prompts(name: str) -> None:
    model, sparsity = SCHEDULES[name]
    plan = make_plan(sparsity, model, VISUAL, TEXT)
    program, weights, tally = run(model, plan, NEW), models.params(model), Counter[str]()

    @settings(max_examples=12)
    @given(st.lists(rows(), min_size=ROWS, max_size=ROWS))
    def agrees(drawn: list[tuple[models.Row, int]]) -> None:
        batch = models.prompt([row for row, _ in drawn], text=TEXT, visual=VISUAL, seeds=[seed for _, seed in drawn])
        found = jax.tree.map(np.asarray, program(weights, batch))
        for i, (row, seed) in enumerate(drawn):
            expected = by_oracle(Case(model, sparsity, row, seed))
            tally["drawn"] += 1
            if too_close(expected):
                tally["discarded"] += 1
            else:
                compare(found, expected, plan, row, i)

    agrees()
    assert tally["discarded"] <= MOST_DISCARDED * tally["drawn"], tally


@cache
def decoder(model: LlavaConfig) -> oracle.Decoder:
    return models.oracle_decoder(models.params(model), model)


def by_oracle(case: Case) -> oracle.Result:
    embeddings = models.embeddings(case.row, case.seed)
    settings = wanted(case.sparsity, case.sparsity.budget.keep_at or ())
    return oracle.generate(decoder(case.model), embeddings, case.row[0], case.row[1], settings, NEW)


# The rivals: no oracle, but a few lines of NumPy on the trace of the stage before.

BATCH = [(3, 14, 5), (0, 9, 4), (5, 1, 5), (2, 0, 3), (4, 12, 2)]


def traced(sparsity: Sparsity) -> tuple[LlavaConfig, Any]:
    model = GROUPED
    plan = make_plan(sparsity, model, VISUAL, TEXT)
    batch = models.prompt(BATCH, text=TEXT, visual=VISUAL)
    trace = models.compiled_prefill(model, plan, NEW, trace=True)(models.params(model), batch)[2]
    return model, jax.tree.map(np.asarray, trace)


def check_all_kept(event: Any, scores_of: Any) -> None:
    """The visual tokens with the best `scores_of(row, its visual places)` are kept, at most all but one."""
    for i in range(len(BATCH)):
        places = np.flatnonzero(event.before.visual[i])
        check_kept(event, i, min(PER_EVENT, max(len(places) - 1, 0)), scores_of(i, places))


PER_EVENT = 5


def with_count(method: str, *layers: int) -> Sparsity:
    return METHODS[method].settings.changed(keep_at=tuple((layer, PER_EVENT) for layer in layers))


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_what_the_last_token_attends_to_is_kept(method: str) -> None:
    """FastV asks the layer that has just run, PyramidDrop the next one, on this one's output."""
    model, trace = traced(with_count(method, 0, 1))
    before = trace.tokens
    for number, event in enumerate(trace.events):
        layer, tokens = (number + 1, event.before) if method == "pyramiddrop" else (number, before)

        def attention(i: int, places: np.ndarray, layer: int = layer, tokens: Any = tokens) -> np.ndarray:
            return attention_of_last_token(decoder(model), layer, tokens, i, places)

        check_all_kept(event, attention)
        for i, row in enumerate(BATCH):
            if row[1]:
                places = np.flatnonzero(event.before.visual[i])
                near(event.scores.values[i, places], attention(i, places), SCORES)
        before = event.after


def test_pyramiddrop_renumbers_positions_after_every_cut() -> None:
    _, trace = traced(with_count("pyramiddrop", 0, 1))
    for event in trace.events:
        assert event.recycled is None
        np.testing.assert_array_equal(
            event.after.positions[..., 0], [np.arange(event.after.visual.shape[1])] * len(BATCH)
        )


def test_vision_keeps_what_the_tower_attends_to_before_the_first_layer() -> None:
    _, trace = traced(with_count("vision", -1))
    (event,) = trace.events
    assert event.layer == -1
    batch = models.prompt(BATCH, text=TEXT, visual=VISUAL)
    np.testing.assert_array_equal(event.before.hidden, np.asarray(batch.embeddings))
    check_all_kept(event, lambda i, places: np.asarray(batch.saliency)[i, places])


def test_uniform_keeps_tokens_at_even_distances() -> None:
    _, trace = traced(with_count("uniform", 0, 1))
    for event in trace.events:
        check_all_kept(event, lambda _, places: spread_evenly(len(places), min(PER_EVENT, max(len(places) - 1, 0))))


def test_random_keeps_the_largest_of_the_numbers_that_its_seed_draws() -> None:
    _, trace = traced(with_count("random", 0, 1).changed(seed=3))
    for layer, event in enumerate(trace.events):
        key = jax.random.fold_in(jax.random.key(3), layer + 1)
        numbers = np.asarray(jax.random.uniform(key, (VISUAL if layer == 0 else PER_EVENT,)))
        check_all_kept(event, lambda _, places, numbers=numbers: numbers[: len(places)])


@pytest.mark.parametrize("method", ["fastv", "uniform", "random"])
def test_rivals_keep_positions_and_recycle_nothing(method: str) -> None:
    _, trace = traced(with_count(method, 0, 1))
    for event in trace.events:
        assert event.recycled is None
        for i in range(len(BATCH)):
            valid = event.before.valid[i] & (~event.before.visual[i] | event.selection.kept[i])
            after = event.after.positions[i, : event.after.lengths[i]]
            np.testing.assert_array_equal(after, event.before.positions[i][valid])


def test_a_scoring_function_sees_as_many_kept_tokens_as_the_plan_allows() -> None:
    _, trace = traced(with_count("uniform", 0, 1))
    for event in trace.events:
        counts = event.before.visual.sum(1)
        np.testing.assert_array_equal(event.selection.kept_count, np.minimum(PER_EVENT, np.maximum(counts - 1, 0)))
