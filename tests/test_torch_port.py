"""The benchmark's PyTorch SparseVLM replays the recorded traces of the authors' code, in all its variants."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sparsevlm_jax import make_plan
from sparsevlm_jax.bench.torch_sparsevlm import VARIANTS, Event, Span, SparseDecoder, greedy
from tests import traces

GOLDEN = Path(__file__).parent / "golden"
TRACES = [p for p in traces.files(GOLDEN) if traces.kind(p) == "lm" and not p.name.startswith("tiny_llava")]
SCORES, LOGITS = {"v1": 1e-5, "v15": 1e-5, "v20": 5e-5}, 5e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Waiting threads cost these small models more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Replay(NamedTuple):
    tokens: list[int]
    logits: np.ndarray  # of the first token
    lengths: list[int]  # of the caches after the prefill, per layer
    positions: list[int]  # of the first decoded token, per layer
    events: list[Event]


def _decoder(case: traces.Case, variant: str) -> SparseDecoder:
    from transformers import LlamaConfig, LlamaForCausalLM

    config, _ = traces.model(case)
    text = config.text
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            rms_norm_eps=text.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope.theta},
            max_position_embeddings=text.max_position_embeddings,
        )
    )
    with np.load(case.path.parent / case.settings["weights"], allow_pickle=False) as z:
        model.load_state_dict({name: torch.from_numpy(z[name]) for name in z.files if name != "config_json"})
    sizes = case.settings
    plan = make_plan(traces.sparsity(sizes), text, sizes["v_num"], sizes["L"] - sizes["v_num"])
    return SparseDecoder(model.eval().model, model.lm_head, plan, variant)


@cache
@torch.inference_mode()
def _replay(path: Path, variant: str) -> Replay:
    case = traces.read(path)
    decoder, span = _decoder(case, variant), Span(case.visual.start, case.visual.stop)
    jitter = [torch.from_numpy(np.array(noise)) for noise in traces.jitter(case)]
    logits, state, events = decoder.prefill(torch.from_numpy(case.arrays["inputs_embeds"]), span, jitter)
    lengths, positions = [keys.shape[2] for keys in state.keys], list(state.positions)
    tokens = greedy(decoder, logits, state)
    found = [int(next(tokens)) for _ in case.arrays["tokens"]]
    return Replay(found, logits[0].numpy(), lengths, positions, events)


def _variants(path: Path) -> list[str]:
    """v1's counts come from data: nothing to batch there."""
    return [v for v in VARIANTS if v != "batched" or traces.settings(path)["version"] != "v1"]


replays = pytest.mark.parametrize(
    ("path", "variant"), [pytest.param(p, v, id=f"{p.stem}-{v}") for p in TRACES for v in _variants(p)]
)


@replays
def test_tokens_and_logits_are_those_recorded(path: Path, variant: str) -> None:
    replay, arrays = _replay(path, variant), traces.read(path).arrays
    np.testing.assert_array_equal(replay.tokens, arrays["tokens"])
    np.testing.assert_allclose(replay.logits, arrays["prefill_logits"], atol=LOGITS, rtol=0)


@replays
def test_caches_and_positions_are_those_recorded(path: Path, variant: str) -> None:
    replay, arrays = _replay(path, variant), traces.read(path).arrays
    np.testing.assert_array_equal(replay.lengths, arrays["kv_len_prefill"])
    np.testing.assert_array_equal(replay.positions, arrays["decode_pos"][0])


@replays
def test_selections_and_merged_tokens_are_those_recorded(path: Path, variant: str) -> None:
    replay, case = _replay(path, variant), traces.read(path)
    tolerance = SCORES.get(case.settings["version"], 0)
    pruned = [k for k, event in enumerate(case.settings["events"]) if event["v_num_out"] != event["v_num_in"]]
    assert len(replay.events) >= len(pruned)
    if len(replay.events) != len(case.settings["events"]):  # v1 at full rank prunes nothing, and says nothing
        assert not pruned
        return
    for k, event in enumerate(replay.events):
        recorded = {key.removeprefix(f"p{k}_"): value for key, value in case.arrays.items()}
        np.testing.assert_allclose(event.scores[0], recorded["scores"], atol=tolerance, rtol=0)
        np.testing.assert_array_equal(event.selection.kept[0], recorded["kept_vis"])
        if event.merged is not None:
            assert set(event.selection.pool[0].tolist()) == set(recorded["merge_vis"].tolist())
            np.testing.assert_allclose(event.merged.tokens[0], recorded["merged"], atol=5e-5, rtol=0)


def test_rows_of_a_batch_equal_themselves_run_alone() -> None:
    case = traces.read(GOLDEN / "b1_v15.npz")
    decoder, span = _decoder(case, "batched"), Span(case.visual.start, case.visual.stop)
    first = torch.from_numpy(case.arrays["inputs_embeds"])
    second = first.clone()
    second[:, span.start : span.stop] = first[:, span.start : span.stop].flip(1)
    with torch.inference_mode():
        together, _, events = decoder.prefill(torch.cat([first, second]), span)
        for row, prompt in enumerate((first, second)):
            alone, _, single = decoder.prefill(prompt, span)
            np.testing.assert_allclose(together[row], alone[0], atol=LOGITS, rtol=0)
            np.testing.assert_array_equal(events[-1].selection.kept[row], single[-1].selection.kept[0])


def test_the_best_case_writes_out_no_square_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its softmax sees the raters' rows; the faithful variant's sees all."""
    seen: dict[str, Any] = {}
    softmax = torch.softmax
    for variant in ("faithful", "best"):
        shapes: list[Any] = seen.setdefault(variant, [])

        def spy(x: Any, *args: Any, shapes: list[Any] = shapes, **options: Any) -> Any:
            shapes.append(x.shape)
            return softmax(x, *args, **options)

        monkeypatch.setattr(torch, "softmax", spy)
        case = traces.read(GOLDEN / "b1_v15.npz")
        with torch.inference_mode():
            decoder = _decoder(case, variant)
            decoder.prefill(torch.from_numpy(case.arrays["inputs_embeds"]), Span(case.visual.start, case.visual.stop))
    square = [shape for shape in seen["best"] if len(shape) == 4 and shape[2] == shape[3]]
    assert not square
    assert any(shape[2] == shape[3] for shape in seen["faithful"] if len(shape) == 4)
