"""Prefill, decoding and generation: against recomputation, against themselves without batch, jit, or streaming."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import Plan, Sparsity, decode_step, embed, init_params, make_plan, prefill, sparsity, tiny
from sparsevlm_jax.generation import request
from sparsevlm_jax.generation.api import generate_ids, stream_ids
from sparsevlm_jax.generation.loop import SamplingParams, sample
from sparsevlm_jax.inputs.packing import pack
from sparsevlm_jax.models.stages import Trace
from sparsevlm_jax.ops.attention import target
from sparsevlm_jax.pruning.prune import PruningStep
from tests import models, oracle

MODEL = models.config(layers=4)
SHORT = models.config(layers=2)  # where whole programs are compiled, from pixels to the last token
TEXT, VISUAL = 24, 40  # columns of the rectangle that prompts are packed into
ROWS = [(7, 40, 17), (3, 31, 12), (9, 22, 8), (0, 0, 20)]
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "v1.5": {"layers": (0, 2)},
    "v1": {"layers": (0, 2), "scale": 1.5, "bias": 1.0},
    "v2.0": {"layers": (0, 2), "heads": 2},
    "random": {"layers": (0, 2)},
    "uniform": {"layers": (0, 2)},
    "fastv": {},
    "pyramiddrop": {},
    "vision": {},
}
SEQUENCES = np.random.default_rng(0).integers(0, 180, (len(ROWS), 5)).astype(np.int32)  # tokens to decode
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "key": jax.random.key(3)}


def plan_of(method: str) -> Plan:
    return make_plan(sparsity(method, **METHODS[method]), MODEL, VISUAL, TEXT)


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (3, 56, 56)).astype(np.float32)


def ids(seed: int, *parts: int | str) -> np.ndarray:
    """A row of ids: runs of so many random words, and images."""
    random = np.random.default_rng(seed)
    image = np.full(SHORT.tokens_per_image, SHORT.image_token_id)
    found = [random.integers(0, 180, part) if isinstance(part, int) else image for part in parts]
    return np.concatenate(found).astype(np.int32)


# Prefix, question and number of images differ from row to row; one row has none.
CONVERSATION = [
    ids(1, 5, "image", 11),
    ids(2, 2, "image", 3, "image", 7),
    ids(3, 15),
    ids(4, 9, "image", 4),
]
IMAGES = [[image(1)], [image(2), image(3)], [], [image(4)]]
PIXELS = np.stack([p for row in IMAGES for p in row])
FIVE = sparsity("v1.5", layers=(0,))


def answers(
    rows: Any = CONVERSATION, pixels: Any = PIXELS, settings: Sparsity = FIVE, end=(), tokens: int = 8, **options
):
    return generate_ids(
        models.params(SHORT),
        SHORT,
        rows,
        pixels,
        sparsity=settings,
        max_new_tokens=tokens,
        end_tokens=end,
        **options,
    )


@pytest.mark.parametrize("method", ["v1.5", "v2.0"])
def test_stages_padded_for_nvidia_keep_and_answer_the_same(method: str) -> None:
    """Traced as for NVIDIA, run on the CPU: lengths are multiples of 8, and nothing valid differs."""
    batch, plan, model = models.prompt(ROWS, text=TEXT, visual=VISUAL), plan_of(method), replace(MODEL, attention="xla")
    found = []
    for platform in ("cpu", "cuda"):
        with target(platform):
            run = partial(prefill, config=model, plan=plan, max_new_tokens=5, trace=True)
            run = jax.jit(run, compiler_options=models.QUICK)
            found.append(run(models.params(MODEL), batch))
    (logits, cache, trace), (padded_logits, padded_cache, padded) = found
    np.testing.assert_allclose(padded_logits, logits, atol=1e-4)
    np.testing.assert_array_equal(padded_cache.lengths, cache.lengths)
    assert any(event.after.visual.shape[1] % 8 for event in trace.events), "nothing to pad"
    for event, other in zip(trace.events, padded.events, strict=True):
        length, columns = event.after.visual.shape[1], other.after.visual.shape[1]
        assert columns % 8 == 0 and 0 <= columns - length < 8
        valid = np.asarray(event.after.valid)
        np.testing.assert_array_equal(other.after.valid[:, :length], valid)
        assert not np.any(other.after.valid[:, length:]) and not np.any(other.after.raters[:, length:])
        np.testing.assert_array_equal(other.after.raters[:, :length], event.after.raters)
        np.testing.assert_array_equal(from_one_side(other)[:, :length][valid], from_one_side(event)[valid])


def from_one_side(event: PruningStep) -> np.ndarray:
    """Where tokens come from; of merged ones their number, from -1 down."""
    source, columns = np.asarray(event.source), event.before.visual.shape[1]
    return np.where(source < columns, source, columns - 1 - source)


# Caches against recomputation


@cache
def traced(method: str) -> tuple[Any, Trace, np.ndarray, Any]:
    """Two rows of different lengths, prefilled and decoded: prompt, trace, logits of every step, final cache."""
    batch = models.prompt(ROWS[:2], text=TEXT, visual=VISUAL)
    weights, plan = models.params(MODEL), plan_of(method)
    run, step = models.compiled_prefill(MODEL, plan, 5, trace=True), models.compiled_step(MODEL, plan)
    logits, held, trace = run(weights, batch)
    found = [logits]
    for column in SEQUENCES[:2].T:
        logits, held = step(weights, jnp.asarray(column), held)
        found.append(logits)
    return batch, jax.tree.map(np.asarray, trace), np.stack(found, axis=1), held


def recompute(method: str, row: int, new: np.ndarray) -> np.ndarray:
    """Logits after a prompt and `new` tokens, with no cache: every layer runs over all of them at once.

    The prompt's selections are those of the trace; positions are as the method defines them.
    """
    batch, trace, _, _ = traced(method)
    plan, decoder = plan_of(method), models.oracle_decoder(models.params(MODEL), MODEL)
    length = int(batch.lengths[row])
    x = oracle.f64(batch.embeddings[row, :length])
    table = oracle.f64(decoder.weights["model.embed_tokens.weight"])
    after = table[new]
    positions = np.arange(length)
    empty = np.zeros((decoder.kv_heads, 0, decoder.head_dim))
    for k, stage in enumerate(plan.stages):
        first_new = length if plan.sparsity.positions == "keep" else len(x)
        every = np.r_[positions, first_new + np.arange(len(new))]
        joined = np.concatenate([x, after])
        for layer in range(stage.start, stage.stop):
            joined, _, _ = oracle.run_layer(decoder, layer, joined, every, (empty, empty))
        x, after = joined[: len(x)], joined[len(x) :]
        if stage.keep is not None:
            x, positions = pruned(plan.sparsity, trace.events[k], row, x, positions)
    final = decoder.norm(np.concatenate([x, after])[-1:], "norm")
    return (final @ oracle.f64(decoder.weights["lm_head.weight"]).T)[0]


def pruned(settings: Sparsity, event: Any, row: int, x: np.ndarray, positions: np.ndarray):
    """The sequence that is left of x by a recorded choice."""
    selection, visual = event.selection, event.before.visual[row]
    kept = selection.kept[row]
    merged = np.zeros((0, x.shape[1]))
    if event.recycled is not None:
        clusters, members = selection.cluster_count[row], selection.pool_count[row]
        merged = event.recycled.weights[row, :clusters, :members] @ x[selection.pool[row, :members]]
    places = np.arange(len(x))
    end = np.flatnonzero(visual)[-1]
    before = places[(places <= end) & (~visual[: len(x)] | kept[: len(x)])]
    behind = places[places > end]
    x = np.concatenate([x[before], merged, x[behind]])
    if settings.positions == "keep":
        return x, positions[np.r_[before, behind]]
    return x, np.arange(len(x))


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("method", ["dense", "v1.5", "v2.0"])
def test_decoding_with_caches_equals_full_recomputation_at_every_step(method: str, row: int) -> None:
    _, _, logits, _ = traced(method)
    for step in range(SEQUENCES.shape[1] + 1):
        expected = recompute(method, row, SEQUENCES[row, :step])
        np.testing.assert_allclose(logits[row, step], expected, atol=2e-4, rtol=0, err_msg=f"step {step}")


def test_a_new_token_stands_at_its_layers_own_cache_length_in_v15() -> None:
    _, _, _, held = traced("v1.5")
    np.testing.assert_array_equal(held.positions, held.lengths)
    assert len(set(np.asarray(held.lengths)[:, 0])) == len(plan_of("v1.5").stages)


def test_a_new_token_stands_behind_the_full_prompt_in_v20() -> None:
    batch, _, _, held = traced("v2.0")
    expected = np.asarray(batch.lengths) + SEQUENCES.shape[1]
    np.testing.assert_array_equal(held.positions, np.broadcast_to(expected, held.positions.shape))
    assert np.all(np.asarray(held.lengths)[1:] < expected)


def test_keeping_all_visual_tokens_is_dense() -> None:
    everything = make_plan(Sparsity.v15(keep=VISUAL), MODEL, VISUAL, TEXT)
    assert [(stage.start, stage.stop, stage.keep) for stage in everything.stages] == [(0, 4, None)]
    batch = models.prompt(ROWS, text=TEXT, visual=VISUAL)
    logits, held, _ = models.compiled_prefill(MODEL, everything, 0)(models.params(MODEL), batch)
    dense_logits, dense_held = prefilled("dense")
    np.testing.assert_array_equal(logits, dense_logits)
    np.testing.assert_array_equal(held.positions, dense_held.positions)


def test_pruning_changes_the_logits() -> None:
    """Otherwise the comparisons of this file would say nothing about it."""
    _, _, dense, _ = traced("dense")
    for method in ("v1.5", "v2.0"):
        assert np.max(np.abs(traced(method)[2] - dense)) > 1


def test_jit_equals_no_jit() -> None:
    model = models.config(layers=1)  # without jit every operation of every shape compiles by itself
    plan = make_plan(sparsity("v1.5", layers=(0,)), model, VISUAL, TEXT)
    batch, weights = models.prompt(ROWS[:2], text=TEXT, visual=VISUAL), models.params(model)
    logits, held, _ = prefill(weights, batch, model, plan, max_new_tokens=1)
    then, _ = decode_step(weights, jnp.asarray(SEQUENCES[:2, 0]), held, model, plan)
    compiled, _ = models.forced_logits(weights, model, plan, batch, SEQUENCES[:2, :1])
    np.testing.assert_allclose(jnp.stack([logits, then], axis=1), compiled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2.0), ("float16", 0.2)])
def test_16_bit_parameters_compute_nearly_the_same(dtype: str, tolerance: float) -> None:
    """Dense, where no choice of tokens depends on the rounding; logits spread over about 20."""
    model = models.config(layers=1)
    plan = make_plan(Sparsity.dense(), model, VISUAL, TEXT)
    found = [
        models.forced_logits(
            models.params(model, kind),
            model,
            plan,
            models.prompt(ROWS, text=TEXT, visual=VISUAL, dtype=kind),
            SEQUENCES,
        )
        for kind in ("float32", dtype)
    ]
    (exact, _), (rounded, held) = found
    np.testing.assert_allclose(rounded, exact, atol=tolerance, rtol=0)
    assert rounded.dtype == np.float32
    assert {leaf.dtype.name for leaf in held.keys + held.values} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pruning_works_in_16_bit(dtype: str) -> None:
    model = models.config(layers=2)
    plan = make_plan(sparsity("v1.5", layers=(0,)), model, VISUAL, TEXT)
    batch = models.prompt(ROWS, text=TEXT, visual=VISUAL, dtype=dtype)
    logits, held = models.forced_logits(models.params(model, dtype), model, plan, batch, SEQUENCES[:, :1])
    assert np.all(np.isfinite(logits))
    assert held.lengths[1, 0] < held.lengths[0, 0]


# Batches


@cache
def prefilled(method: str) -> tuple[Any, Any]:
    batch = models.prompt(ROWS, text=TEXT, visual=VISUAL)
    return models.compiled_prefill(MODEL, plan_of(method), 0)(models.params(MODEL), batch)[:2]


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_equal_the_rows_alone(method: str) -> None:
    """Prefix, question and visual-token counts differ; the last row has no image."""
    logits, held = prefilled(method)
    batch, plan = models.prompt(ROWS, text=TEXT, visual=VISUAL), plan_of(method)
    stage_of = [i for i, stage in enumerate(plan.stages) for _ in range(stage.start, stage.stop)]
    for i in range(len(ROWS)):
        alone = models.one_row(batch, i)
        row_logits, row_held, _ = models.compiled_prefill(MODEL, plan, 0)(models.params(MODEL), alone)
        np.testing.assert_allclose(row_logits[0], logits[i], atol=2e-4, rtol=0)
        np.testing.assert_array_equal(row_held.lengths[:, 0], held.lengths[:, i])
        np.testing.assert_array_equal(row_held.positions[:, 0], held.positions[:, i])
        for layer, stage in enumerate(stage_of):
            valid = int(held.lengths[stage, i])
            for ours, theirs in ((row_held.keys, held.keys), (row_held.values, held.values)):
                np.testing.assert_allclose(ours[layer][0, :valid], theirs[layer][i, :valid], atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_rows_with_images_shrink_and_text_only_rows_do_not(method: str) -> None:
    _, held = prefilled(method)
    lengths = np.asarray(held.lengths)
    assert np.all(lengths[-1, :3] < [sum(row) for row in ROWS[:3]])
    assert np.all(lengths[:, 3] == sum(ROWS[3]))


@cache
def alone(settings: Sparsity) -> list[list[int]]:
    """Eight greedy tokens of every row of the conversation, each by itself under its own plan, decoded by hand."""
    found, weights = [], models.params(SHORT)
    to_prompt = jax.jit(partial(embed, config=SHORT), compiler_options=models.QUICK)
    for row, images in zip(CONVERSATION, IMAGES, strict=True):
        packed = pack([row], SHORT.image_token_id)
        plan = make_plan(settings, SHORT, packed.visual, packed.text)
        ids, lengths = jnp.asarray(packed.input_ids), jnp.asarray(packed.lengths)
        prompt = to_prompt(weights, ids, lengths, jnp.asarray(np.stack(images)) if images else None)
        logits, held, _ = models.compiled_prefill(SHORT, plan, 8)(weights, prompt._replace(saliency=None))
        tokens = [int(jnp.argmax(logits[0]))]
        while len(tokens) < 8:
            logits, held = models.compiled_step(SHORT, plan)(weights, jnp.asarray(tokens[-1:]), held)
            tokens.append(int(jnp.argmax(logits[0])))
        found.append(tokens)
    return found


def ends(settings: Sparsity) -> tuple[int, ...]:
    """End tokens that stop every row early, each at another step."""
    return tuple(row[at] for row, at in zip(alone(settings), (2, 3, 1, 5), strict=True))


def until_end(rows: list[list[int]], end: tuple[int, ...]) -> list[list[int]]:
    return [row[: min(row.index(token) for token in end if token in row)] for row in rows]


@pytest.mark.parametrize("settings", [Sparsity.dense(), FIVE], ids=lambda s: s.method)
def test_answers_of_a_batch_equal_those_of_its_rows_alone(settings: Sparsity) -> None:
    """From ids and pixels; every row ends at a step of its own and leaves the end token out."""
    expected = until_end(alone(settings), ends(settings))
    assert len({len(row) for row in expected}) > 2
    assert answers(settings=settings, end=ends(settings)).tokens == expected


def test_without_an_end_token_every_row_fills_its_limit() -> None:
    assert answers().tokens == alone(FIVE)


def test_permuting_a_batch_permutes_the_answers() -> None:
    order = [2, 0, 3, 1]
    pixels = np.stack([image for i in order for image in IMAGES[i]])
    shuffled = answers([CONVERSATION[i] for i in order], pixels).tokens
    straight = answers().tokens
    assert shuffled == [straight[i] for i in order]
    assert len({tuple(row) for row in straight}) == len(order)


def test_text_only_rows_answer_as_dense_does() -> None:
    rows = [ids(5, 12), ids(6, 20)]
    pruned, dense = (answers(rows, None, settings) for settings in (FIVE, Sparsity.dense()))
    assert len(pruned.plan.stages) == 1
    assert pruned.tokens == dense.tokens


def test_a_longer_answer_begins_with_the_shorter_one() -> None:
    """The step limit is traced: both come from the same compiled loop."""
    shorter, longer = answers(tokens=3).tokens, answers(tokens=8).tokens
    assert [row[:3] for row in longer] == shorter
    assert [len(row) for row in longer] == [8] * len(longer)


# Streaming and sampling


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_streaming_gives_the_same_tokens(options: dict[str, Any], every: int) -> None:
    settings: dict[str, Any] = {"sparsity": FIVE, "max_new_tokens": 8, "end_tokens": (), **options}
    chunks = list(stream_ids(models.params(SHORT), SHORT, CONVERSATION, PIXELS, every=every, **settings))
    whole = answers(**options).tokens
    assert chunks[-1].tokens == whole
    seen = [len(chunk.tokens[0]) for chunk in chunks]
    assert seen == [min(1 + every * i, 8) for i in range(len(seen))]
    for chunk, count in zip(chunks, seen, strict=True):
        assert chunk.tokens == [row[:count] for row in whole]


def test_a_paced_stream_gives_the_same_tokens_in_fewer_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"sparsity": FIVE, "max_new_tokens": 8, "end_tokens": ()}
    for pace, seen in ((0.0, [1, 5, 6, 7, 8]), (1e6, [1, 5, 8])):
        monkeypatch.setattr(request, "PACE", pace)
        chunks = list(stream_ids(models.params(SHORT), SHORT, CONVERSATION, PIXELS, **settings))
        assert [len(chunk.tokens[0]) for chunk in chunks] == seen
        assert chunks[-1].tokens == answers().tokens


def test_streaming_stops_when_every_row_has_ended() -> None:
    settings: dict[str, Any] = {"sparsity": FIVE, "max_new_tokens": 8, "end_tokens": ends(FIVE)}
    chunks = list(stream_ids(models.params(SHORT), SHORT, CONVERSATION, PIXELS, every=1, **settings))
    expected = until_end(alone(FIVE), ends(FIVE))
    assert chunks[-1].tokens == expected
    assert len(chunks) == max(map(len, expected)) + 1


def test_a_tiny_top_p_is_greedy() -> None:
    assert answers(temperature=2.0, top_p=1e-6, key=jax.random.key(1)).tokens == answers().tokens


def test_a_tiny_temperature_is_greedy() -> None:
    assert answers(temperature=1e-6, key=jax.random.key(1)).tokens == answers().tokens


def test_the_same_key_draws_the_same_tokens_and_another_key_others() -> None:
    first = answers(**SAMPLED).tokens
    assert answers(**SAMPLED).tokens == first
    assert answers(**{**SAMPLED, "key": jax.random.key(4)}).tokens != first


def test_equal_rows_draw_different_tokens() -> None:
    rows, pixels = [CONVERSATION[i] for i in (1, 1, 2, 2)], PIXELS[[1, 2, 1, 2]]
    first, second, third, fourth = answers(rows, pixels, **SAMPLED).tokens
    assert first != second
    assert third != fourth


SHARES = np.array([0.05, 0.4, 0.03, 0.3, 0.22])
LOGITS = jnp.log(jnp.asarray(SHARES, jnp.float32)) + 30  # what is added to all of them changes nothing


def draws(temperature: float, top_p: float, count: int = 2000) -> np.ndarray:
    """How often each of five tokens is drawn, as a share."""
    keys = jax.random.split(jax.random.key(0), count)
    batch = jnp.broadcast_to(LOGITS, (count, 5))
    drawn = sample(batch, keys, SamplingParams(jnp.float32(temperature), jnp.float32(top_p)))
    return np.bincount(np.asarray(drawn), minlength=5) / count


@pytest.mark.parametrize(
    "top_p, allowed", [(0.1, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.75, {1, 3, 4}), (1.0, set(range(5)))]
)
def test_top_p_draws_all_of_the_smallest_sufficient_set_and_nothing_else(top_p: float, allowed: set[int]) -> None:
    assert set(np.flatnonzero(draws(1.0, top_p))) == allowed


def test_draws_follow_the_distribution() -> None:
    np.testing.assert_allclose(draws(1.0, 1.0), SHARES, atol=0.03)


def test_a_huge_temperature_is_uniform() -> None:
    np.testing.assert_allclose(draws(1e6, 1.0), 0.2, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-3, 2e-38])
def test_a_vanishing_temperature_draws_the_likeliest(temperature: float) -> None:
    assert draws(temperature, 1.0)[1] == 1


def test_top_p_is_taken_after_the_temperature() -> None:
    """Hot enough, the likeliest two tokens no longer hold half of the mass."""
    assert np.count_nonzero(draws(1.0, 0.5)) == 2
    assert np.count_nonzero(draws(100.0, 0.5)) == 3


def test_padding_with_the_marker_of_images_is_not_a_image() -> None:
    config = tiny()
    params = init_params(config, jax.random.key(0), jnp.float32)
    marker, words = config.image_token_id, 5
    image = [marker] * config.tokens_per_image
    # The first row is text alone, padded with the marker.
    rows = np.array([[1] * words + image, [1] * 2 + image + [1] * (words - 2)], np.int32)
    lengths = jnp.array([words, rows.shape[1]])
    pixels = jax.random.normal(jax.random.key(1), (1, 3, config.vision.image_size, config.vision.image_size))
    prompt = embed(params, jnp.asarray(rows), lengths, pixels, config)
    assert not prompt.visual[0].any()
    alone = embed(params, jnp.asarray(rows[1:]), lengths[1:], pixels, config)
    np.testing.assert_array_equal(prompt.embeddings[1], alone.embeddings[0])
