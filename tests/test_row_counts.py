"""Rows of different numbers of visual tokens under one budget: each keeps what it would keep alone."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import Plan, Sparsity, UserError, generate_ids, llava_15_7b, make_plan, sparsity
from sparsevlm_jax.pruning.budgets import kept_table, plan_of_row
from tests import models

SEVEN_B = llava_15_7b()
MODEL = models.config(layers=3)  # pruned after layers 0 and 1
TEXT, NARROW, WIDE = 12, 24, 40
ROWS = [(3, 0, 8), (4, 5, 6), (2, 12, 7), (5, 23, 4)]
BUDGETS: dict[str, dict[str, Any]] = {
    "v1.5": {"keep": 7},
    "v2.0": {"keep": 7, "heads": 2},
    "fastv": {"layers": (0,)},
    "pyramiddrop": {"keep": 7},
    "uniform": {},
    "random": {"flops_share": 0.9},
    "vision": {"keep": 7},
}


def ragged(method: str, columns: int = NARROW, first: int = 0) -> Plan:
    return make_plan(sparsity(method, **BUDGETS[method]), MODEL, columns, TEXT, row_counts=range(first, columns + 1))


@cache
def answers(plan: Plan, rows: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of rows of `ROWS` in one batch: logits, and what share of each original visual token is in those left."""
    batch = models.prompt([ROWS[i] for i in rows], text=TEXT, visual=plan.visual_tokens, seeds=rows)
    logits, _, trace = models.compiled_prefill(MODEL, plan, 0, trace=True)(models.params(MODEL), batch)
    last = trace.events[-1].after if trace.events else trace.tokens
    left = [models.origins(trace, place)[-1][np.asarray(last.visual[place])] for place in range(len(rows))]
    return list(zip(np.asarray(logits), left, strict=True))


def check_equal(found: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    assert found[1].shape == wanted[1].shape
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-6)
    np.testing.assert_allclose(found[0], wanted[0], atol=3e-5, rtol=1e-5)  # padding changes the order of sums


@pytest.mark.parametrize("method", BUDGETS)
def test_a_row_is_pruned_alike_alone_in_its_own_bucket_and_beside_longer_rows(method: str) -> None:
    together = answers(ragged(method), (0, 1, 2, 3))
    alone = plan_of_row(ragged(method), ROWS[2][1])
    assert alone == make_plan(sparsity(method, **BUDGETS[method]), MODEL, ROWS[2][1], TEXT)
    check_equal(together[2], answers(alone, (2,))[0])
    assert len(together[2][1]) < ROWS[2][1]
    assert len(together[3][1]) < ROWS[3][1]


@pytest.mark.parametrize("method", ["v1.5", "v2.0", "random"])
def test_a_row_is_pruned_alike_in_a_larger_bucket(method: str) -> None:
    together = answers(ragged(method), (0, 1, 2, 3))
    for row, wanted in zip(answers(ragged(method, WIDE), (0, 1, 2, 3)), together, strict=True):
        check_equal(row, wanted)


def test_a_row_below_its_budget_and_one_without_images_are_not_pruned_beside_others() -> None:
    together = answers(ragged("v1.5"), (0, 1, 2, 3))
    np.testing.assert_array_equal(together[1][1], np.eye(ROWS[1][1]))
    dense = make_plan(Sparsity.dense(), MODEL, NARROW, TEXT)
    for i in (0, 1):
        check_equal(together[i], answers(dense, (0, 1, 2, 3))[i])


def test_batches_of_other_counts_within_the_range_run_in_the_same_program() -> None:
    plan = ragged("v1.5")
    program, weights = models.compiled_prefill(MODEL, plan, 0), models.params(MODEL)
    for rows in ([(3, 24, 8), (3, 0, 8)], [(2, 6, 7), (4, 7, 6)], [(2, 8, 7), (4, 23, 6)]):
        logits = program(weights, models.prompt(rows, text=TEXT, visual=NARROW))[0]
        assert bool(jnp.all(jnp.isfinite(logits)))
    assert program._cache_size() == 1


def test_a_row_of_a_number_below_those_of_the_plan_has_no_logits() -> None:
    settings = sparsity("v1.5", keep=6, recycle_group=2)
    plan = make_plan(settings, MODEL, NARROW, TEXT, row_counts=range(9, 11))
    batch = models.prompt([(3, 5, 8), (4, 9, 6), (5, 24, 7)], text=TEXT, visual=NARROW)
    logits, cache, trace = models.compiled_prefill(MODEL, plan, 0, trace=True)(models.params(MODEL), batch)
    kept = np.asarray([event.selection.kept_count for event in trace.events]).T
    np.testing.assert_array_equal(kept, [[0, 0], *kept_table(plan)])
    slots = np.array([key.shape[1] for key in cache.keys])
    assert (
        np.isnan(logits[0]).all()
        and np.isfinite(logits[1:]).all()
        and np.all(np.asarray(cache.lengths) <= slots[:, None])
    )


# The numbers.


@pytest.mark.parametrize("options", [{"keep": 40}, {}, {"flops_share": 0.5}, {"cache_bytes": 10**8}, {"ratio": 0.4}])
@pytest.mark.parametrize("method", ["v1.5", "v2.0", "pyramiddrop"])
def test_the_table_of_a_range_is_made_of_the_plans_of_its_numbers(method: str, options: dict[str, Any]) -> None:
    settings, counts = sparsity(method, **options), range(0, 1200, 48)  # 576 among them
    plan = make_plan(settings, SEVEN_B, 1200, 118, row_counts=counts)
    table, impossible = kept_table(plan), 0
    for visual, kept in zip(counts, table, strict=True):
        standing, rest = visual, []
        try:
            rest = list(make_plan(settings, SEVEN_B, visual, 118).stages[:-1])
        except UserError as error:
            impossible += "not possible" in str(error)
            continue
        for stage, most, row in zip(plan.stages[:-1], [s.keep for s in plan.stages[:-1]], kept, strict=True):
            assert most is not None and row <= most and standing <= stage.visual
            mine = rest.pop(0) if rest and rest[0].stop == stage.stop else None
            assert row == (standing if mine is None else mine.keep)
            standing = standing if mine is None else mine.standing
        assert not rest
    assert impossible < len(counts) - 2


def test_published_counts_hold_for_the_rows_that_have_576_tokens() -> None:
    plan = make_plan(Sparsity.v15(keep=128), SEVEN_B, 2928, row_counts=range(1, 2929))
    assert tuple(kept_table(plan)[575]) == (303, 110, 36) != tuple(kept_table(plan)[574])
    assert plan_of_row(plan, 576).stages == make_plan(Sparsity.v15(keep=128), SEVEN_B, 576).stages


@pytest.mark.parametrize(
    "settings",
    [Sparsity.v15(keep_at=[(2, 90)]), Sparsity.v1(keep=192), Sparsity.dense(), sparsity("pool", keep=100)],
    ids=lambda settings: settings.method,
)
def test_counts_given_by_layer_or_taken_from_data_do_not_follow_a_rows_number(settings: Sparsity) -> None:
    plan = make_plan(settings, SEVEN_B, 576, 118, row_counts=range(0, 577))
    assert plan == make_plan(settings, SEVEN_B, 576, 118) == plan_of_row(plan, 5)


def test_a_range_of_one_number_is_the_plan_of_that_number() -> None:
    assert make_plan(Sparsity.v15(), SEVEN_B, 576, row_counts=range(576, 577)) == make_plan(
        Sparsity.v15(), SEVEN_B, 576
    )


def test_the_table_is_made_anew_from_a_plan_that_was_pickled() -> None:
    plan = make_plan(sparsity("v1.5", flops_share=0.5), SEVEN_B, 900, 118, row_counts=range(0, 901, 3))
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and hash(again) == hash(plan)
    np.testing.assert_array_equal(kept_table(again), kept_table(plan))


def test_a_row_that_no_counts_bring_down_to_its_budget_is_refused_by_itself() -> None:
    plan = make_plan(Sparsity.v15(keep=96), SEVEN_B, 2928, row_counts=range(0, 2929))
    with pytest.raises(UserError, match="keep=96: not possible with pruning after layers 2, 6, 15 of 32: the least is"):
        plan_of_row(plan, 2928)
    assert plan_of_row(plan, 1000).equivalent_tokens() == pytest.approx(96, abs=1)
    assert plan_of_row(plan, 50).equivalent_tokens() == 50
    assert tuple(kept_table(plan)[2928]) == (1, 1, 1)
    with pytest.raises(UserError, match="keep=96: not possible"):
        make_plan(Sparsity.v15(keep=96), SEVEN_B, 2928, row_counts=range(2900, 2929))


@pytest.mark.parametrize("counts", [range(0), range(9, 0, -1), range(-3, 5), range(0, 578)])
def test_row_counts_that_no_row_can_have_are_refused(counts: range) -> None:
    with pytest.raises(ValueError, match="an ascending range within 0 to 576 is expected"):
        make_plan(Sparsity.v15(), SEVEN_B, 576, row_counts=counts)


@pytest.mark.parametrize(
    "depth, visual, method, options, wanted",
    [
        (32, 577, "v1.5", {}, ((2, 331), (6, 189), (15, 108))),
        (32, 2928, "v1.5", {"keep": 640}, ((2, 1266), (6, 548), (15, 237))),
        (32, 1152, "v2.0", {"keep": 384}, ((2, 668), (6, 387), (15, 225))),
        (32, 576, "v1.5", {"keep": 575}, ((2, 575), (6, 574), (15, 574))),
        (32, 576, "v2.0", {"flops_share": 0.3}, ((2, 161), (6, 45), (15, 13))),
        (40, 2144, "v1.5", {"cache_bytes": 900_000_000}, ((2, 1660), (7, 1286), (18, 996))),
        (80, 9000, "v1.5", {"keep": 2500, "layers": (-1, 3, 40, 79)}, ((-1, 5200), (3, 3004), (40, 1736), (79, 1003))),
        (24, 7, "v2.0", {"keep": 2}, ((1, 4), (4, 2), (11, 1))),
        (200, 576, "v1.5", {"keep": 192}, ((12, 331), (37, 190), (93, 110))),
    ],
)
def test_solved_counts_are_those_recorded(
    depth: int, visual: int, method: str, options: dict[str, Any], wanted: tuple[tuple[int, int], ...]
) -> None:
    decoder = replace(SEVEN_B.text, num_hidden_layers=depth)
    plan = make_plan(sparsity(method, **options), decoder, visual, 118)
    assert tuple((stage.stop - 1, stage.keep) for stage in plan.stages[:-1]) == wanted


# Through `generate_ids`.


def test_a_row_with_fewer_images_than_others_answers_as_it_does_alone() -> None:
    random, image = np.random.default_rng(3), np.full(MODEL.tokens_per_image, MODEL.image_token_id)
    pixels = random.normal(0, 1, (3, 3, 56, 56)).astype(np.float32)
    rows = [np.concatenate([image] * n + [random.integers(0, 180, 9)]).astype(np.int32) for n in (2, 0, 1)]
    run: dict[str, Any] = {"sparsity": sparsity("v1.5", keep=12), "max_new_tokens": 4, "end_tokens": ()}
    together = generate_ids(models.params(MODEL), MODEL, rows, pixels, **run)
    alone = generate_ids(models.params(MODEL), MODEL, rows[2:], pixels[2:], **run)
    assert together.tokens[2] == alone.tokens[0]
    assert together.visual_tokens[2] == alone.visual_tokens[0] != together.visual_tokens[0]
    assert together.visual_tokens[1] == [0, 0, 0]


# Budgets that count text.

COUNTING: list[dict[str, Any]] = [{"flops_share": 0.9}, {"cache_bytes": 20_000}]


@pytest.mark.parametrize("budget", COUNTING)
def test_the_table_of_several_lengths_of_text_is_made_of_the_tables_of_each(budget: dict[str, Any]) -> None:
    settings, counts, texts = sparsity("v1.5", **budget), range(0, NARROW + 1, 4), (4, 8, TEXT)
    plan = make_plan(settings, MODEL, NARROW, TEXT, row_counts=counts, row_texts=texts)
    tables = [kept_table(make_plan(settings, MODEL, NARROW, text, row_counts=counts)) for text in texts]
    np.testing.assert_array_equal(kept_table(plan), np.concatenate(tables))
    assert not np.array_equal(tables[0], tables[-1])
    assert plan_of_row(plan, 20, 8) == make_plan(settings, MODEL, 20, 8)


def test_other_budgets_do_not_look_at_text() -> None:
    plan = make_plan(Sparsity.v15(keep=7), MODEL, NARROW, TEXT, row_counts=range(25), row_texts=(4, TEXT))
    assert plan == ragged("v1.5")


@pytest.mark.parametrize("texts", [(), (8, 4), (4, TEXT + 1), (4, 4)])
def test_lengths_of_text_that_no_row_can_have_are_refused(texts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ascending numbers up to text_tokens \(12\) are expected"):
        make_plan(Sparsity.v15(), MODEL, NARROW, TEXT, row_counts=range(25), row_texts=texts)


@pytest.mark.parametrize("images", [(1, 1), (1, 2)])
def test_a_budget_that_counts_text_counts_each_rows_own(images: tuple[int, int]) -> None:
    """Texts of two buckets in one batch: each row is pruned as it is alone, not by the longest beside it."""
    random, image = np.random.default_rng(5), np.full(MODEL.tokens_per_image, MODEL.image_token_id)
    pixels = random.normal(0, 1, (sum(images), 3, 56, 56)).astype(np.float32)
    rows = [
        np.concatenate([*[image] * n, random.integers(0, 180, text)]).astype(np.int32)
        for n, text in zip(images, (20, 50), strict=True)
    ]
    run: dict[str, Any] = {"sparsity": sparsity("v1.5", flops_share=0.9), "max_new_tokens": 4, "end_tokens": ()}
    together = generate_ids(models.params(MODEL), MODEL, rows, pixels, **run)
    for row, own in enumerate((pixels[: images[0]], pixels[images[0] :])):
        alone = generate_ids(models.params(MODEL), MODEL, [rows[row]], own, **run)
        assert together.tokens[row] == alone.tokens[0]
        assert together.visual_tokens[row] == alone.visual_tokens[0]
    assert together.visual_tokens[0] != together.visual_tokens[1]
