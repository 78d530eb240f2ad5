"""What a prompt has the first decoder layers add to their outputs, dense and through pruning."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import Plan, Prompt, Sparsity, make_plan, prefill, sparsity
from sparsevlm_jax.generation.ladder import prefill_stage_by_stage
from sparsevlm_jax.models.decoder import DecoderLayer
from sparsevlm_jax.models.stages import decoder_of
from sparsevlm_jax.ops.attention import attend
from sparsevlm_jax.ops.rope import rotation
from tests import models

MODEL = models.config(2, layers=4)
TEXT, VISUAL, NEW, FIRST = 10, 14, 2, 3
ROWS = [(3, 14, 7), (2, 11, 4)]
AT_0_AND_1 = {"keep_at": ((0, 9), (1, 5))}
METHODS = {
    "dense": Sparsity.dense(),
    "v1.5": sparsity("v1.5", **AT_0_AND_1),
    "v2.0": sparsity("v2.0", heads=2, **AT_0_AND_1),
    "pyramiddrop": sparsity("pyramiddrop", layers=(0, 1)),
    "vision": sparsity("vision", keep_at=((-1, 9),)),
}
every_method = pytest.mark.parametrize("method", METHODS)


def plan_of(method: str) -> Plan:
    return make_plan(METHODS[method], MODEL, VISUAL, TEXT)


def prompt(layers: int = FIRST) -> Prompt:
    """With additions for visual tokens, as large as what they are added to."""
    batch = models.prompt(ROWS, text=TEXT, visual=VISUAL)
    noise = np.random.default_rng(5).normal(0, 0.5, (*batch.visual.shape, layers, models.WIDTH)).astype(np.float32)
    return batch._replace(add=jnp.where(batch.visual[:, :, None, None], noise, 0))


def run(method: str, batch: Prompt) -> tuple[np.ndarray, Any, Any]:
    """Logits, cache and trace."""
    return models.compiled_prefill(MODEL, plan_of(method), NEW, trace=True)(models.params(MODEL), batch)


def by_hand(plan: Plan, batch: Prompt, trace: Any) -> np.ndarray:
    """Logits of a plain loop over the layers. At an event all that belongs to a token moves where the event says."""
    decoder = models.params(MODEL)["language_model"]
    hidden, add, events = batch.embeddings, batch.add, list(trace.events)
    positions, lengths = trace.tokens.positions, trace.tokens.lengths
    for stage in plan.stages:
        for layer in range(stage.start, stage.stop):
            hidden = run_layer(decoder[f"layers_{layer}"], hidden, positions, lengths)
            if add is not None and layer < add.shape[2]:
                hidden = hidden + add[:, :, layer]
        if stage.keep is not None:
            event = events.pop(0)
            valid = np.asarray(event.before.valid)
            np.testing.assert_allclose(np.asarray(event.before.hidden)[valid], np.asarray(hidden)[valid], atol=1e-4)
            hidden, add = moved(hidden, event), moved(add, event)
            positions, lengths = event.after.positions, event.after.lengths
    assert not events
    last = hidden[np.arange(len(lengths)), lengths - 1]
    return np.asarray(decoder_of(models.params(MODEL), MODEL).logits(last))


@jax.jit
def run_layer(params: Any, hidden: Any, positions: Any, lengths: Any) -> Any:
    def attended(query: Any, key: Any, value: Any) -> tuple[Any, None]:
        return attend(query, key, value, lengths, causal=True, implementation="xla"), None

    return DecoderLayer(MODEL.text).apply({"params": params}, hidden, rotation(positions, MODEL.text.rope), attended)[0]


def moved(values: Any, event: Any) -> Any:
    """[b, l, ...] of a sequence as that of the sequence after an event: merged tokens have their members' mean."""
    rows = []
    for i, row in enumerate(np.asarray(values)):
        if event.recycled is not None:
            row = np.concatenate([row, np.tensordot(event.recycled.weights[i], row[event.selection.pool[i]], 1)])
        rows.append(row[event.source[i]])
    return jnp.asarray(np.stack(rows))


@every_method
def test_additions_go_where_a_plain_loop_over_the_layers_puts_them(method: str) -> None:
    logits, _, trace = run(method, prompt())
    np.testing.assert_allclose(logits, by_hand(plan_of(method), prompt(), trace), atol=1e-4)
    assert np.abs(logits - run(method, prompt()._replace(add=None))[0]).max() > 0.1, "they matter"


@every_method
def test_adding_zero_changes_nothing(method: str) -> None:
    zero = prompt()._replace(add=jnp.zeros((len(ROWS), TEXT + VISUAL, FIRST, models.WIDTH)))
    for found, expected in zip(run(method, zero)[:2], run(method, prompt()._replace(add=None))[:2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("layers", "carried"), [(1, [0, 0]), (2, [1, 0]), (3, [2, 1]), (4, [3, 2])])
def test_what_has_been_added_is_carried_no_further(layers: int, carried: list[int]) -> None:
    *_, trace = shapes("v1.5", prompt(layers))
    for event, left in zip(trace.events, carried, strict=True):
        for tokens in (event.before, event.after):
            assert (0 if tokens.add is None else tokens.add.shape[2]) == left


@every_method
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_additions_take_on_the_precision_of_the_decoder(method: str, dtype: str) -> None:
    batch = prompt()
    narrow = batch._replace(embeddings=batch.embeddings.astype("bfloat16"), add=batch.add.astype(dtype))
    _, cache, trace = shapes(method, narrow, "bfloat16")
    assert {leaf.dtype for leaf in (*cache.keys, trace.hidden)} == {jnp.dtype("bfloat16")}


def shapes(method: str, batch: Prompt, dtype: str = "float32") -> Any:
    run = partial(prefill, config=MODEL, plan=plan_of(method), max_new_tokens=NEW, trace=True)
    return jax.eval_shape(run, models.params(MODEL, dtype), batch)


def test_a_decoded_token_gets_no_addition() -> None:
    """As if it had stood in the prompt, with zeros to add."""
    weights, tokens = models.params(MODEL), np.array([[5], [9]], np.int32)
    batch = models.prompt([(2, 14, 7), (2, 11, 4)], text=TEXT, visual=VISUAL)._replace(add=prompt().add)
    logits, _ = models.forced_logits(weights, MODEL, plan_of("dense"), batch, tokens)
    rows, words = np.arange(len(tokens)), weights["language_model"]["embed_tokens"]["embedding"][tokens[:, 0]]
    longer = batch._replace(
        embeddings=batch.embeddings.at[rows, batch.lengths].set(words),
        add=batch.add.at[rows, batch.lengths].set(0),
        lengths=batch.lengths + 1,
    )
    np.testing.assert_allclose(logits[:, 1], run("dense", longer)[0], atol=1e-4)


def test_the_ladder_carries_additions_along() -> None:
    model = models.config(2, layers=2)
    plan, weights = (
        make_plan(sparsity("v1", scale=1.0, bias=2.0, layers=(0,)), model, VISUAL, TEXT),
        models.params(model),
    )
    logits, *_ = prefill_stage_by_stage(weights, prompt(2), model, plan, max_new_tokens=NEW)
    expected, *_ = models.compiled_prefill(model, plan, NEW)(weights, prompt(2))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(2, 24, 64), (1, 24, 3, 64), (2, 23, 3, 64), (2, 24, 3, 32), (2, 24, 5, 64), (2, 24, 0, 64)]
)
def test_additions_of_another_shape_are_refused(shape: tuple[int, ...], unchecked: None) -> None:
    with pytest.raises(ValueError, match="add is .* expected .2, 24, 1 to 4 layers, 64.") as refused:
        shapes("v1.5", prompt()._replace(add=jnp.zeros(shape)))
    assert str(shape) in str(refused.value)
