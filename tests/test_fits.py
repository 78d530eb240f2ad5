"""Parameters, prompt, cache, plan and model that do not belong together never give an answer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import (
    Cache,
    Plan,
    Prompt,
    Sparsity,
    abstract_params,
    decode_step,
    embed,
    encode_images,
    init_params,
    make_plan,
    prefill,
    sparsity,
)
from sparsevlm_jax.generation.ladder import prefill_stage_by_stage
from tests import models

MODEL = models.config(layers=2)
DEEPER = models.config(layers=3)
TEXT, VISUAL, NEW = 12, 16, 2
V15 = sparsity("v1.5", keep_at=((0, 5),))
ROWS = [(3, 16, 5), (2, 9, 4)]


def plan(visual: int = VISUAL, text: int | None = TEXT, model: Any = MODEL, settings: Sparsity = V15) -> Plan:
    return make_plan(settings, model, visual, text)


def batch(rows: Any = ROWS, text: int = TEXT, visual: int = VISUAL) -> Prompt:
    return models.prompt(rows, text=text, visual=visual)


def shapes(prompt: Prompt, plan: Plan, model: Any = MODEL, params: Any = None, new: int = NEW) -> Any:
    """A prefill that is traced and not run."""
    run = partial(prefill, config=model, plan=plan, max_new_tokens=new)
    return jax.eval_shape(run, abstract_params(model, "float32") if params is None else params, prompt)


def test_what_belongs_together_is_taken() -> None:
    logits, cache, _ = shapes(batch(), plan())
    assert logits.shape == (2, MODEL.text.vocab_size)
    assert len(cache.keys) == 2


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        (batch(), plan(model=DEEPER), "the plan has 3 layers, the model 2"),
        (batch(), plan(model=models.config(layers=1)), "the plan has 1 layers, the model 2"),
        (batch(visual=20), plan(), "32 columns, the plan is for 16 visual and 12 other tokens, which are 28"),
        (batch([(3, 8, 5)], visual=8), plan(), "20 columns, the plan is for 16 visual and 12"),
        (batch(text=40), plan(), "56 columns, the plan is for 16 visual and 12"),
        (batch(), plan(text=40), "28 columns, the plan is for 16 visual and 40"),
        (batch(), plan(text=8), "28 columns, the plan is for 16 visual and 8"),
        (batch([(1, 2, 3)], text=4, visual=4), plan(text=None), "8 columns, the plan is for 16 visual tokens"),
        (batch()._replace(embeddings=jnp.zeros((2, 28, 32))), plan(), "width 32, the decoder has 64"),
        (batch()._replace(lengths=jnp.zeros(3, jnp.int32)), plan(), r"lengths \(3,\): expected \(2, 28\) and \(2,\)"),
        (
            batch()._replace(saliency=None),
            plan(settings=sparsity("vision", keep_at=((-1, 5),))),
            "method vision reads prompt.saliency",
        ),
    ],
)
def test_a_prompt_and_a_plan_that_do_not_fit_are_refused(prompt: Prompt, given: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(prompt, given)


def test_parameters_of_another_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="parameters have 3 decoder layers, the model's config says 2"):
        shapes(batch(), plan(), params=abstract_params(DEEPER, "float32"))


@pytest.mark.parametrize("new", [-1, None, 1.5, True])
@pytest.mark.usefixtures("unchecked")
def test_a_number_of_new_tokens_that_is_none_is_refused(new: Any) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is"):
        shapes(batch(), plan(), new=new)


def test_the_number_of_new_tokens_has_no_default() -> None:
    with pytest.raises(TypeError, match="max_new_tokens"):
        prefill(models.params(MODEL), batch(), MODEL, plan())  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("v1.5", MODEL, 16), "make_plan takes the settings themselves"),
        ((V15, MODEL, -1), "visual_tokens is -1"),
        ((V15, MODEL, 16.0), "visual_tokens is 16.0"),
        ((V15, MODEL, 16, -3), "text_tokens is -3"),
        ((sparsity("pool", keep=4), MODEL, 17), "shrinks whole images of 16 visual tokens, which 17 are not"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_plan_for_what_is_no_prompt_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(*arguments)


def cache_of(given: Plan, model: Any = MODEL, rows: Any = ROWS) -> Any:
    return shapes(batch(rows), given, model)[1]


def step(token: Any, cache: Any, given: Any, model: Any = MODEL) -> Any:
    run = partial(decode_step, config=model, plan=given)
    return jax.eval_shape(run, abstract_params(model, "float32"), token, cache)


TOKEN = jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize(
    ("cache", "given", "message"),
    [
        (lambda: cache_of(plan()), plan(model=DEEPER), "the plan has 3 layers, the model 2"),
        (lambda: cache_of(plan(model=DEEPER), DEEPER), plan(), "the cache has 3 layers, the plan 2"),
        (lambda: cache_of(plan()), plan(settings=Sparsity.dense()), "the cache has 2 stages, the plan 1"),
        (lambda: cache_of(plan(), rows=ROWS[:1]), plan(), r"the tokens are \(2,\), the cache has rows for \(1,\)"),
    ],
)
def test_a_cache_of_something_else_is_refused(cache: Any, given: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(TOKEN, cache(), given)


def test_a_cache_of_a_plan_that_prunes_elsewhere_is_refused() -> None:
    elsewhere = plan(model=DEEPER, settings=sparsity("v1.5", keep_at=((1, 5),)))
    with pytest.raises(ValueError, match="layers 1 to 2 hold .* but are one stage of the plan"):
        step(TOKEN, cache_of(elsewhere, DEEPER), plan(model=DEEPER), DEEPER)


def prefilled(prompt: Prompt, given: Plan, new: int = NEW) -> tuple[np.ndarray, Cache]:
    logits, cache, _ = models.compiled_prefill(MODEL, given, new)(models.params(MODEL), prompt)
    return np.asarray(logits), cache


def test_a_row_with_more_visual_tokens_or_more_text_than_the_plan_has_no_answer() -> None:
    rows = [(3, 16, 5), (3, 17, 5), (6, 8, 12), (5, 0, 15)]
    logits, _ = prefilled(batch(rows), plan())
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1:]).all()


def test_a_dense_plan_has_no_answer_for_more_visual_tokens_either() -> None:
    logits, _ = prefilled(batch([(3, 16, 5), (3, 17, 5), (5, 0, 15)]), plan(settings=Sparsity.dense()))
    assert np.isnan(logits).all(axis=1).tolist() == [False, True, False]


def test_decoding_past_the_end_of_the_cache_has_no_answer() -> None:
    _, cache = prefilled(batch([(3, 16, 9), (2, 9, 4)]), plan())  # the first row fills its columns
    finite = []
    for _ in range(4):
        logits, cache = models.compiled_step(MODEL, plan())(models.params(MODEL), TOKEN, cache)
        finite.append(np.isfinite(logits).all(axis=1).tolist())
    assert [row for row, _ in finite] == [True, True, False, False]
    assert [row for _, row in finite] == [True, True, True, True], "this row is shorter: its tokens still have a place"


def test_a_step_takes_the_stops_of_its_plan_alone() -> None:
    _, cache = prefilled(batch(), plan())
    weights = models.params(MODEL)
    by_plan, by_stops = (
        jax.jit(partial(decode_step, config=MODEL, plan=given), compiler_options=models.QUICK)(weights, TOKEN, cache)
        for given in (plan(), plan().stops)
    )
    np.testing.assert_array_equal(by_plan[0], by_stops[0])


def test_the_ladder_refuses_what_a_prefill_leaves_without_an_answer() -> None:
    law = plan(settings=sparsity("v1", scale=1.5, bias=1.0, layers=(0, 1)))
    with pytest.raises(ValueError, match="more visual tokens than the plan's 16"):
        prefill_stage_by_stage(models.params(MODEL), batch([(3, 17, 5)]), MODEL, law, max_new_tokens=NEW)
    with pytest.raises(ValueError, match="the plan has 3 layers, the model 2"):
        prefill_stage_by_stage(models.params(MODEL), batch(), MODEL, plan(model=DEEPER), max_new_tokens=NEW)


# Images


MARKER = MODEL.image_token_id
EMBED = jax.jit(embed, static_argnames=("config", "plan"), compiler_options=models.QUICK)


def embedded(rows: list[int], images: int | None) -> np.ndarray:
    """Embeddings of rows of so many markers between words, with so many images."""
    columns = max(rows) + 4
    ids = np.ones((len(rows), columns), np.int32)
    for row, count in zip(ids, rows, strict=True):
        row[2 : 2 + count] = MARKER
    pixels = None if images is None else jnp.asarray(PIXELS[:images])
    lengths = jnp.full(len(rows), columns, jnp.int32)
    return np.asarray(EMBED(models.params(MODEL), jnp.asarray(ids), lengths, pixels, config=MODEL).embeddings)


PIXELS = np.random.default_rng(0).normal(0, 1, (3, 3, 56, 56)).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "images", "fits"),
    [
        ([16, 16], 2, True),
        ([32, 0], 2, True),
        ([16, 16], 1, True),  # one row's images go with every row
        ([32, 32], 2, True),
        ([16, 16], 3, False),
        ([16, 15], 2, False),
        ([32, 16], 2, False),
        ([0, 0], 1, False),
        ([16, 0], None, False),
        ([0, 0], None, True),
    ],
)
def test_images_that_are_not_as_many_as_their_markers_have_no_embedding(
    rows: list[int], images: int | None, fits: bool
) -> None:
    found = embedded(rows, images)
    assert np.isfinite(found[rows.index(max(rows))]).all() == fits
    if fits and max(rows):
        assert len(np.unique(found[0, 2 : 2 + max(rows)].round(5), axis=0)) == max(rows)


def test_one_rows_images_are_those_of_every_row() -> None:
    shared = embedded([16, 16], 1)
    np.testing.assert_array_equal(shared[0], shared[1])


def test_images_that_a_plan_shrinks_must_be_shrunk() -> None:
    pool, weights = make_plan(sparsity("pool", keep=4), MODEL, 16), abstract_params(MODEL, "float32")
    ids, lengths = jnp.full((1, 8), MARKER, jnp.int32), jnp.full(1, 8, jnp.int32)

    def run(params: Any, shrunk: Plan | None, given: Plan) -> Any:
        return embed(params, ids, lengths, encode_images(params, jnp.asarray(PIXELS[:1]), MODEL, shrunk), MODEL, given)

    with pytest.raises(ValueError, match="the images are not shrunk, the plan shrinks each to 4 visual tokens"):
        jax.eval_shape(lambda params: run(params, None, pool), weights)
    with pytest.raises(ValueError, match="the images have 16 visual tokens, the plan has 8 in each of 1 rows"):
        jax.eval_shape(lambda params: run(params, None, plan(visual=8)), weights)
    assert jax.eval_shape(lambda params: run(params, pool, pool), weights).embeddings.shape == (1, 8, 64)


# Initialising


@pytest.mark.parametrize("attention", ["cudnn", "blockwise"])
def test_shapes_and_initial_values_depend_on_no_attention_kernel(attention: str) -> None:
    model = models.config(layers=1)
    other = replace(model, attention=attention)
    assert abstract_params(other, jnp.bfloat16) == abstract_params(model, jnp.bfloat16)
    init = jax.jit(init_params, static_argnums=(0, 2), compiler_options=models.QUICK)
    ours, theirs = (init(config, jax.random.key(0), jnp.float32) for config in (model, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
