"""Schedules: the solver, the published ones, what they cost, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from math import isqrt

import pytest

from sparsevlm_jax import LlavaConfig, Plan, Sparsity, TextConfig, UserError, llava_15_7b, make_plan, sparsity, tiny
from sparsevlm_jax.pruning.budgets import cache_bytes, paper_flops, scaled_layers
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.options import HeadOptions, RankOptions
from sparsevlm_jax.pruning.settings import Budget, Recycling

VISUAL = 576
SEVEN_B = llava_15_7b()
SOLVED = ("v1.5", "v2.0", "random", "uniform", "fastv", "pyramiddrop", "vision")
STANDING_V15 = {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)}
ENTERING = {("v1.5", 192): 206.5, ("v1.5", 128): 145.4, ("v1.5", 96): 114.1, ("v1.5", 64): 82.3}
ENTERING |= {("v2.0", 192): 206.8, ("v2.0", 64): 81.8}


def decoder(depth: int) -> TextConfig:
    """Only its depth matters, and that it has the 14 heads that v2.0 selects."""
    return replace(SEVEN_B.text, num_hidden_layers=depth)


def kept(plan: Plan) -> list[int | None]:
    return [stage.keep for stage in plan.stages[:-1]]


def counts_of(plan: Plan) -> tuple[tuple[int, int], ...]:
    return tuple((stage.stop - 1, stage.keep) for stage in plan.stages[:-1] if stage.keep is not None)


@cache
def triples() -> list[tuple[Sparsity, int, int, Plan | None]]:
    """Settings with random layers and target, depth and visual tokens, and the plan (None where it is refused)."""
    draw = random.Random(5)
    found = []
    for number in range(240):
        method = METHODS[SOLVED[number % len(SOLVED)]].settings
        depth = draw.randint(3, 48)
        visual = draw.choice([draw.randint(1, 30), draw.randint(30, 700), draw.randint(700, 3000)])
        layers = None if number % 2 else tuple(sorted(draw.sample(range(-1, depth), draw.randint(1, min(5, depth)))))
        target = draw.choice([draw.randint(1, visual), max(1, visual - draw.randint(0, 3))])
        settings = method.changed(layers=layers or method.budget.layers, keep=target)
        try:
            found.append((settings, depth, visual, make_plan(settings, decoder(depth), visual)))
        except UserError as error:
            assert f"the least is {least_possible(settings, depth, visual):,.1f} " in str(error)
            found.append((settings, depth, visual, None))
    return found


def least_possible(settings: Sparsity, depth: int, visual: int) -> float:
    layers = settings.budget.layers or scaled_layers(settings.budget.published_layers, depth)
    lowest = settings.changed(keep=None, keep_at=tuple((layer, 1) for layer in layers))
    return make_plan(lowest, decoder(depth), visual).equivalent_tokens()


def test_solver_is_within_a_token_of_over_200_random_targets_or_its_error_is_right() -> None:
    solved = 0
    for settings, depth, visual, plan in triples():
        keep = settings.budget.keep
        assert keep is not None
        case = settings.method, settings.budget.layers, depth, visual, keep
        if plan is None:
            assert keep < least_possible(settings, depth, visual), case
        else:
            assert abs(plan.equivalent_tokens() - keep) <= 1, (case, plan.equivalent_tokens())
            solved += 1
    assert 200 <= solved < len(triples())


def test_schedules_never_grow() -> None:
    for _, depth, visual, plan in triples():
        if plan is not None:
            entering = plan.entering()
            assert len(entering) == depth
            assert all(a >= b for a, b in pairwise([visual, *entering])), plan
            assert all(stage.standing <= stage.visual for stage in plan.stages)
            assert all(a.standing == b.visual for a, b in pairwise(plan.stages))


@pytest.mark.parametrize("method", ["v1.5", "v2.0"])
@pytest.mark.parametrize("layers, visual", [((0, 1, 3), 5), ((1, 2), 9), ((-1, 0, 2), 6)])
def test_keeping_one_token_everywhere_is_the_least_of_all_schedules(
    method: str, layers: tuple[int, ...], visual: int
) -> None:
    settings = METHODS[method].settings
    found = [
        make_plan(settings.changed(keep_at=tuple(zip(layers, counts, strict=True))), decoder(5), visual)
        for counts in product(range(1, visual + 1), repeat=len(layers))
    ]
    least = least_possible(settings.changed(layers=layers), 5, visual)
    assert least == min(plan.equivalent_tokens() for plan in found)


@pytest.mark.parametrize("method, keep", [(m, k) for m in METHODS for k in METHODS[m].published_counts])
def test_published_schedules_come_out_exactly(method: str, keep: int) -> None:
    plan = make_plan(sparsity(method, keep=keep), SEVEN_B, VISUAL)
    assert counts_of(plan) == tuple(zip((2, 6, 15), METHODS[method].published_counts[keep], strict=True))


@pytest.mark.parametrize("keep", STANDING_V15)
def test_v15_stands_as_many_as_the_authors_count(keep: int) -> None:
    plan = make_plan(Sparsity.v15(keep), SEVEN_B, VISUAL)
    assert tuple(stage.standing for stage in plan.stages[:-1]) == STANDING_V15[keep]
    assert plan.equivalent_tokens() == pytest.approx(keep, abs=1)


def test_equivalent_tokens_of_192_are_the_authors_192_03() -> None:
    assert make_plan(Sparsity.v15(192), SEVEN_B, VISUAL).equivalent_tokens() == pytest.approx(192.03, abs=0.005)


@pytest.mark.parametrize("method, keep", ENTERING)
def test_entering_tokens_of_published_schedules(method: str, keep: int) -> None:
    plan = make_plan(sparsity(method, keep=keep), SEVEN_B, VISUAL)
    assert plan.entering_tokens() == pytest.approx(ENTERING[method, keep], abs=0.06)


@pytest.mark.parametrize("keep, teraflops", [(576, 4.62), (192, 2.13), (128, 1.73), (96, 1.52), (64, 1.31)])
def test_paper_flops_with_118_words(keep: int, teraflops: float) -> None:
    plan = make_plan(Sparsity.v15(keep), SEVEN_B, VISUAL)
    flops = paper_flops(SEVEN_B.text, [118 + visual for visual in plan.entering()])
    assert round(flops / 1e12, 2) == teraflops


@pytest.mark.parametrize("depth", [24, 40])
def test_other_depths_get_the_published_layers_in_proportion(depth: int) -> None:
    plan = make_plan(Sparsity.v15(192), decoder(depth), VISUAL)
    assert [layer for layer, _ in counts_of(plan)] == [2 * depth // 32, 6 * depth // 32, 15 * depth // 32]
    assert plan.equivalent_tokens() == pytest.approx(192, abs=1)


def neighbours(plan: Plan, visual: int) -> list[Plan]:
    """Schedules that keep one token more or fewer at one pruning layer."""
    pairs = counts_of(plan)
    changed = [
        (*pairs[:i], (layer, count + step), *pairs[i + 1 :])
        for i, (layer, count) in enumerate(pairs)
        for step in (-1, 1)
        if count + step >= 1
    ]
    settings = plan.sparsity.changed(flops_share=None, cache_bytes=None)
    return [make_plan(settings.changed(keep_at=keep_at), SEVEN_B, visual) for keep_at in changed]


@pytest.mark.parametrize("method", ["v1.5", "v2.0", "fastv", "pyramiddrop"])
@pytest.mark.parametrize("share", [0.3, 0.45, 0.5, 0.8, 0.99])
def test_flops_share_is_met_within_one_step_or_refused(method: str, share: float) -> None:
    def flops(plan: Plan) -> int:
        return paper_flops(SEVEN_B.text, [118 + visual for visual in plan.entering()])

    settings = sparsity(method, flops_share=share)
    target = share * paper_flops(SEVEN_B.text, [118 + VISUAL] * 32)
    check_target(settings, target, flops, "flops_share=")


@pytest.mark.parametrize("method", ["v1.5", "v2.0", "vision"])
@pytest.mark.parametrize("size", [50_000_000, 120_000_000, 200_000_000, 350_000_000])
def test_cache_bytes_are_met_within_one_step_or_refused(method: str, size: int) -> None:
    def held(plan: Plan) -> int:
        return cache_bytes(SEVEN_B.text, [118 + visual for visual in plan.entering()], 2)

    check_target(sparsity(method, cache_bytes=size), size, held, "cache_bytes=")


def check_target(settings: Sparsity, target: float, cost, option: str) -> None:  # noqa: ANN001
    layers = settings.budget.layers or scaled_layers(settings.budget.published_layers, 32)
    bare = settings.changed(flops_share=None, cache_bytes=None, keep_at=tuple((layer, 1) for layer in layers))
    if target < cost(make_plan(bare, SEVEN_B, VISUAL)):
        with pytest.raises(UserError, match=f"{option}.*not possible.*the least is"):
            make_plan(settings, SEVEN_B, VISUAL, 118)
        return
    plan = make_plan(settings, SEVEN_B, VISUAL, 118)
    step = max(abs(cost(other) - cost(plan)) for other in neighbours(plan, VISUAL))
    assert abs(cost(plan) - target) <= step


@pytest.mark.parametrize("settings", [Sparsity.v15(VISUAL), sparsity("v2.0", flops_share=1.0)])
def test_a_target_of_dense_is_the_schedule_of_one_stage(settings: Sparsity) -> None:
    plan = make_plan(settings, SEVEN_B, VISUAL, 118)
    assert [(s.start, s.stop, s.visual, s.keep, s.standing) for s in plan.stages] == [(0, 32, VISUAL, None, VISUAL)]


@pytest.mark.parametrize("method", ["v2.0", "random", "pyramiddrop", "v1.5"])
def test_a_target_next_to_dense_is_met_though_every_pruning_layer_drops_a_token(method: str) -> None:
    plan = make_plan(sparsity(method, keep=VISUAL - 1), SEVEN_B, VISUAL)
    assert plan.equivalent_tokens() == pytest.approx(VISUAL - 1, abs=1)
    assert len(plan.stages) > 1


@pytest.mark.parametrize("method, least", [("v2.0", "36.1"), ("v1.5", "40.0")])
def test_keep_36_is_refused_for_layers_2_6_15_of_32_and_the_least_named(method: str, least: str) -> None:
    with pytest.raises(UserError, match=f"keep=36: .*after layers 2, 6, 15 of 32: the least is {least}"):
        make_plan(sparsity(method, keep=36), SEVEN_B, VISUAL)


def test_without_a_budget_a_third_is_kept() -> None:
    assert make_plan(Sparsity.v15(), SEVEN_B, VISUAL).stages == make_plan(Sparsity.v15(192), SEVEN_B, VISUAL).stages


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sparsity.v15(keep=0), "keep=0: at least 1"),
        (lambda: Sparsity.v15(keep_at=[(2, -1)]), "keep_at=(2, -1)"),
        (lambda: Sparsity.v15(keep_at=[(-2, 5)]), "keep_at=(-2, 5)"),
        (lambda: sparsity("v1.5", flops_share=1.5), "flops_share=1.5"),
        (lambda: sparsity("fastv", ratio=0.0), "ratio=0.0"),
        (lambda: sparsity("v1.5", recycle_ratio=1.5), "recycle_ratio 1.5"),
        (lambda: sparsity("v1.5", recycle_group=0), "recycle_ratio 0.3 must be in [0, 1], recycle_group 0"),
        (lambda: sparsity("v1.5", positions="drop"), 'positions is "drop"'),
        (lambda: sparsity("v3"), 'method="v3": expected one of dense, v1, v1.5'),
        (lambda: sparsity("v1.5", scale=1.0), "`scale` belongs to `method` v1, not to v1.5"),
        (lambda: sparsity("v1.5", gravity_floor=0.1), "`gravity_floor` belongs to `method` v2.0, not to v1.5"),
        (lambda: sparsity("v2.0", recycle_ratio=0.5), "`recycle_ratio`: v2.0 recycles nothing here; set `recycle`"),
        (lambda: Sparsity.v15().changed(heads=2), "v1.5 has no setting `heads`: it has keep, keep_at, "),
        (lambda: sparsity("v1", keep=192, keep_at=((2, 5),)), "v1 takes no `keep_at`"),
        (lambda: sparsity("pool", keep_at=((2, 90),)), "pool takes no `keep_at`: it shrinks images"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message: str) -> None:  # noqa: ANN001
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "settings, message",
    [
        (Sparsity.v15(keep=577), "keep=577: the prompt has only 576 visual tokens"),
        (Sparsity.v15(keep_at=[(32, 5)]), "pruning layer 32: the decoder has layers 0 to 31"),
        (Sparsity.v15(keep_at=[(6, 50), (2, 90)]), "pruning layers [6, 2]: expected them in ascending order"),
        (Sparsity.v15(keep_at=[(2, 90), (2, 50)]), "pruning layers [2, 2]: expected them in ascending order"),
        (Sparsity.v20(192, heads=33), "v2.0 selects 33 heads, the decoder has 32"),
        (sparsity("pool").changed(keep_at=((2, 90),)), "pool takes no `keep_at`: it shrinks images"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: Sparsity, message: str) -> None:
    with pytest.raises(UserError) as error:
        make_plan(settings, SEVEN_B, VISUAL)
    assert str(error.value).startswith(message)


def test_a_flat_name_changes_its_part_of_the_settings_and_no_other() -> None:
    settings = sparsity("v2.0", keep=9, heads=3, recycle=True, recycle_group=4, positions="renumber")
    parts = settings.budget, settings.recycling, settings.options, settings.positions
    assert parts == (Budget(keep=9), Recycling(group=4), HeadOptions(3), "renumber")
    assert settings.changed(keep=None, heads=14, recycle=False, positions="keep") == Sparsity.v20()
    assert sparsity("v1", scale=2.0, bias=1.0, ladder=True).options == RankOptions(2.0, 1.0, ladder=True)


def test_counts_given_by_layer_are_cut_to_one_below_what_stands() -> None:
    plan = make_plan(Sparsity.v20(keep_at=[(0, 900), (3, 900), (31, 900)]), SEVEN_B, VISUAL)
    assert kept(plan) == [575, 574, 573]
    assert (plan.stages[-1].start, plan.stages[-1].stop) == (32, 32)


@pytest.mark.parametrize("keep, pair", [(192, (13.5, 0.0)), (128, (9.0, 6.0)), (64, (0.8, 0.0))])
def test_v1_budgets_mean_the_released_scale_and_bias(keep: int, pair: tuple[float, float]) -> None:
    settings = sparsity("v1", keep=keep)
    assert settings.options == RankOptions(*pair)
    plan = make_plan(settings, SEVEN_B, VISUAL)
    assert [stage.stop - 1 for stage in plan.stages[:-1]] == [2, 6, 15, 19]


@pytest.mark.parametrize("settings", [{"keep": 100}, {}, {"scale": 2.0}])
def test_v1_wants_a_released_budget_or_scale_and_bias(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"v1 knows `keep` 192, 128, 64; for anything else set `scale` and `bias`"):
        sparsity("v1", **settings)


@pytest.mark.parametrize("text", [1, 10, 50, None])
def test_v1_sizes_hold_every_rank_that_the_text_can_have(text: int | None) -> None:
    for scale, bias in ((13.5, 0.0), (0.8, 1.0), (0.0, 3.0)):
        settings = sparsity("v1", scale=scale, bias=bias)
        stages = make_plan(settings, SEVEN_B, 40, text).stages
        for stage, after in pairwise(stages):
            for visual in range(1, stage.visual + 1):
                for rank in range(min(visual, text or visual) + 1):
                    count = visual if rank == visual else min(int(rank * scale + bias), visual - 1)
                    pool, clusters = settings.pool(visual - count), settings.clusters(visual - count)
                    assert count <= (stage.keep or 0) and pool <= stage.pool and clusters <= stage.clusters
                    assert count + clusters <= after.visual


def test_recycling_follows_the_released_formula() -> None:
    settings = Sparsity.v15()
    for dropped in range(1, 3001):
        pool = int(0.3 * dropped) + 1
        assert settings.pool(dropped) == pool
        assert settings.clusters(dropped) == int(pool / 10) + 1


def test_nothing_dropped_is_nothing_recycled() -> None:
    assert Sparsity.v15().pool(0) == Sparsity.v15().clusters(0) == 0
    assert Sparsity.v20().pool(500) == Sparsity.v20().clusters(500) == 0


def test_equal_settings_make_equal_plans_that_hash_alike() -> None:
    one, two = (make_plan(Sparsity.v15(192), llava_15_7b(), VISUAL) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != make_plan(Sparsity.v15(128), SEVEN_B, VISUAL)


def test_vision_prunes_before_the_first_layer() -> None:
    plan = make_plan(sparsity("vision", keep=100), SEVEN_B, VISUAL)
    assert [(s.start, s.stop, s.visual, s.keep) for s in plan.stages] == [(0, 0, 576, 100), (0, 32, 100, None)]
    assert plan.equivalent_tokens() == plan.entering_tokens() == 100


def test_fastv_and_pyramiddrop_have_the_ratios_of_their_papers() -> None:
    assert counts_of(make_plan(sparsity("fastv"), SEVEN_B, VISUAL)) == ((1, 288),)
    assert counts_of(make_plan(sparsity("pyramiddrop"), SEVEN_B, VISUAL)) == ((7, 288), (15, 144), (23, 72))


@pytest.mark.parametrize("method", ["pool", "downsample"])
@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("keep", [1, 8, 192, 500, 575])
def test_shrinking_takes_the_largest_grid_that_fits(method: str, images: int, keep: int) -> None:
    settings = sparsity(method, keep=keep)
    if keep < images:
        with pytest.raises(UserError, match=f"shrunk images of this prompt have {images} to {images * 576}"):
            make_plan(settings, SEVEN_B, images * 576)
        return
    plan = make_plan(settings, SEVEN_B, images * 576)
    grid = isqrt(keep // images)
    assert plan.grid == grid
    assert images * grid**2 <= keep < images * (grid + 1) ** 2
    assert [(s.visual, s.keep) for s in plan.stages] == [(images * grid**2, None)]


def test_shrinking_needs_a_square_of_patches() -> None:
    config: LlavaConfig = replace(tiny(), vision_feature_select_strategy="full")
    with pytest.raises(UserError, match="pool: shrinks squares of patches, .* leaves 17 visual tokens of 16 patches"):
        make_plan(sparsity("pool", keep=4), config, 17)
