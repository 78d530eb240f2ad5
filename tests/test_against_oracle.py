"""The library and the NumPy oracle agree on random prompts, schedules and settings.

Each schedule is one compiled program that takes ragged batches of prompts, drawn by hypothesis: the oracle sees each
row alone and unpadded. Rows whose decisions are too close for float32 are left out and counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm_jax import LlavaConfig, Plan, Recycling, Sparsity, decode_step, make_plan, prefill, sparsity
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.rotary import plain_rope
from tests import models, oracle

LAYERS, TEXT, VISUAL, ROWS, NEW = 3, 10, 14, 6, 3
CLOSE, RANK_CLOSE, MOST_DISCARDED = 1e-5, 3.0, 0.2
SCORES, MERGED, HIDDEN = 1e-5, 5e-5, 2e-4


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
    program, weights, tally = run(model, plan), models.params(model), Counter[str]()

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


def run(model: LlavaConfig, plan: Plan) -> Any:
    """Prefill, traced, and greedy decoding in one program: everything that the oracle returns."""

    def program(params: dict[str, Any], batch: Any) -> dict[str, Any]:
        logits, cache_, trace = prefill(params, batch, model, plan, trace=True, max_new_tokens=NEW)

        def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
            logits, cache_ = carry
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            after, cache_next = decode_step(params, token, cache_, model, plan)
            return (after, cache_next), (logits, cache_.positions)

        (logits, after), (earlier, positions) = jax.lax.scan(step, (logits, cache_), length=NEW - 1)
        return {
            "trace": trace,
            "logits": jnp.concatenate([earlier, logits[None]]),
            "positions": positions,
            "lengths": (cache_.lengths, after.lengths),
        }

    return jax.jit(program, compiler_options=models.QUICK)


@cache
def decoder(model: LlavaConfig) -> oracle.Decoder:
    return models.oracle_decoder(models.params(model), model)


def by_oracle(case: Case) -> oracle.Result:
    settings, budget = case.sparsity, case.sparsity.budget
    own = {name: value for name, value in asdict(settings.options).items() if name in oracle.Settings._fields}
    recycling = settings.recycling or Recycling()
    layers, keep = zip(*budget.keep_at, strict=True) if budget.keep_at else (budget.layers or (), ())
    wanted = oracle.Settings(
        version=settings.method,
        layers=layers,
        keep=keep,
        ratio=recycling.ratio,
        divisor=recycling.group,
        **own,
    )
    embeddings = models.embeddings(case.row, case.seed)
    return oracle.generate(decoder(case.model), embeddings, case.row[0], case.row[1], wanted, NEW)


def smallest_gravity(event: oracle.Event) -> float:
    """Scores are divided by it, and with them their error; 1 where there is no such thing."""
    return 1.0 if event.rope_weight is None else min(1.0, float(np.abs(event.rope_weight).min()))


def too_close(result: oracle.Result) -> bool:
    margins = [m * smallest_gravity(event) for event in result.events for m in event.margins.values()]
    ratios = [event.rank_ratio for event in result.events]
    return min(margins, default=1.0) < CLOSE or min(ratios, default=9.0) < RANK_CLOSE or result.token_margin < HIDDEN


def compare(found: dict[str, Any], expected: oracle.Result, plan: Plan, row: models.Row, i: int) -> None:
    """Row i of the batch and what the oracle says of it."""
    stage_of = [k for k, stage in enumerate(plan.stages) for _ in range(stage.start, stage.stop)]
    prefilled, filled = found["lengths"]
    np.testing.assert_array_equal(prefilled[stage_of, i], expected.kv_len_prefill)
    np.testing.assert_array_equal(filled[stage_of, i], expected.kv_len_final)
    np.testing.assert_array_equal(found["positions"][:, stage_of, i], expected.decode_positions)
    np.testing.assert_array_equal(found["logits"][:, i].argmax(-1), expected.tokens)
    near(found["logits"][:, i], expected.step_logits, HIDDEN)
    trace = found["trace"]
    near(trace.last_hidden[:, i], expected.layer_last_hidden, HIDDEN)
    after = zip(trace.events, models.origins(trace, i)[1:], strict=True)
    events = [both for both in after if both[0].before.visual[i].any()]  # none are left where none are kept
    for (event, origins), wanted in zip(events, expected.events, strict=True):
        compare_event(jax.tree.map(lambda a: a[i] if np.ndim(a) else a, event), origins, wanted, row[0])


def compare_event(event: Any, origins: np.ndarray, expected: oracle.Event, first: int) -> None:
    """Events of one row without batch axis, and origins [l, o] after them; `first` is where its visual tokens begin."""
    selection = event.selection
    visual = slice(first, first + len(expected.scores))
    assert event.layer == expected.layer
    np.testing.assert_array_equal(np.flatnonzero(event.before.raters), expected.raters)
    near(event.scores.values[visual], expected.scores, SCORES / smallest_gravity(expected) ** 2)
    np.testing.assert_array_equal(np.flatnonzero(selection.kept) - first, expected.kept)
    np.testing.assert_array_equal(selection.pool[: selection.pool_count] - first, expected.recycled)
    details = event.scores.details
    if expected.rank is not None:
        assert details["rank"] == expected.rank
    if expected.heads is not None:
        r = len(expected.raters)
        np.testing.assert_array_equal(np.flatnonzero(details["heads"]), expected.heads)
        near(details["gravity"][:r, visual], expected.rope_weight, SCORES)
        near(details["head_sums"], expected.head_sums, 1e-4 / smallest_gravity(expected))
    if expected.clusters is not None:
        compare_clusters(event.recycled, expected.clusters)
    else:
        assert selection.cluster_count == 0
    after, wanted = event.after, expected.after
    length = len(wanted.hidden)
    assert after.lengths == length
    np.testing.assert_array_equal(after.positions[:length, 0], wanted.position)
    np.testing.assert_array_equal(np.flatnonzero(after.visual), first + np.arange(wanted.visual))
    near(after.hidden[:length], wanted.hidden, HIDDEN)
    sources = [set(np.flatnonzero(shares)) for shares in origins[first : first + wanted.visual]]
    assert sources == [{s - first for s in wanted.sources[first + j]} for j in range(wanted.visual)]


def compare_clusters(recycled: Any, expected: oracle.Clusters) -> None:
    pool, clusters = len(expected.assign), len(expected.merged)
    if clusters > 1:  # one cluster takes everything, whichever token is its centre
        np.testing.assert_array_equal(recycled.centers[:clusters], expected.centres)
        near(recycled.peak[:pool], expected.score, MERGED)
        near(recycled.distance[:pool], expected.delta, MERGED)
    np.testing.assert_array_equal(recycled.assignment[:pool], expected.assign)
    near(recycled.density[:pool], expected.density, MERGED)
    near(recycled.merged[:clusters], expected.merged, HIDDEN)


def near(found: Any, expected: Any, atol: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# The rivals: no oracle, but a few lines of NumPy on the trace of the stage before.

BATCH = [(3, 14, 5), (0, 9, 4), (5, 1, 5), (2, 0, 3), (4, 12, 2)]


def traced(sparsity: Sparsity) -> tuple[LlavaConfig, Any]:
    model = GROUPED
    plan = make_plan(sparsity, model, VISUAL, TEXT)
    batch = models.prompt(BATCH, text=TEXT, visual=VISUAL)
    trace = models.compiled_prefill(model, plan, NEW, trace=True)(models.params(model), batch)[2]
    return model, jax.tree.map(np.asarray, trace)


def check_kept(event: Any, scores_of: Any) -> None:
    """The visual tokens with the best `scores_of(row, its visual places)` are kept, at most all but one."""
    for i in range(len(BATCH)):
        places = np.flatnonzero(event.before.visual[i])
        count = min(PER_EVENT, max(len(places) - 1, 0))
        best = np.argsort(-scores_of(i, places), kind="stable")[:count]
        np.testing.assert_array_equal(np.flatnonzero(event.selection.kept[i]), places[np.sort(best)])
        assert event.after.lengths[i] == event.before.lengths[i] - len(places) + count


PER_EVENT = 5


def with_count(method: str, *layers: int) -> Sparsity:
    return METHODS[method].settings.changed(keep_at=tuple((layer, PER_EVENT) for layer in layers))


def attention_of_last_token(model: LlavaConfig, layer: int, tokens: Any, i: int, places: np.ndarray) -> np.ndarray:
    """In a layer that gets a row of `tokens`, to some places of it; mean over heads."""
    length = tokens.lengths[i]
    empty = np.zeros((model.text.num_key_value_heads, 0, model.text.head_dim))
    hidden, positions = tokens.hidden[i, :length].astype(float), tokens.positions[i, :length, 0]
    _, rows, _ = oracle.run_layer(decoder(model), layer, hidden, positions, (empty, empty))
    return rows.mean(0)[-1, places]


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_what_the_last_token_attends_to_is_kept(method: str) -> None:
    """FastV asks the layer that has just run, PyramidDrop the next one, on this one's output."""
    model, trace = traced(with_count(method, 0, 1))
    before = trace.tokens
    for number, event in enumerate(trace.events):
        layer, tokens = (number + 1, event.before) if method == "pyramiddrop" else (number, before)

        def attention(i: int, places: np.ndarray, layer: int = layer, tokens: Any = tokens) -> np.ndarray:
            return attention_of_last_token(model, layer, tokens, i, places)

        check_kept(event, attention)
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
    check_kept(event, lambda i, places: np.asarray(batch.saliency)[i, places])


def test_uniform_keeps_tokens_at_even_distances() -> None:
    _, trace = traced(with_count("uniform", 0, 1))
    for event in trace.events:
        for i in range(len(BATCH)):
            places = np.flatnonzero(event.before.visual[i])
            n, k = len(places), min(PER_EVENT, max(len(places) - 1, 0))
            ends = -(-np.arange(1, k + 1) * n // max(k, 1)) - 1  # the last of k runs of nearly equal length
            np.testing.assert_array_equal(np.flatnonzero(event.selection.kept[i]), places[ends])


def test_random_keeps_the_largest_of_the_numbers_that_its_seed_draws() -> None:
    _, trace = traced(with_count("random", 0, 1).changed(seed=3))
    for layer, event in enumerate(trace.events):
        key = jax.random.fold_in(jax.random.key(3), layer + 1)
        numbers = np.asarray(jax.random.uniform(key, (VISUAL if layer == 0 else PER_EVENT,)))
        check_kept(event, lambda _, places, numbers=numbers: numbers[: len(places)])


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
