"""The oracle reproduces the recorded traces (tests/golden/README.md), so that it may judge the library elsewhere."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import oracle

GOLDEN = Path(__file__).parent / "golden"
SMALL = sorted(p.stem for kind in ("[abcd]*_*.npz", "v?vid_*.npz") for p in GOLDEN.glob(kind))
CASES = [*SMALL, "e1_v15_192", "e6_v20_192", "e9_v1_13p5"]  # of the 32-layer ones, one per version
VERSIONS = {"dense": "dense", "v1": "v1", "v15": "v1.5", "v20": "v2.0"}


@cache
def load(name: str) -> tuple[dict[str, np.ndarray], Any]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as z:
        arrays = dict(z)
    return arrays, json.loads(str(arrays.pop("config_json")))


@cache
def replay(name: str) -> tuple[oracle.Result, dict[str, np.ndarray], Any]:
    arrays, config = load(name)
    weights, _ = load(config["weights"].removesuffix(".npz"))
    geometry = config["model"]
    model = oracle.Decoder(
        weights,
        layers=geometry["layers"],
        heads=geometry["heads"],
        kv_heads=geometry["kv_heads"],
        head_dim=geometry["head_dim"],
        rope_theta=geometry["rope_theta"],
        rms_norm_eps=geometry["rms_norm_eps"],
    )
    settings = oracle.Settings(
        version=VERSIONS[config["version"]],
        layers=config["pruning_layers"],
        keep=config["budgets"] or (),
        scale=config["scale"] or 0.0,
        bias=config["bias"] or 0.0,
        heads=config["n_selected_heads"] or 14,
        jitter=[arrays[f"p{k}_noise_u"] for k in range(len(config["events"])) if f"p{k}_noise_u" in arrays],
    )
    embeds = arrays["inputs_embeds"][0]
    steps = config["n_new_tokens"]
    return oracle.generate(model, embeds, config["v_start"], config["v_num"], settings, steps), arrays, config


@pytest.fixture(params=CASES)
def case(request):
    return replay(request.param)


def with_events(names: list[str], key: str):
    """Every (case, event) that recorded `key`."""
    pairs = [(name, k) for name in names for k in range(len(load(name)[1]["events"])) if f"p{k}_{key}" in load(name)[0]]
    return pytest.mark.parametrize("name, k", pairs, ids=[f"{name}-{k}" for name, k in pairs])


def close(ours, recorded, atol: float) -> None:
    np.testing.assert_allclose(np.asarray(ours), recorded, rtol=0, atol=atol)


def test_tokens(case):
    result, arrays, _ = case
    assert result.tokens == arrays["tokens"].tolist()


def test_logits(case):
    result, arrays, _ = case
    close(result.step_logits, arrays["step_logits"], 5e-4)


def test_hidden_states_of_the_prefill(case):
    result, arrays, _ = case
    close(result.layer_last_hidden, arrays["layer_last_hidden"], 5e-4)
    close_rows(result.final_hidden, arrays, "final_hidden")


def close_rows(ours: np.ndarray, arrays: dict[str, np.ndarray], key: str) -> None:
    if key in arrays:
        close(ours, arrays[key], 5e-4)
    else:  # large files keep eight channels and the row norms
        close(ours[:, :8], arrays[f"{key}_ch8"], 5e-4)
        close(np.linalg.norm(ours, axis=-1), arrays[f"{key}_norm"], 5e-4)


def test_cache_lengths(case):
    result, arrays, _ = case
    assert result.kv_len_prefill == arrays["kv_len_prefill"].tolist()
    assert result.kv_len_final == arrays["kv_len_final"].tolist()


def test_decode_positions(case):
    result, arrays, _ = case
    np.testing.assert_array_equal(result.decode_positions, arrays["decode_pos"])


def test_number_of_events(case):
    result, _, config = case
    assert [event.layer for event in result.events] == [event["layer"] for event in config["events"]]


@with_events(CASES, "kept_vis")
def test_raters(name, k):
    result, arrays, config = replay(name)
    event = config["events"][k]
    np.testing.assert_array_equal(result.events[k].raters - event["text_start_in"], arrays["rater_idx"])
    close(result.relevance, arrays["rater_m"], 1e-5)


@with_events(CASES, "kept_vis")
def test_kept(name, k):
    result, arrays, _ = replay(name)
    np.testing.assert_array_equal(result.events[k].kept, arrays[f"p{k}_kept_vis"])


@with_events(CASES, "kept_vis")
def test_survivors(name, k):
    result, arrays, _ = replay(name)
    after = result.events[k].after
    np.testing.assert_array_equal(after.origin, arrays[f"p{k}_orig_idx"])
    assert all(source == (origin,) for source, origin in zip(after.sources, after.origin, strict=True) if origin >= 0)


@with_events(CASES, "position_ids")
def test_positions_after_pruning(name, k):
    result, arrays, _ = replay(name)
    np.testing.assert_array_equal(result.events[k].after.position, arrays[f"p{k}_position_ids"])


@with_events(CASES, "scores")
def test_scores(name, k):
    result, arrays, config = replay(name)
    close(result.events[k].scores, arrays[f"p{k}_scores"], 5e-5 if config["version"] == "v20" else 1e-5)


@with_events(CASES, "kept_vis")
def test_hidden_states_after_pruning(name, k):
    result, arrays, _ = replay(name)
    close_rows(result.events[k].after.hidden, arrays, f"p{k}_hidden")


@with_events(CASES, "merge_vis")
def test_recycling(name, k):
    result, arrays, config = replay(name)
    event, clusters = result.events[k], result.events[k].clusters
    recorded = arrays[f"p{k}_merge_vis"]
    assert set(event.recycled) == set(recorded)
    # Neighbours in the recycled list can be too close to order: compare through the tokens, not the places.
    ours = np.argsort(event.recycled)[np.searchsorted(np.sort(event.recycled), recorded)]
    assert clusters is not None
    np.testing.assert_array_equal(clusters.assign[ours], arrays[f"p{k}_cluster_assign"])
    if config["events"][k]["cluster_num"] > 1:  # the centre of a single cluster is arbitrary
        np.testing.assert_array_equal(event.recycled[clusters.centres], recorded[arrays[f"p{k}_cluster_centers"]])
    close(clusters.density[ours], arrays[f"p{k}_cluster_density"], 5e-5)
    close(clusters.delta[ours], arrays[f"p{k}_cluster_dist"], 5e-5)
    close(clusters.score[ours], arrays[f"p{k}_cluster_score"], 5e-5)
    close(clusters.merged, arrays[f"p{k}_merged"], 5e-5)


@with_events(CASES, "merge_vis")
def test_sources_of_merged_rows_are_the_recycled_tokens(name, k):
    result, arrays, config = replay(name)
    before = result.events[k - 1].after.sources if k else [(j,) for j in range(arrays["inputs_embeds"].shape[1])]
    v_start, kept = config["v_start"], config["events"][k]["n_kept"]
    expected = sorted(s for j in arrays[f"p{k}_merge_vis"] for s in before[v_start + j])
    merged = result.events[k].after.sources[v_start + kept : v_start + config["events"][k]["v_num_out"]]
    assert sorted(s for row in merged for s in row) == expected


@with_events(CASES, "head_sums")
def test_head_selection(name, k):
    result, arrays, _ = replay(name)
    np.testing.assert_array_equal(result.events[k].heads, np.sort(arrays[f"p{k}_head_sel"]))
    np.testing.assert_allclose(result.events[k].head_sums, arrays[f"p{k}_head_sums"], rtol=1e-4)


@with_events(CASES, "rope_w")
def test_rope_weight_of_each_pair(name, k):
    result, arrays, _ = replay(name)
    close(result.events[k].rope_weight, arrays[f"p{k}_rope_w"], 3e-5)


@with_events(CASES, "attn_rater_vis")
def test_attention_of_the_raters(name, k):
    result, arrays, _ = replay(name)
    close(result.events[k].attention, arrays[f"p{k}_attn_rater_vis"], 1e-5)


@with_events(CASES, "rank")
def test_rank(name, k):
    result, arrays, _ = replay(name)
    assert result.events[k].rank == arrays[f"p{k}_rank"]


MARGINS = {
    "keep": "keep_drop_margin",
    "recycled": "merge_set_margin",
    "rater": "rater_margin_rel",
    "heads": "head_margin",
    "centre": "center_margin",
    "assign": "assign_margin",
}


@with_events(CASES, "kept_vis")
def test_margins(name, k):
    result, _, config = replay(name)
    ours, recorded = result.events[k].margins, config["margins"][k]
    for key, theirs in MARGINS.items():
        value = recorded.get(theirs)
        assert ours.get(key, oracle.FAR) == pytest.approx(oracle.FAR if value is None else value, rel=0.02, abs=5e-6)


CLUSTER_CASES = load("f_cluster")[1]


@pytest.mark.parametrize("config", CLUSTER_CASES, ids=lambda config: config["tag"])
def test_clustering(config):
    arrays = load("f_cluster")[0]
    tag = config["tag"]
    for row in range(config["B"]):
        jitter = arrays[f"{tag}_noise_u"][row] if config["noise"] == "recorded" else None
        ours = oracle.cluster(arrays[f"{tag}_x"][row], config["cluster_num"], jitter)
        for value, key in ((ours.density, "density"), (ours.delta, "dist"), (ours.score, "score")):
            close(value, arrays[f"{tag}_{key}"][row], 5e-5)
        merged = arrays[f"{tag}_merged"][row]
        if config["order_ambiguous"]:
            close(ours.merged[np.lexsort(ours.merged.T)], merged[np.lexsort(merged.T)], 5e-5)
        else:
            np.testing.assert_array_equal(ours.centres, arrays[f"{tag}_centers"][row])
            np.testing.assert_array_equal(ours.assign, arrays[f"{tag}_assign"][row])
            close(ours.merged, merged, 5e-5)


@pytest.mark.parametrize("config", load("g_raters")[1], ids=lambda config: config["tag"])
def test_rater_choice(config):
    arrays = load("g_raters")[0]
    tag, text_start = config["tag"], config["text_start"]
    x = arrays[f"{tag}_x"]
    index, relevance, margin = oracle.raters(x[config["v_start"] : text_start], x[text_start:])
    np.testing.assert_array_equal(index, arrays[f"{tag}_rater_idx"])
    close(relevance, arrays[f"{tag}_m"], 1e-5)
    assert margin == pytest.approx(config["rel_margin"], rel=0.01)


SCORE_CASES = load("h_scores")[1]


@pytest.mark.parametrize("config", [c for c in SCORE_CASES if c["fn"] != "head_select"], ids=lambda c: c["tag"])
def test_score_function(config):
    arrays = load("h_scores")[0]
    tag = config["tag"]
    close(oracle.scores(arrays[f"{tag}_attn"]), arrays[f"{tag}_scores"], 1e-5)


@pytest.mark.parametrize("config", [c for c in SCORE_CASES if c["fn"] == "rank"], ids=lambda c: c["tag"])
def test_rank_function(config):
    arrays = load("h_scores")[0]
    tag = config["tag"]
    rank, singular, _ = oracle.numerical_rank(arrays[f"{tag}_attn"].mean(0))
    assert rank == config["rank"]
    np.testing.assert_allclose(singular[:rank], arrays[f"{tag}_singular_values"][:rank], rtol=1e-4)


@pytest.mark.parametrize("config", [c for c in SCORE_CASES if c["fn"] == "head_select"], ids=lambda c: c["tag"])
def test_head_select_function(config):
    arrays = load("h_scores")[0]
    tag = config["tag"]
    attention = arrays[f"{tag}_attn"]
    sums, heads, margin = oracle.select_heads(attention, config["n_selected"])
    np.testing.assert_array_equal(heads, np.sort(arrays[f"{tag}_heads"]))
    np.testing.assert_allclose(sums, arrays[f"{tag}_head_sums"], rtol=1e-4)
    close(attention[heads].mean(0), arrays[f"{tag}_mean_selected"], 1e-5)
    assert margin == pytest.approx(config["margin"], rel=0.01)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rope_weight_against_distance(head_dim):
    recorded = load("h_rope_weights")[0][f"hd{head_dim}"]
    close(oracle.rope_weight(np.arange(len(recorded)), np.zeros(1), head_dim, 10000.0)[:, 0], recorded, 3e-5)


@pytest.mark.parametrize("text", [1, 5])
def test_all_text_rates_where_none_stands_out(text):
    visual = np.arange(12.0).reshape(4, 3)
    assert oracle.raters(visual, np.ones((text, 3)))[0].tolist() == list(range(text))


def tiny_model() -> oracle.Decoder:
    weights, config = load("weights_B")
    return oracle.Decoder(weights, 6, config["heads"], config["kv_heads"], 16, 10000.0, 1e-5)


@pytest.mark.parametrize("version", ["v1", "v1.5", "v2.0"])
def test_tokens_before_the_image_rate_where_none_follows(version):
    embeds = np.random.default_rng(0).normal(size=(12, 64)).astype(np.float32)
    settings = oracle.Settings(version, layers=(1,), keep=(4,), scale=1.0, bias=4.0, heads=2)
    event = oracle.generate(tiny_model(), embeds, 3, 9, settings, steps=1).events[0]
    assert event.raters.tolist() == [0, 1, 2]
    assert not event.scores.any()  # causal: they precede every visual token
    assert event.kept.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("version, visual", [("v1.5", [1, 1]), ("v2.0", [0])])
def test_a_single_visual_token_is_recycled_or_lost(version, visual):
    embeds = np.random.default_rng(2).normal(size=(8, 64))
    settings = oracle.Settings(version, layers=(1, 3), keep=(4, 4), heads=2)
    events = oracle.generate(tiny_model(), embeds, 3, 1, settings, steps=1).events
    assert [event.after.visual for event in events] == visual


def test_a_prompt_of_visual_tokens_only_is_refused():
    with pytest.raises(ValueError, match="visual tokens only"):
        oracle.generate(tiny_model(), np.ones((4, 64)), 0, 4, oracle.Settings("v1.5", (1,), (2,)), steps=1)


def test_prefill_equals_one_token_at_a_time():
    """The cache path against the causal mask, grouped heads included."""
    model = tiny_model()
    embeds = np.random.default_rng(1).normal(size=(7, 64))
    whole, _, _ = oracle.run_layer(model, 0, embeds, np.arange(7), (np.zeros((2, 0, 16)), np.zeros((2, 0, 16))))
    cached = (np.zeros((2, 0, 16)), np.zeros((2, 0, 16)))
    for position in range(7):
        row, _, cached = oracle.run_layer(model, 0, embeds[[position]], np.array([position]), cached)
        close(row[0], whole[position], 1e-12)
