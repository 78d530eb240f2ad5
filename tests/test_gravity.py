"""v2.0's distance correction where it is zero or negative, and its selection of heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import Sparsity, StagePlan, UserError, llava_15_7b, make_plan, sparsity
from sparsevlm_jax.pruning.methods import sparsevlm
from sparsevlm_jax.pruning.methods.base import PruningContext
from sparsevlm_jax.pruning.methods.sparsevlm import gravity, score_by_selected_heads
from sparsevlm_jax.pruning.tokens import Tokens
from sparsevlm_jax.rotary import plain_rope
from tests import models

HEADS, HEAD_DIM, VISUAL, WORDS, FAR = 4, 16, 12, 4, 41
THETA = 200.0  # gravity of a head dim of 16 changes sign within a few dozen tokens
RATERS = (13, 15)


def layer(distance: int) -> PruningContext:
    """`VISUAL` visual tokens, then words at `distance` more behind them."""
    random = np.random.default_rng(1)
    length = VISUAL + WORDS
    places = jnp.arange(length)[None]
    draw = partial(random.normal, size=(1, length, HEADS, HEAD_DIM))
    tokens = Tokens(
        hidden=jnp.zeros((1, length, 8)),
        positions=jnp.where(places < VISUAL, places, places + distance)[..., None],
        visual=places < VISUAL,
        rater_rows=jnp.asarray([RATERS]),
        rater_count=jnp.array([len(RATERS)]),
        text_count=jnp.array([WORDS]),
        lengths=jnp.array([length]),
        saliency=None,
    )
    stage = StagePlan(0, 1, VISUAL, keep=5, standing=5)
    return PruningContext(
        jnp.asarray(draw(), jnp.float32), jnp.asarray(draw(), jnp.float32), tokens, stage, plain_rope(HEAD_DIM, THETA)
    )


def attention(of: PruningContext) -> np.ndarray:
    """Of the raters on the visual tokens, [n, r, v]."""
    return np.asarray(of.attention(jnp.asarray([RATERS])))[0, :, :, :VISUAL].astype(float)


def weight(of: PruningContext) -> np.ndarray:
    """Gravity [r, v] in NumPy."""
    positions = np.asarray(of.tokens.positions)[0, :, 0]
    distance = positions[list(RATERS), None] - positions[None, :VISUAL]
    frequencies = THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return 2 / np.sqrt(HEAD_DIM) * np.cos(distance[..., None] * frequencies).sum(-1)


def expected(corrected: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [v] and the chosen heads of corrected attention [n, r, v]."""
    chosen = np.sort(np.argsort(-corrected.sum((1, 2)), kind="stable")[:heads])
    return corrected[chosen].mean((0, 1)), chosen


def scores(of: PruningContext, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    found = score_by_selected_heads(of, Sparsity.v20(heads=2).changed(**settings))
    return np.asarray(found.values)[0, :VISUAL], np.flatnonzero(np.asarray(found.details["heads"])[0])


def check(found: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.parametrize("distance", [0, FAR])
def test_attention_is_divided_by_gravity_whatever_its_sign(distance: int) -> None:
    of = layer(distance)
    assert (weight(of) < 0).any() == (distance == FAR)
    check(scores(of), expected(attention(of) / weight(of), heads=2))


def test_negative_gravity_turns_the_sign_of_a_score() -> None:
    of = layer(FAR)
    values, _ = scores(of, heads=HEADS)
    repelled = (weight(of) < 0).all(0)
    assert repelled.any() and (values[repelled] < 0).all()
    assert (values[(weight(of) > 0).all(0)] > 0).all()


def test_a_pair_of_no_gravity_at_all_counts_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    of = layer(0)
    found = np.ones((1, len(RATERS), VISUAL + WORDS), np.float32)
    found[0, 0, 3] = found[0, 1, 7] = 0
    monkeypatch.setattr(sparsevlm, "gravity", lambda *_: jnp.asarray(found))
    corrected = attention(of)
    corrected[:, 0, 3] = corrected[:, 1, 7] = 0
    check(scores(of), expected(corrected, heads=2))


def test_a_floor_bounds_gravity_from_below() -> None:
    of = layer(FAR)
    check(scores(of, gravity_floor=0.5), expected(attention(of) / np.maximum(weight(of), 0.5), heads=2))


@pytest.mark.parametrize("distance", [0, FAR, 5000])
def test_with_a_floor_every_score_is_finite_and_positive(distance: int) -> None:
    values, _ = scores(layer(distance), gravity_floor=0.1)
    assert np.isfinite(values).all() and (values > 0).all()


def test_a_floor_of_zero_leaves_gravity_as_released() -> None:
    of = layer(FAR)
    check(scores(of, gravity_floor=0.0), scores(of))


def test_gravity_of_the_released_models_turns_negative_beyond_about_1700_tokens() -> None:
    positions = jnp.arange(3000)[None, :, None]
    weights = np.asarray(gravity(positions, jnp.array([[2999]]), plain_rope(128, 10000.0)))[0, 0, ::-1]  # by distance
    first = int(np.argmax(weights < 0))
    assert 1650 < first < 1800
    assert weights[0] == pytest.approx(2 * 64 / np.sqrt(128))


def test_more_heads_than_the_decoder_has_are_refused() -> None:
    with pytest.raises(UserError, match="v2.0 selects 14 heads, the decoder has 4: set `heads` to fewer"):
        make_plan(sparsity("v2.0", keep=6), models.config(), 16)


def test_as_many_heads_as_the_decoder_has_are_fine() -> None:
    assert len(make_plan(sparsity("v2.0", keep=6, heads=4), models.config(), 16).stages) > 1
    assert len(make_plan(sparsity("v2.0", keep=192), llava_15_7b(), 576).stages) == 4
