"""v1's ladder of stage lengths gives what the one program with masks gives, on shorter sequences."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import Prompt, make_plan, sparsity
from sparsevlm_jax.generation import ladder
from sparsevlm_jax.generation.api import generate_ids
from sparsevlm_jax.generation.request import Generation
from tests import models, traces
from tests.test_compilation import events

GOLDEN = Path(__file__).parent / "golden"
MODEL = models.config(image_size=112, layers=2)
VISUAL, NEW = 64, 4
SHORT, LONG = 2, 20  # words after the image: they bound the rank, which decides how many tokens stay
BOTH_SHORT, BOTH_LONG, MIXED = (SHORT, SHORT), (LONG, LONG), (SHORT, LONG)  # one batch size: fewer programs


def row(words: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    before, after = (random.integers(1, 180, count) for count in (4, words))
    return np.concatenate([before, np.full(VISUAL, MODEL.image_token_id), after]).astype(np.int32)


@cache
def answer(rows: tuple[int, ...], stage_by_stage: bool, seed: int = 0) -> Generation:
    pixels = np.random.default_rng(seed + 50).normal(size=(len(rows), 3, 112, 112)).astype(np.float32)
    return generate_ids(
        models.params(MODEL),
        MODEL,
        [row(words, seed) for words in rows],
        np.repeat(pixels[:1], len(rows), axis=0),
        sparsity=sparsity("v1", scale=3.0, bias=0.0, layers=(0, 1), ladder=stage_by_stage),
        max_new_tokens=NEW,
        end_tokens=(),
    )


def lengths(generation: Generation) -> list[int]:
    return [stage.visual for stage in generation.plan.stages]


@pytest.mark.parametrize("rows", [BOTH_SHORT, BOTH_LONG, MIXED])
def test_ladder_gives_the_tokens_of_the_masked_program(rows: tuple[int, ...]) -> None:
    found, expected = answer(rows, True), answer(rows, False)
    assert found.tokens == expected.tokens
    assert all(len(tokens) == NEW for tokens in found.tokens)


def test_prompts_of_different_rank_run_different_stage_lengths() -> None:
    short, long = lengths(answer(BOTH_SHORT, True)), lengths(answer(BOTH_LONG, True))
    assert short[0] == long[0] == VISUAL
    assert all(a < b for a, b in zip(short[1:], long[1:], strict=True)), (short, long)


def test_stages_are_shorter_than_those_of_the_masked_program() -> None:
    masked = lengths(answer(MIXED, False))
    for rows in (BOTH_SHORT, BOTH_LONG, MIXED):
        assert all(a < b for a, b in zip(lengths(answer(rows, True))[1:], masked[1:], strict=True))


def test_a_batch_climbs_to_the_rung_of_its_most_demanding_row() -> None:
    assert lengths(answer(MIXED, True)) == lengths(answer(BOTH_LONG, True))


def test_a_row_answers_the_same_whatever_the_others_need() -> None:
    short, long = answer(MIXED, True).tokens
    assert short == answer(BOTH_SHORT, True).tokens[0]
    assert long == answer(BOTH_LONG, True).tokens[1]


def test_another_prompt_of_the_same_rungs_compiles_nothing() -> None:
    first = answer(BOTH_SHORT, True)
    with events() as seen:
        second = answer(BOTH_SHORT, True, seed=1)
    assert second.tokens != first.tokens
    assert lengths(second) == lengths(first)
    assert seen == []


@pytest.mark.parametrize("needed, most, expected", [(0, 9, 0), (1, 99, 8), (8, 99, 8), (9, 99, 16), (9, 10, 10)])
def test_rung_is_the_smallest_that_holds_what_is_needed(needed: int, most: int, expected: int) -> None:
    assert ladder.length_bucket(needed, most) == expected


@pytest.mark.parametrize(
    "name, planned, run, used", [("v1vid_8x17", 27, 16, 12), ("v2vid_4x26_gqa", 34, 24, 18), ("v3vid_8x37", 74, 32, 32)]
)
def test_recorded_videos_run_stages_far_below_the_bound(name: str, planned: int, run: int, used: int) -> None:
    """As docs/methods.md counts them: visual tokens behind the pruning layer."""
    case = traces.read(GOLDEN / f"{name}.npz")
    (config, params), sizes = traces.model(case), case.settings
    text = sizes["L"] - sizes["v_num"]
    plan = make_plan(traces.sparsity(sizes), config, sizes["v_num"], text)
    visual = np.zeros((1, sizes["L"]), bool)
    visual[:, case.visual] = True
    prompt = Prompt(jnp.asarray(case.arrays["inputs_embeds"]), jnp.asarray(visual), jnp.asarray([sizes["L"]]))
    logits, cache, ran = ladder.prefill_stage_by_stage(params, prompt, config, plan, max_new_tokens=1)
    held = int(cache.lengths[1, 0]) - text
    assert (plan.stages[1].visual, ran.stages[1].visual, held) == (planned, run, used)
    assert int(logits[0].argmax()) == case.arrays["tokens"][0]
