"""Rotary positions that a prompt brings along, on one axis or several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import LlavaConfig, Sparsity, make_plan
from sparsevlm_jax.rotary import Rope
from tests import models

TEXT, VISUAL, NEW = 10, 14, 3
ONE_AXIS = models.config(2, layers=3)
METHODS = [Sparsity.dense(), Sparsity.v15(keep_at=[(0, 9), (1, 5)]), Sparsity.v20(keep_at=[(0, 9), (1, 5)], heads=2)]
BATCH = models.prompt([(3, 14, 7), (2, 11, 4)], text=TEXT, visual=VISUAL)


def with_axes(axes: tuple[int, ...]) -> LlavaConfig:
    plain = ONE_AXIS.text.rope
    return replace(ONE_AXIS, text=replace(ONE_AXIS.text, rope=Rope(plain.frequencies, axes, plain.scale, plain.theta)))


def answers(config: LlavaConfig, sparsity: Sparsity, prompt: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits behind the prompt and behind some given tokens; the cache's next positions."""
    plan = make_plan(sparsity, config, VISUAL, TEXT)
    tokens = np.arange(2 * NEW).reshape(2, NEW)
    logits, cache = models.forced_logits(models.params(ONE_AXIS), config, plan, prompt, tokens)
    return logits, np.asarray(cache.positions)


@pytest.mark.parametrize("sparsity", METHODS, ids=lambda s: s.method)
def test_three_equal_axes_answer_as_one_does_bit_for_bit(sparsity: Sparsity) -> None:
    pairs = len(ONE_AXIS.text.rope.frequencies)
    three = with_axes(tuple(number % 3 for number in range(pairs)))
    for found, expected in zip(answers(three, sparsity, BATCH), answers(ONE_AXIS, sparsity, BATCH), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sparsity", METHODS, ids=lambda s: s.method)
def test_a_prompt_that_counts_its_tokens_is_one_that_says_nothing(sparsity: Sparsity) -> None:
    counted = jnp.broadcast_to(jnp.arange(TEXT + VISUAL, dtype=jnp.int32)[None, :, None], (2, TEXT + VISUAL, 1))
    given = BATCH._replace(positions=counted, next_positions=BATCH.lengths)
    for found, expected in zip(answers(ONE_AXIS, sparsity, given), answers(ONE_AXIS, sparsity, BATCH), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_other_positions_give_another_answer_and_are_kept_while_decoding() -> None:
    """A shift of all positions leaves dense logits as they are, and shows in the cache."""
    counted = jnp.broadcast_to(jnp.arange(TEXT + VISUAL, dtype=jnp.int32)[None, :, None], (2, TEXT + VISUAL, 1))
    shifted = BATCH._replace(positions=counted + 7, next_positions=BATCH.lengths + 7)
    kept = Sparsity.dense().changed(positions="keep")
    expected, _ = answers(ONE_AXIS, kept, BATCH)
    found, positions = answers(ONE_AXIS, kept, shifted)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(positions, np.asarray(BATCH.lengths)[None] + 7 + NEW)
    stretched, _ = answers(ONE_AXIS, kept, BATCH._replace(positions=3 * counted))
    assert np.abs(stretched - expected).max() > 1e-2


def test_positions_of_another_number_of_axes_are_refused() -> None:
    counted = jnp.zeros((2, TEXT + VISUAL, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"positions are \(2, 24, 1\), expected \(2, 24, 3\)"):
        answers(with_axes((0, 1, 2, 0, 1, 2, 0, 1)), Sparsity.dense(), BATCH._replace(positions=counted))


def test_each_pair_of_channels_follows_its_own_axis() -> None:
    """The second axis stands still: its channels turn nothing, as if their frequencies were zero."""
    pairs = len(ONE_AXIS.text.rope.frequencies)
    axes = tuple(int(number >= pairs // 2) for number in range(pairs))
    counted = jnp.arange(TEXT + VISUAL, dtype=jnp.int32)[None, :, None]
    positions = jnp.broadcast_to(counted * jnp.asarray([[[1, 0]]]), (2, TEXT + VISUAL, 2))
    plain = ONE_AXIS.text.rope
    half = Rope(tuple(f if a == 0 else 0.0 for f, a in zip(plain.frequencies, axes, strict=True)), (0,) * pairs)
    frozen = replace(ONE_AXIS, text=replace(ONE_AXIS.text, rope=half))
    plan = make_plan(Sparsity.dense(), ONE_AXIS, VISUAL, TEXT)
    weights = models.params(ONE_AXIS)
    found = models.compiled_prefill(with_axes(axes), plan, 0)(weights, BATCH._replace(positions=positions))[0]
    expected = models.compiled_prefill(frozen, plan, 0)(weights, BATCH)[0]
    np.testing.assert_allclose(jax.device_get(found), jax.device_get(expected), atol=1e-5)
