"""Replays recorded traces of the authors' PyTorch code: `pytest tests/test_golden.py --golden DIR`.

Discrete items must be equal; continuous ones within the tolerances of DIR/README.md. A folder that is named is replayed
whole; of our own the default tests replay one of every kind, and `make test-all` all.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sparsevlm_jax import Sparsity, decode_step, embed, encode_images, make_plan, prefill
from sparsevlm_jax.models.llava import Llava
from sparsevlm_jax.models.stages import decoder_of
from sparsevlm_jax.pruning import sparsify
from sparsevlm_jax.pruning.budgets import paper_flops
from sparsevlm_jax.pruning.methods.sparsevlm import gravity, kept_by_rank, numerical_rank, select_heads
from sparsevlm_jax.pruning.prune import PruningStep
from sparsevlm_jax.rotary import plain_rope
from tests import models, traces

SCORES, HEAD_SUMS, MERGED, HIDDEN = 1e-5, 1e-4, 5e-5, 5e-4
V20_SCORES = 5e-5  # divided by a weight that can be near zero


# One of each: dense, recycling with noise at the edges, gravity with grouped queries, numerical rank, video, and LLaVA
# from pixels.
DAILY = {
    *("a1_dense", "b2n_v15_edge_noise", "c3_v20_gqa_edge", "d3_v1_gqa_fullrank", "v2vid_4x26_gqa"),
    "tiny_llava_v15_c0",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = metafunc.config.getoption("--golden")
    folder = named or Path(__file__).parent / "golden"
    by_kind: dict[str, list[Path]] = {}
    for file in traces.files(folder):
        by_kind.setdefault(traces.kind(file), []).append(file)
    if not by_kind:
        raise pytest.UsageError(f"--golden {folder}: no recorded trace (*.npz) there")
    lm = by_kind.get("lm", [])
    functions = {
        kind: [(f, case) for f in by_kind.get(kind, []) for case in traces.settings(f)]
        for kind in ("raters", "cluster", "scores")
    }
    cases = {
        "lm_trace": [(f, f.stem) for f in lm],
        "pruning_event": [((f, k), f"{f.stem}-{k}") for f in lm for k in range(len(traces.settings(f)["events"]))],
        **{f"{kind}_case": [(c, f"{c[0].stem}-{c[1]['tag']}") for c in found] for kind, found in functions.items()},
        "rope_case": [((f, key), f"{f.stem}-{key}") for f in by_kind.get("rope", []) for key in traces.read(f).arrays],
        "dense_llava": [
            ((f, c["prefix"]), f"{f.stem}-{c['prefix']}")
            for f in by_kind.get("dense_llava", [])
            for c in traces.settings(f)["cases"]
        ],
    }

    def marks(label: str) -> tuple[pytest.MarkDecorator, ...]:
        short = named or label.split("-")[0] in DAILY
        return () if short else (pytest.mark.slow,)

    for name, found in cases.items():
        if name in metafunc.fixturenames:
            marked = marks if name in ("lm_trace", "pruning_event") else lambda label: ()
            metafunc.parametrize(name, [pytest.param(case, id=label, marks=marked(label)) for case, label in found])


def test_every_trace_is_of_a_known_version(lm_trace: Path) -> None:
    assert traces.settings(lm_trace)["version"] in traces.SPARSITIES


def test_raters_are_those_recorded(lm_trace: Path) -> None:
    case, replay = traces.read(lm_trace), traces.replay(lm_trace)
    if not case.settings["events"]:
        assert not replay.trace.events  # a dense trace has no raters
        return
    raters = np.flatnonzero(replay.trace.tokens.raters[0]) - case.settings["text_start"]
    np.testing.assert_array_equal(raters, case.arrays["rater_idx"])


def test_scores_agree(pruning_event: tuple[Path, int]) -> None:
    path, k = pruning_event
    case, event, visual = _event(path, k)
    scores = event.scores.values[0, visual]
    tolerance = V20_SCORES if case.settings["version"] == "v20" else SCORES
    np.testing.assert_allclose(scores, case.arrays[f"p{k}_scores"], atol=tolerance, rtol=0)


def test_details_of_the_method_agree(pruning_event: tuple[Path, int]) -> None:
    path, k = pruning_event
    case, event, visual = _event(path, k)
    details, arrays = event.scores.details, case.arrays
    raters = len(arrays["rater_idx"])
    if f"p{k}_head_sums" in arrays:
        np.testing.assert_allclose(details["head_sums"][0], arrays[f"p{k}_head_sums"], rtol=HEAD_SUMS)
        np.testing.assert_array_equal(np.flatnonzero(details["heads"][0]), np.sort(arrays[f"p{k}_head_sel"]))
    if f"p{k}_rope_w" in arrays:
        np.testing.assert_allclose(details["gravity"][0, :raters, visual], arrays[f"p{k}_rope_w"], atol=MERGED)
    if f"p{k}_rank" in arrays:
        assert details["rank"][0] == arrays[f"p{k}_rank"]
    if f"p{k}_singular_values" in arrays:
        values = arrays[f"p{k}_singular_values"]
        np.testing.assert_allclose(details["singular_values"][0, : len(values)], values, atol=SCORES)
    assert event.layer == case.settings["events"][k]["layer"]


def test_kept_and_recycled_tokens_are_those_recorded(pruning_event: tuple[Path, int]) -> None:
    path, k = pruning_event
    case, event, visual = _event(path, k)
    kept = np.flatnonzero(event.selection.kept[0])
    np.testing.assert_array_equal(kept - visual.start, case.arrays[f"p{k}_kept_vis"])
    recorded = case.arrays.get(f"p{k}_merge_vis", np.zeros(0, int))
    assert set(_pool(event) - visual.start) == set(recorded)
    assert len(recorded) == event.selection.pool_count[0]


def test_clusters_agree(pruning_event: tuple[Path, int]) -> None:
    path, k = pruning_event
    case, event, visual = _event(path, k)
    arrays = case.arrays
    if f"p{k}_merge_vis" not in arrays:
        assert event.selection.cluster_count[0] == 0
        return
    # Neighbours in the recorded order can be 1e-8 apart: compare through the tokens, not through the order.
    slot = {token: i for i, token in enumerate(_pool(event) - visual.start)}
    order = [slot[token] for token in arrays[f"p{k}_merge_vis"]]
    count = int(event.selection.cluster_count[0])
    recycled = event.recycled
    assert count == len(arrays[f"p{k}_cluster_centers"])
    np.testing.assert_allclose(recycled.density[0, order], arrays[f"p{k}_cluster_density"], atol=MERGED, rtol=0)
    np.testing.assert_allclose(recycled.distance[0, order], arrays[f"p{k}_cluster_dist"], atol=MERGED, rtol=0)
    np.testing.assert_allclose(recycled.peak[0, order], arrays[f"p{k}_cluster_score"], atol=MERGED, rtol=0)
    np.testing.assert_array_equal(recycled.assignment[0, order], arrays[f"p{k}_cluster_assign"])
    np.testing.assert_allclose(recycled.merged[0, :count], arrays[f"p{k}_merged"], atol=MERGED, rtol=0)
    if count > 1:  # one cluster: the centre is arbitrary and has no influence
        centers = [order[c] for c in arrays[f"p{k}_cluster_centers"]]
        np.testing.assert_array_equal(recycled.centers[0, :count], centers)


def test_sequence_after_pruning_agrees(pruning_event: tuple[Path, int]) -> None:
    path, k = pruning_event
    case, event, _ = _event(path, k)
    after, arrays = event.after, case.arrays
    length = case.settings["events"][k]["seq_len_out"]
    assert after.lengths[0] == length
    if f"p{k}_position_ids" in arrays:
        np.testing.assert_array_equal(after.positions[0, :length, 0], arrays[f"p{k}_position_ids"])
    _assert_hidden(np.asarray(after.hidden[0, :length]), arrays, f"p{k}_hidden")


def test_provenance_agrees(pruning_event: tuple[Path, int]) -> None:
    path, k = pruning_event
    case, replay = traces.read(path), traces.replay(path)
    recorded = case.arrays[f"p{k}_orig_idx"]
    origins = models.origins(replay.trace, 0)[k + 1][: len(recorded)]
    merged = recorded < 0
    visual = (recorded >= case.visual.start) & (recorded < case.visual.stop)
    np.testing.assert_array_equal(np.argmax(origins[visual], axis=1) + case.visual.start, recorded[visual])
    np.testing.assert_array_equal(np.count_nonzero(origins[visual], axis=1), 1)
    np.testing.assert_array_equal(np.count_nonzero(origins[~visual & ~merged], axis=1), 0)
    np.testing.assert_allclose(np.sum(origins[merged], axis=1), 1.0, atol=1e-5)


def test_hidden_states_agree_after_every_layer(lm_trace: Path) -> None:
    case, replay = traces.read(lm_trace), traces.replay(lm_trace)
    recorded = case.arrays["layer_last_hidden"]
    np.testing.assert_allclose(replay.trace.last_hidden[:, 0], recorded, atol=HIDDEN, rtol=0)
    length = case.settings["events"][-1]["seq_len_out"] if case.settings["events"] else case.settings["L"]
    _assert_hidden(replay.final_hidden[:length], case.arrays, "final_hidden")


def test_decoding_agrees_at_every_step(lm_trace: Path) -> None:
    case, replay = traces.read(lm_trace), traces.replay(lm_trace)
    np.testing.assert_allclose(replay.step_logits[0], case.arrays["prefill_logits"], atol=HIDDEN, rtol=0)
    np.testing.assert_allclose(replay.step_logits, case.arrays["step_logits"], atol=HIDDEN, rtol=0)
    np.testing.assert_array_equal(np.argmax(replay.step_logits, axis=1), case.arrays["tokens"])


def test_caches_and_positions_agree(lm_trace: Path) -> None:
    case, replay = traces.read(lm_trace), traces.replay(lm_trace)
    np.testing.assert_array_equal(replay.prefill_lengths, case.arrays["kv_len_prefill"])
    np.testing.assert_array_equal(replay.final_lengths, case.arrays["kv_len_final"])
    np.testing.assert_array_equal(replay.decode_positions, case.arrays["decode_pos"])


def test_counters_equal_those_of_the_reference(lm_trace: Path) -> None:
    sizes = traces.settings(lm_trace)
    config, _ = traces.model(traces.read(lm_trace))
    plan = traces.replay(lm_trace).plan
    if sizes["version"] == "v1":
        assert plan.equivalent_tokens() >= sizes["reference_equal_tokens"]  # its counts are data; a plan is their bound
        return
    if sizes["version"] == "dense":
        assert plan.equivalent_tokens() == sizes["v_num"]  # the reference counts nothing here
        return
    assert plan.equivalent_tokens() == pytest.approx(sizes["reference_equal_tokens"])
    words = sizes["L"] - sizes["v_num"]
    flops = paper_flops(config.text, [words + visual for visual in plan.entering()])
    assert flops == sizes["reference_flops_counter"]


def test_raters_alone(raters_case: tuple[Path, dict]) -> None:
    path, case = raters_case
    arrays, tag = traces.read(path).arrays, case["tag"]
    x = jnp.asarray(arrays[f"{tag}_x"])[None]
    visual, text = x[:, case["v_start"] : case["text_start"]], x[:, case["text_start"] :]
    ones = [jnp.ones(part.shape[:2], bool) for part in (visual, text)]
    raters, relevance = sparsify.rate_text(visual, text, *ones)
    np.testing.assert_allclose(relevance[0], arrays[f"{tag}_m"], atol=SCORES, rtol=0)
    np.testing.assert_array_equal(np.flatnonzero(raters[0]), arrays[f"{tag}_rater_idx"])


def test_clustering_alone(cluster_case: tuple[Path, dict]) -> None:
    path, case = cluster_case
    arrays, tag, count = traces.read(path).arrays, case["tag"], case["cluster_num"]
    x = jnp.asarray(arrays[f"{tag}_x"])
    batch, size = x.shape[:2]
    noise = jnp.asarray(arrays[f"{tag}_noise_u"]) * 1e-6 if case["noise"] == "recorded" else None
    result = sparsify.recycle(x, jnp.full(batch, size), jnp.full(batch, count), count, noise)
    np.testing.assert_allclose(result.density, arrays[f"{tag}_density"], atol=MERGED, rtol=0)
    if case["order_ambiguous"]:
        ours, theirs = (np.asarray(m).reshape(batch, count, -1) for m in (result.merged, arrays[f"{tag}_merged"]))
        apart = np.max(np.abs(ours[:, :, None] - theirs[:, None]), axis=-1)
        assert np.all(apart.min(axis=1) < MERGED)
        assert np.all(apart.min(axis=2) < MERGED)
        return
    np.testing.assert_allclose(result.distance, arrays[f"{tag}_dist"], atol=MERGED, rtol=0)
    np.testing.assert_allclose(result.peak, arrays[f"{tag}_score"], atol=MERGED, rtol=0)
    np.testing.assert_array_equal(result.centers, arrays[f"{tag}_centers"])
    np.testing.assert_array_equal(result.assignment, arrays[f"{tag}_assign"])
    np.testing.assert_allclose(result.merged, arrays[f"{tag}_merged"], atol=MERGED, rtol=0)


def test_scores_alone(scores_case: tuple[Path, dict]) -> None:
    path, case = scores_case
    arrays, tag = traces.read(path).arrays, case["tag"]
    attention = jnp.asarray(arrays[f"{tag}_attn"])[None]
    if case["fn"] == "head_select":
        sums = jnp.sum(attention, axis=(2, 3))
        heads = select_heads(sums, case["n_selected"])
        np.testing.assert_allclose(sums[0], arrays[f"{tag}_head_sums"], rtol=HEAD_SUMS)
        np.testing.assert_array_equal(np.flatnonzero(heads[0]), np.sort(arrays[f"{tag}_heads"]))
        mean = jnp.mean(attention[0, np.flatnonzero(heads[0])], axis=0)
        np.testing.assert_allclose(mean, arrays[f"{tag}_mean_selected"], atol=SCORES, rtol=0)
        return
    _, count, visual = attention.shape[1:]
    scores = sparsify.score_visual(attention, jnp.ones((1, count), bool))
    np.testing.assert_allclose(scores[0], arrays[f"{tag}_scores"], atol=SCORES, rtol=0)
    keep = min(case["budget"], visual - 1) if case["fn"] == "topk" else _kept_by_rank(attention, case, arrays, tag)
    some, none = jnp.full(1, keep), jnp.zeros(1, int)
    kept = sparsify.select(scores, jnp.ones((1, visual), bool), some, none, none, keep=keep, pool=0).kept
    np.testing.assert_array_equal(np.flatnonzero(kept[0]), arrays[f"{tag}_kept"])


def test_rotary_weights_alone(rope_case: tuple[Path, str]) -> None:
    path, key = rope_case
    recorded = traces.read(path).arrays[key]
    distances = jnp.arange(len(recorded))[None, :, None]
    weights = gravity(distances, jnp.zeros((1, 1), int), plain_rope(int(key.removeprefix("hd")), 10000.0))
    np.testing.assert_allclose(weights[0, 0], recorded, atol=MERGED, rtol=0)


def test_llava_from_pixels_agrees_with_transformers(dense_llava: tuple[Path, str]) -> None:
    path, prefix = dense_llava
    arrays = traces.read(path).arrays
    config, params = traces.tiny_llava(path.parent)
    ids, pixels = jnp.asarray(arrays[f"{prefix}input_ids"])[None], jnp.asarray(arrays[f"{prefix}pixel_values"])
    lengths = jnp.asarray([ids.shape[1]])
    tower = Llava(config).apply({"params": params}, pixels, method=lambda m, x: m.vision_tower(x))
    np.testing.assert_allclose(tower[0][0], arrays[f"{prefix}vision_hidden_m2"], atol=HIDDEN, rtol=0)
    features = encode_images(params, pixels, config)
    np.testing.assert_allclose(features.tokens, arrays[f"{prefix}image_features"], atol=HIDDEN, rtol=0)
    prompt = embed(params, ids, lengths, pixels, config)
    np.testing.assert_allclose(prompt.embeddings[0], arrays[f"{prefix}inputs_embeds"], atol=HIDDEN, rtol=0)
    plan = make_plan(Sparsity.dense(), config, config.tokens_per_image)
    tokens = arrays[f"{prefix}tokens"]
    logits, cache, trace = prefill(params, prompt, config, plan, trace=True, max_new_tokens=len(tokens))
    everywhere = decoder_of(params, config).logits(trace.hidden)
    np.testing.assert_allclose(everywhere[0], arrays[f"{prefix}logits"], atol=HIDDEN, rtol=0)
    for step, token in enumerate(tokens):
        np.testing.assert_allclose(logits[0], arrays[f"{prefix}step_logits"][step], atol=HIDDEN, rtol=0)
        assert int(jnp.argmax(logits[0])) == token
        logits, cache = decode_step(params, jnp.asarray([token]), cache, config, plan)


def test_pruned_llava_starts_from_the_same_pixels(lm_trace: Path) -> None:
    if not lm_trace.name.startswith("tiny_llava"):
        assert traces.settings(lm_trace)["weights"] != "weights_T.npz"  # this one starts at embeddings
        return
    case = traces.read(lm_trace)
    prefix = lm_trace.stem.rsplit("_", 1)[1] + "_"
    dense = traces.read(lm_trace.parent / "tiny_llava_dense.npz").arrays
    config, params = traces.tiny_llava(lm_trace.parent)
    ids = jnp.asarray(dense[f"{prefix}input_ids"])[None]
    prompt = embed(params, ids, jnp.asarray([ids.shape[1]]), jnp.asarray(dense[f"{prefix}pixel_values"]), config)
    np.testing.assert_allclose(prompt.embeddings, case.arrays["inputs_embeds"], atol=SCORES, rtol=0)


def _kept_by_rank(attention: jnp.ndarray, case: dict, arrays: dict[str, np.ndarray], tag: str) -> int:
    """v1's law on recorded attention, its rank and singular values checked on the way."""
    count, visual = attention.shape[2:]
    rank, values = numerical_rank(jnp.mean(attention, axis=1), jnp.full(1, count), jnp.full(1, visual))
    assert int(rank[0]) == case["rank"]
    np.testing.assert_allclose(values[0], arrays[f"{tag}_singular_values"], atol=SCORES, rtol=0)
    settings = Sparsity.v1(scale=case["scale"], bias=case["bias"])
    return visual if case["rank"] == visual else min(kept_by_rank(settings, case["rank"]), visual - 1)


def _event(path: Path, k: int) -> tuple[traces.Case, PruningStep, slice]:
    """The k-th pruning layer replayed, and where its visual tokens stand."""
    case, replay = traces.read(path), traces.replay(path)
    recorded = case.settings["events"][k]
    start = recorded["v_start"]
    return case, replay.trace.events[k], slice(start, start + recorded["v_num_in"])


def _pool(event: PruningStep) -> np.ndarray:
    return np.asarray(event.selection.pool[0, : event.selection.pool_count[0]])


def _assert_hidden(hidden: np.ndarray, arrays: dict[str, np.ndarray], name: str) -> None:
    """Whole hidden states, or first channels and norms where a file stores only those."""
    if name in arrays:
        np.testing.assert_allclose(hidden, arrays[name], atol=HIDDEN, rtol=0)
        return
    channels = arrays[f"{name}_ch8"]
    np.testing.assert_allclose(hidden[:, : channels.shape[1]], channels, atol=HIDDEN, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), arrays[f"{name}_norm"], atol=HIDDEN, rtol=1e-6)
