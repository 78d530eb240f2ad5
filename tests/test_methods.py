"""Every method on the one path: batches, a method of one's own, the tower's side of the rivals, and provenance."""

from __future__ import annotations

import runpy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import METHODS, Prompt, Sparsity, encode_images, load, make_plan, prefill, sparsity
from sparsevlm_jax.generation.api import generate_ids
from sparsevlm_jax.generation.request import Generation
from sparsevlm_jax.models.towers.clip import _interpolate_positions
from sparsevlm_jax.pruning.methods import PruningContext, Scores
from sparsevlm_jax.pruning.methods.baselines import pool_patches, shrink_images
from tests import hf, models

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_method.py"
MODEL = models.config(layers=3)
TEXT, VISUAL, NEW = 24, 16, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "v1": {"scale": 1.5, "bias": 1.0, "layers": (0, 1)},
    "v2.0": {"keep": 9, "heads": 2},
    "fastv": {},
    "pyramiddrop": {},
}
BATCH = [(3, 16, 7), (0, 12, 11), (6, 5, 2), (5, 16, 5)]


def settings_of(method: str) -> Sparsity:
    return sparsity(method, **OPTIONS.get(method, {} if method == "dense" else {"keep": 9}))


# Batches from ids and pixels.


def ids(words: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    before, after = (random.integers(1, 180, count) for count in (2 + seed, words))
    return np.concatenate([before, np.full(VISUAL, MODEL.image_token_id), after]).astype(np.int32)


def answers(method: str, rows: list[int]) -> Generation:
    """To a batch of the given rows; each has its own question and image."""
    pixels = np.random.default_rng(9).normal(size=(3, 3, 56, 56)).astype(np.float32)
    return generate_ids(
        models.params(MODEL),
        MODEL,
        [ids((5, 14, 9)[row], row) for row in rows],
        pixels[rows],
        sparsity=settings_of(method),
        max_new_tokens=NEW,
        end_tokens=(),
    )


@pytest.mark.parametrize("method", ["v1.5", "pool", "downsample"])
def test_a_row_of_a_batch_answers_as_it_does_among_copies_of_itself(method: str) -> None:
    together = answers(method, [0, 1, 2])
    assert len({tuple(tokens) for tokens in together.tokens}) == 3
    for row in range(3):
        alone = answers(method, [row] * 3)
        assert alone.plan == together.plan
        assert alone.tokens == [together.tokens[row]] * 3


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dense", "v1"}))
def test_every_method_plans_fewer_visual_tokens_than_there_are(method: str) -> None:
    plan = make_plan(settings_of(method), MODEL, VISUAL, TEXT)
    assert plan.entering_tokens() < VISUAL
    assert plan.stages[-1].visual < VISUAL


# Traces of the pure prefill.


SCORING = [method for method in METHODS if METHODS[method].score is not None]


@cache
def prompt() -> Prompt:
    return models.prompt(BATCH, text=TEXT, visual=VISUAL)


def run(settings: Sparsity, batch: Prompt) -> tuple[np.ndarray, Any]:
    """Logits and trace."""
    plan = make_plan(settings, MODEL, VISUAL, batch.visual.shape[1] - VISUAL)
    logits, _, trace = models.compiled_prefill(MODEL, plan, NEW, trace=True)(models.params(MODEL), batch)
    return np.asarray(logits), jax.tree.map(np.asarray, trace)


def traced(settings: Sparsity, batch: Prompt | None = None) -> Any:
    return run(settings, prompt() if batch is None else batch)[1]


@pytest.mark.parametrize("method", SCORING)
def test_a_row_of_a_batch_is_pruned_as_it_is_among_copies_of_itself(method: str) -> None:
    logits, trace = run(settings_of(method), prompt())
    for i in range(len(BATCH)):
        copies = Prompt(*(part[jnp.full(len(BATCH), i)] for part in prompt() if part is not None))
        alone_logits, alone = run(settings_of(method), copies)
        for row in range(len(BATCH)):
            np.testing.assert_allclose(alone_logits[row], logits[i], atol=1e-4)
            for event, own in zip(trace.events, alone.events, strict=True):
                np.testing.assert_array_equal(own.selection.kept[row], event.selection.kept[i])
                assert own.after.lengths[row] == event.after.lengths[i]


@pytest.mark.parametrize("method", SCORING)
def test_every_survivor_is_made_of_original_patches_in_full(method: str) -> None:
    trace = traced(settings_of(method))
    for i in range(len(BATCH)):
        sequences = [trace.tokens, *(event.after for event in trace.events)]
        for tokens, origins in zip(sequences, models.origins(trace, i), strict=True):
            assert (origins >= 0).all()
            np.testing.assert_allclose(origins.sum(-1), tokens.visual[i], atol=1e-5)


@pytest.mark.parametrize("method", ["v1", "v1.5"])
def test_provenance_of_recycled_tokens_is_the_mean_of_their_clusters(method: str) -> None:
    trace = traced(settings_of(method))
    merged = 0
    for i in range(len(BATCH)):
        for event, before, after in zip(trace.events, *_before_and_after(trace, i), strict=True):
            selection, recycled = event.selection, event.recycled
            pool = selection.pool[i, : selection.pool_count[i]]
            assignment = recycled.assignment[i, : len(pool)]
            last = np.flatnonzero(event.after.visual[i])  # merged tokens stand behind the kept ones
            for cluster in range(selection.cluster_count[i]):
                place = last[len(last) - selection.cluster_count[i] + cluster]
                expected = before[pool][assignment == cluster].mean(0)
                np.testing.assert_allclose(after[place], expected, atol=1e-5)
                merged += (expected > 0).sum() > 1
    assert merged > 2, "some clusters have several members"


def test_provenance_of_kept_tokens_is_carried_over() -> None:
    trace = traced(settings_of("v1.5"))
    for i in range(len(BATCH)):
        for event, before, after in zip(trace.events, *_before_and_after(trace, i), strict=True):
            kept = np.flatnonzero(event.selection.kept[i])
            places = np.flatnonzero(event.after.visual[i])[: len(kept)]
            np.testing.assert_array_equal(after[places], before[kept])


def _before_and_after(trace: Any, row: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Origins [l, o] around every event."""
    tables = models.origins(trace, row)
    return tables[:-1], tables[1:]


def test_a_source_is_the_old_place_or_behind_those_the_number_of_a_merged_token() -> None:
    for event in traced(settings_of("v1.5")).events:
        for i, length in enumerate(event.after.lengths):
            whole = np.concatenate([event.before.hidden[i], event.recycled.merged[i]])
            np.testing.assert_array_equal(event.after.hidden[i, :length], whole[event.source[i, :length]])


@pytest.mark.parametrize("method", SCORING)
def test_a_trace_has_no_array_with_an_axis_for_original_visual_tokens(method: str) -> None:
    """One of length × original tokens would be 312 MB in a row of 8832 of them."""
    visual = 101  # no other axis is as long
    plan, batch = (
        make_plan(settings_of(method), MODEL, visual, TEXT),
        models.prompt([(3, 101, 7)], text=TEXT, visual=visual),
    )
    run = partial(prefill, config=MODEL, plan=plan, max_new_tokens=NEW, trace=True)
    *_, trace = jax.eval_shape(run, models.params(MODEL), batch)
    assert len(trace.events) == len(plan.stages) - 1
    for leaf in jax.tree.leaves(trace):
        assert visual not in jnp.shape(leaf)


def kept(settings: Sparsity, batch: Prompt | None = None) -> list[np.ndarray]:
    """Of every event, which visual token of each row stays; [b, v]."""
    found = []
    for event in traced(settings, batch).events:
        visual, chosen = event.before.visual, event.selection.kept
        found.append(np.stack([np.pad(c[v], (0, VISUAL - v.sum())) for c, v in zip(chosen, visual, strict=True)]))
    return found


def test_random_depends_on_its_seed() -> None:
    choices = [np.concatenate(kept(settings_of("random").changed(seed=seed))) for seed in (0, 1)]
    assert (choices[0] != choices[1]).any()


def test_random_draws_anew_at_every_layer() -> None:
    settings = sparsity("random", keep_at=((0, 15), (1, 8)))
    first, second = (event.scores.values[0] for event in traced(settings).events)
    assert not set(first[:15]) & set(second[:15])


def test_random_does_not_depend_on_padding() -> None:
    settings, row = settings_of("random"), 3
    wider = models.prompt([BATCH[row]], text=TEXT + 9, visual=VISUAL, seeds=[row])
    for found, wanted in zip(kept(settings, wider), kept(settings), strict=True):
        np.testing.assert_array_equal(found[0], wanted[row])


def test_uniform_leaves_no_gap_wider_than_its_stride() -> None:
    settings = sparsity("uniform", keep_at=((0, 7),))
    (chosen,) = kept(settings)
    for row, (_, visual, _) in zip(chosen, BATCH, strict=True):
        count = min(7, visual - 1)
        places = np.flatnonzero(row)
        assert len(places) == count
        gaps = np.diff(places, prepend=-1)
        assert gaps.max() <= -(-visual // count) and gaps.min() >= visual // count
        assert places[-1] == visual - 1


# A method of one's own.


def test_the_example_of_a_method_runs_in_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "loud", METHODS["dense"])  # so that it is taken away again
    runpy.run_path(str(EXAMPLE))
    trace = traced(METHODS["loud"].settings.changed(keep_at=((0, 6), (1, 3))))
    for event, count in zip(trace.events, (6, 3), strict=True):
        for i in range(len(BATCH)):
            places = np.flatnonzero(event.before.visual[i])
            length = np.linalg.norm(event.before.hidden[i, places], axis=-1)
            best = places[np.argsort(-length, kind="stable")[: min(count, len(places) - 1)]]
            np.testing.assert_array_equal(np.flatnonzero(event.selection.kept[i]), np.sort(best))


def test_a_score_says_how_many_tokens_stay_only_beside_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    own = METHODS["uniform"]

    def score(context: PruningContext, settings: Sparsity) -> Scores:
        assert own.score is not None
        found = own.score(context, settings)
        return found._replace(keep=jnp.full(len(found.values), 3))

    settings = replace(own.settings, method="unbound").changed(keep_at=((0, 6),))
    monkeypatch.setitem(METHODS, "unbound", replace(own, settings=settings, score=score))
    with pytest.raises(ValueError, match="unbound: a score that gives `keep` and a bound, `kept_by_rank`"):
        traced(settings)


def test_the_example_fits_the_page() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 20


# What happens before the decoder.


@pytest.mark.parametrize("side, grid", [(24, 13), (24, 24), (12, 5), (5, 4), (6, 3), (7, 1)])
def test_pooling_is_adaptive_average_pooling(side: int, grid: int) -> None:
    import torch

    features = np.random.default_rng(0).normal(size=(2, side * side, 8)).astype(np.float32)
    square = torch.from_numpy(features).reshape(2, side, side, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(square, grid).permute(0, 2, 3, 1).reshape(2, grid * grid, 8)
    np.testing.assert_allclose(pool_patches(jnp.asarray(features), grid), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("method, keep", [("pool", 9), ("pool", 5), ("downsample", 15)])
def test_shrunk_images_have_as_many_tokens_as_the_plan_says(method: str, keep: int) -> None:
    plan = make_plan(sparsity(method, keep=keep), MODEL, VISUAL)
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 56, 56)), jnp.float32)
    encode = jax.jit(encode_images, static_argnames=("config", "plan"), compiler_options=models.QUICK)
    images = encode(models.params(MODEL), pixels, config=MODEL, plan=plan)
    assert images.tokens.shape == (2 * plan.visual_tokens, models.WIDTH)
    assert images.saliency.shape == (2 * plan.visual_tokens,)
    assert np.isfinite(np.asarray(images.tokens)).all()


def test_downsampling_to_the_full_grid_changes_nothing() -> None:
    random = np.random.default_rng(0)
    pixels = jnp.asarray(random.normal(size=(1, 3, 56, 56)), jnp.float32)
    table = jnp.asarray(random.normal(size=(17, 8)), jnp.float32)
    np.testing.assert_allclose(shrink_images(pixels, 56), pixels, atol=1e-5)
    np.testing.assert_allclose(_interpolate_positions(table, 4, 4), table, atol=1e-5)


@pytest.mark.parametrize("grid", [8, 11])
def test_positions_of_a_smaller_grid_are_about_those_that_transformers_interpolates(grid: int) -> None:
    """Both are bicubic, but with other constants, and only jax's is antialiased: smooth embeddings, loose tolerance."""
    import torch
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    side, width, patch = 16, 6, 2
    config = CLIPVisionConfig(hidden_size=width, image_size=side * patch, patch_size=patch, num_attention_heads=2)
    module = CLIPVisionEmbeddings(config)
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    waves = [np.sin(0.05 * (i + 1) * x + 0.15 * y + i) for i in range(width)]
    table = np.concatenate([np.ones((1, width)), np.stack(waves, -1).reshape(-1, width)]).astype(np.float32)
    with torch.no_grad():
        module.position_embedding.weight.copy_(torch.from_numpy(table))
        patches = torch.zeros(1, grid * grid + 1, width)
        expected = module.interpolate_pos_encoding(patches, grid * patch, grid * patch)[0].numpy()
    found = np.asarray(_interpolate_positions(jnp.asarray(table), side, grid))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert np.abs(found - expected).mean() < 0.02


def test_saliency_is_the_class_tokens_attention_in_the_last_layer_that_runs(tmp_path: Path) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    folder = hf.tiny_llava(tmp_path, layers=1, processor=False)
    model = load(folder)
    config = model.config
    pixels = np.random.default_rng(0).normal(size=(2, 3, 56, 56)).astype(np.float32)
    reference = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        tower = reference.model.vision_tower(torch.from_numpy(pixels), output_attentions=True)
    last = config.feature_layers[0] % (config.vision.num_hidden_layers + 1) - 1
    expected = tower.attentions[last][:, :, 0, 1:].mean(1).numpy()
    found = encode_images(model.params, jnp.asarray(pixels), config).saliency.reshape(2, -1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
