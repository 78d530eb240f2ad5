"""The benchmark: weights that all sides share, the gate, figures, reports, and the worker's protocol."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from sparsevlm_jax.aot.scopes import OTHER, phase_of
from sparsevlm_jax.bench import (
    agreement,
    break_even,
    hash_weights,
    jax_programs,
    matrix,
    metrics,
    report,
    sitting,
    timing,
)
from sparsevlm_jax.bench.files import put_between, write_json
from sparsevlm_jax.bench.jax_side import JaxRunner
from sparsevlm_jax.bench.machine import seat
from sparsevlm_jax.bench.profiling import phases_of
from sparsevlm_jax.bench.shapes import SHAPES, Cell, Side, default_sides
from sparsevlm_jax.bench.sitting import Settings, Sitting
from sparsevlm_jax.bench.torch_side import runner
from sparsevlm_jax.bench.torch_weights import fill, load
from sparsevlm_jax.bench.worker import Worker, WorkerError
from sparsevlm_jax.cli.main import main
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.inputs.packing import TiledImages
from sparsevlm_jax.models.cost import frame_xla_flops
from sparsevlm_jax.models.family import family_of

CELL = Cell("tiny", 1, 48, 16, "float32")
NEXT = Cell("tiny-next", 1, 48, 88, "float32")
VIDEO = Cell("tiny-video", 2, 48, 51, "float32")
DENSE, PRUNED = Side("jax", "dense"), Side("jax", "v1.5", 8)


def _report(side: Side, status: str = "agrees") -> dict[str, Any]:
    return {
        "side": asdict(side),
        "verdict": {"status": status, "detail": ""},
        "compile": {"cold_s": 3.0, "warm_s": 1.0, "program_bytes": {"start": {"peak": 2**30, "temporary": 0}}},
        "memory": {"resident_peak": 2**31, "device_peak": None},
        "facts": {"decoder_bytes": 10**9, "cache_bytes": 10**6, "xla_flops": 1e9, "device": "cpu"},
        "peaks": {"flops_per_s": 1e11, "bytes_per_s": 1e10},
        "preprocess_s": 0.01,
        "environment": {"cores": 2, "jax": "0"},
        "drift": None,
    }


def _samples(prefill: list[float]) -> dict[str, list[float]]:
    rounds = len(prefill)
    return {
        "tower": [0.5] * rounds,
        "prefill": prefill,
        "tokens_1": [p + 0.5 for p in prefill],
        "tokens_16": [p + 2.0 for p in prefill],
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """Two sides; the machine is twice as slow in the second round."""
    pruned = _samples([0.4, 0.8, 0.4]) | {"prefill_given": [0.3, 0.6, 0.3]}
    return {
        "cell": asdict(CELL),
        "settings": {},
        "environment": {"processor": "x", "device": "cpu", "date": "2000-01-01"},
        "sides": {side.name: _report(side) for side in (DENSE, PRUNED)},
        "sittings": [{DENSE.name: _samples([1.0, 2.0, 1.0]), PRUNED.name: pruned}],
    }


@pytest.mark.parametrize("cell, dtype", [(CELL, "float32"), (CELL, "bfloat16"), (NEXT, "float32"), (VIDEO, "float32")])
def test_both_sides_draw_the_same_weights_bit_for_bit(cell: Cell, dtype: str) -> None:
    params = jax_programs.draw_params(cell.config, dtype)
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
    model = load(cell.config, dtype, torch.device("cpu"), "sdpa")
    names = family_of(cell.config).names
    entries = names.entries(params)
    for name, parameter in model.named_parameters():
        entry = entries.pop(names.canonical(name) or name)
        ours = np.asarray(flat[entry.path].astype(jnp.float32))
        np.testing.assert_array_equal(ours, parameter.detach().float().numpy())
    assert not entries


def test_tensors_of_other_names_are_drawn_apart() -> None:
    first, second = (torch.zeros(64, 64) for _ in range(2))
    fill(first, "a.weight")
    fill(second, "b.weight")
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.1
    assert first.std() == pytest.approx(64**-0.5, rel=0.05)


def test_prompts_hold_their_visual_tokens_in_one_piece() -> None:
    ids = hash_weights.input_ids(replace(CELL, batch=3))
    visual = ids == CELL.config.image_token_id
    assert (visual.sum(axis=1) == CELL.visual_tokens).all()
    assert (np.diff(np.flatnonzero(visual[0])) == 1).all()
    assert not (ids[0] == ids[1]).all()


def test_a_batch_begins_with_the_rows_of_a_smaller_one() -> None:
    one, three = CELL, replace(CELL, batch=3)
    np.testing.assert_array_equal(hash_weights.input_ids(three)[:1], hash_weights.input_ids(one))
    np.testing.assert_array_equal(hash_weights.pixels(three)[:1], hash_weights.pixels(one))


def test_small_is_the_shape_that_was_asked_for() -> None:
    shape = SHAPES["small"]
    text = shape.config.text
    sizes = (text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.num_attention_heads)
    assert sizes == (24, 1024, 2816, 16)
    assert shape.visual_tokens + shape.text_tokens == 664
    cell = Cell("small", 1, shape.text_tokens, shape.visual_tokens, "float32")
    stages = metrics.plan_of(cell, Side("jax", "v1.5", 192)).stages
    assert [(stage.stop - 1, stage.keep) for stage in stages[:-1]] == [(2, 300), (6, 200), (15, 110)]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_plans_for_its_default_sides(name: str) -> None:
    shape = SHAPES[name]
    cell = Cell(name, 1, shape.text_tokens, shape.visual_tokens, "float32")
    for text in default_sides(shape):
        side = Side.parse(text, cell.visual_tokens)
        assert side.name == text
        assert metrics.plan_of(cell, side).visual_tokens <= cell.visual_tokens


@pytest.mark.parametrize("text", ["numpy:dense", "sdpa:v1.5@8", "jax:nothing", "jax:v1.5@few"])
def test_a_side_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f'sides="{text}"'):
        Side.parse(text, 16)


def test_visual_tokens_become_images_of_that_size() -> None:
    assert replace(CELL, visual_tokens=25).config.tokens_per_image == 25
    assert replace(CELL, visual_tokens=48).images == 3
    with pytest.raises(UserError, match="visual_tokens=50"):
        assert replace(CELL, visual_tokens=50).config


def test_images_of_tiles_fill_their_largest_canvas() -> None:
    cell = Cell("llava-next-7b", 2, 118, SHAPES["llava-next-7b"].visual_tokens, "float32")
    assert (cell.image_size, cell.images) == ((672, 672), 1)
    assert [layout.tokens for layout in cell.layouts] == [2928, 2928]
    assert hash_weights.pixels(replace(NEXT, batch=2)).shape == (2 * 5, 3, 56, 56)
    with pytest.raises(UserError, match="expected a multiple of 88"):
        assert replace(NEXT, visual_tokens=100).config


def test_a_video_is_frames_of_the_family_itself() -> None:
    cell = Cell("video", 2, 118, SHAPES["video"].visual_tokens, "float32")
    assert (cell.config.model_type, cell.images, cell.image_size) == ("video_llava", 8, (224, 224))
    assert [layout.tokens for layout in cell.layouts] == [2056, 2056]
    shown = hash_weights.images(VIDEO)
    assert isinstance(shown, TiledImages) and len(shown.pixel_values) == 0
    assert shown.frames.shape == (2 * 3, 3, 56, 56) and shown.packing.index[:, 0].tolist() == [*range(2 * 51)]
    for visual_tokens in (2048, 576):
        with pytest.raises(UserError, match="expected a multiple of 257, which a frame of video becomes"):
            assert replace(cell, visual_tokens=visual_tokens).config


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_the_dense_video_sides_agree_and_count_the_frames_tower() -> None:
    ours, theirs = JaxRunner(VIDEO, DENSE, 16), runner(VIDEO, Side("sdpa", "dense"), 16, "cpu")
    np.testing.assert_array_equal(ours.generate((1, 4))[0], theirs.generate((1, 4))[0])
    assert ours.facts()["tower_xla_flops"] == pytest.approx(6 * frame_xla_flops(VIDEO.config))


def test_the_products_alone_are_all_of_the_layers_and_no_more() -> None:
    jax_runner = JaxRunner(CELL, PRUNED, 16)
    text, lengths = CELL.config.text, jax_runner.layer_lengths
    assert len(set(lengths)) > 1, "each as long as its layer"
    heads = text.head_dim * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    flops = 2 * CELL.batch * sum(lengths) * text.hidden_size * (heads + 3 * text.intermediate_size)
    counted = jax_runner.program("products").cost_analysis()["flops"]
    assert flops <= counted < 1.02 * flops
    runner(CELL, Side("sdpa", "dense"), 16, "cpu").phases()["products"]()


def test_given_indices_run_the_same_stages() -> None:
    """With nothing merged the prefill with given indices is the prefill."""
    side = Side("jax", "v2.0", 8)
    jax_runner = JaxRunner(CELL, side, 16)
    logits = jax_runner.phases()["prefill"]()[0]
    given = jax_runner.phases()["prefill_given"]()[0]
    np.testing.assert_allclose(given, logits, atol=1e-4)


@pytest.mark.parametrize("cell", [CELL, NEXT, VIDEO], ids=lambda cell: cell.shape)
def test_jax_and_pytorch_agree_from_pixels_to_tokens(cell: Cell) -> None:
    engine = "best" if cell.batch == 1 else "batched"
    ours, theirs = JaxRunner(cell, PRUNED, 16), runner(cell, Side(engine, "v1.5", 8), 16, "cpu")
    tokens, seconds = ours.generate((1, 4))
    others, _ = theirs.generate((1, 4))
    np.testing.assert_array_equal(tokens, others)
    assert ours.selections() == theirs.selections()
    assert len(seconds) == 2 and seconds[0] < seconds[1]
    followed, logits = ours.follow(tokens.shape[1])
    np.testing.assert_array_equal(followed, tokens)
    for side in (ours, theirs):
        np.testing.assert_allclose(side.follow(tokens.shape[1], tokens)[1], logits, atol=1e-3)


def test_a_side_that_disagrees_is_told_by_its_first_difference() -> None:
    answer = {"tokens": [[1, 2, 3]], "selections": [[[0, 1]], [[0]]]}
    other = {"tokens": [[1, 9, 3]], "selections": answer["selections"]}
    pruned = {"tokens": answer["tokens"], "selections": [[[0, 2]], [[0]]]}
    sides = [Side("jax", "v1.5", 8), Side("best", "v1.5", 8), Side("faithful", "v1.5", 8), Side("jax", "v2.0", 8)]
    found = agreement.verdicts(dict(zip(sides, (answer, other, pruned, answer), strict=True)))
    assert [found[side.name].status for side in sides] == ["agrees", "disagrees", "disagrees", "alone"]
    assert "new token 1" in found["best:v1.5@8"].detail
    assert "pruning layer 0: 2 tokens" in found["faithful:v1.5@8"].detail


def test_a_side_that_failed_says_why() -> None:
    found = agreement.verdicts({DENSE: {"tokens": [], "selections": []}, Side("sdpa", "dense"): "out of memory"})
    assert found["sdpa:dense"] == agreement.Verdict("failed", "out of memory")


def test_drift_is_zero_against_itself_and_counts_what_changed() -> None:
    logits = np.random.default_rng(0).normal(size=(1, 3, 8))
    none = agreement.drift(logits, logits, [[[1, 2]]], [[[1, 2]]])
    assert none == agreement.Drift(0.0, 1.0, [1.0])
    swapped = logits[..., ::-1]
    some = agreement.drift(logits, swapped, [[[1, 2]]], [[[1, 3]]])
    assert some.kl > 0.1 and some.overlap == [0.5]


def test_figures_compare_within_rounds(result: dict[str, Any]) -> None:
    dense, pruned = metrics.figures(result)
    assert pruned.prefill_speedup == pytest.approx(2.5)  # in every round, whatever the machine did
    assert pruned.overhead == (pytest.approx(0.1), pytest.approx(0.25))
    assert pruned.per_token["p50"] == pytest.approx(1.5 / 15)
    assert pruned.over_ideal == pytest.approx(0.4 / pruned.flops_share)
    assert dense.flops_share == 1 and dense.prefill_speedup == 1
    assert dense.of_bandwidth == pytest.approx(1.001e9 / 0.1 / 1e10)


def test_where_all_of_jax_runs_on_a_mesh_it_is_compared_with_dense_there(result: dict[str, Any]) -> None:
    (samples,) = result["sittings"]
    sharded = {side: side.on("tensor=2") for side in (DENSE, PRUNED)}
    result["sides"] = {side.name: _report(side) for side in sharded.values()}
    result["sittings"] = [{there.name: samples[here.name] for here, there in sharded.items()}]
    dense, pruned = metrics.figures(result)
    assert (dense.prefill_speedup, pruned.prefill_speedup) == (1, pytest.approx(2.5))
    result["sides"][DENSE.name] = _report(DENSE)
    result["sittings"][0][DENSE.name] = _samples([3.0, 6.0, 3.0])  # one device is slower
    assert [each.prefill_speedup for each in metrics.figures(result)] == [3, pytest.approx(7.5), 1]


def test_percentiles_are_of_the_samples() -> None:
    found = timing.summary([float(n) for n in range(101)])
    assert found == {"p50": 50, "p5": 5, "p95": 95, "n": 101}


def test_a_report_shows_every_side_and_no_figure_of_one_that_disagrees(tmp_path: Path, result: dict[str, Any]) -> None:
    wrong = Side("best", "v1.5", 8)
    result["sides"][wrong.name] = _report(wrong, "disagrees")
    (tmp_path / "a.json").write_text(json.dumps(result))
    html, markdown = report.write_report(tmp_path)
    text = markdown.read_text()
    assert f"| {PRUNED.name} | 10.0 | 400 ms" in text
    assert [line for line in text.splitlines() if wrong.name in line] == [
        f"| {wrong.name} | disagrees: no figures | – | – | – | – |"
    ]
    assert html.read_text().count("<svg") == len(list((tmp_path / "plots").glob("*.svg"))) == 4
    assert "src=" not in html.read_text()  # self-contained


def test_a_report_leaves_out_what_a_run_did_not_time(tmp_path: Path, result: dict[str, Any]) -> None:
    (samples,) = result["sittings"]
    result["sittings"] = [{name: {"prefill": phases["prefill"]} for name, phases in samples.items()}]
    (tmp_path / "a.json").write_text(json.dumps(result))
    _, markdown = report.write_report(tmp_path)
    text = markdown.read_text()
    assert f"| {PRUNED.name} | 10.0 | 400 ms" in text and "end to end, " not in text
    assert re.search(rf"\| {re.escape(PRUNED.name)} \| [^|]+ \| – \| – \| – \| – \| – \| – \|", text)
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 3


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results there"):
        report.write_report(tmp_path)


def test_the_readme_gets_its_table_between_the_markers(tmp_path: Path, result: dict[str, Any]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    put_between(readme, "bench", report.readme_table([result]))
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench -->\n") and text.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in text and PRUNED.name in text


def test_break_even_is_where_all_larger_ones_pay_too() -> None:
    assert break_even.first_that_pays({64: 1.1, 144: 0.9, 256: 1.05, 576: 0.8, 1152: 0.6}) == 576
    assert break_even.first_that_pays({64: 1.1, 144: 1.0}) is None


def test_break_even_is_reported_with_its_machine(tmp_path: Path, result) -> None:
    """A sweep times answers only."""
    (samples,) = result["sittings"]
    result["sittings"] = [{name: {"tokens_16": phases["tokens_16"]} for name, phases in samples.items()}]
    write_json(tmp_path / "break-even" / f"{CELL.key}.json", result)
    for page in report.write_report(tmp_path):
        text = page.read_text()
        assert f"{CELL.visual_tokens} visual tokens" in text
        assert "2000-01-01" in text


class _Sitting:
    """Answers at once: `best` keeps another token than the others."""

    seated: ClassVar[list[list[str]]] = []

    def __init__(self, cell: Cell, settings: Settings, log: Any) -> None:
        self.samples: dict[str, Any] = {}
        self.reports: dict[str, Any] = {}
        self.answers: dict[Side, Any] = {}

    def run(self, sides: list[Side], after_round: Any) -> None:
        self.seated.append([side.name for side in sides])
        for side in sides:
            self.samples[side.name], self.reports[side.name] = _samples([1.0]), {}
            self.answers[side] = {"tokens": [[1]], "selections": [[[int(side.engine == "best")]]]}
        after_round()


def test_a_cell_grows_by_the_sides_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "Sitting", _Sitting)
    _Sitting.seated.clear()
    faithful, wrong = Side("faithful", "v1.5", 8), Side("best", "v1.5", 8)
    for sides in ([DENSE, PRUNED], [DENSE, PRUNED], [DENSE, faithful, wrong]):
        matrix.run_cell(CELL, sides, Settings("cpu", (1, 8)), tmp_path, lambda message: None)
    assert _Sitting.seated == [[DENSE.name, PRUNED.name], [DENSE.name, faithful.name, wrong.name]]
    found = json.loads((tmp_path / f"{CELL.key}.json").read_text())
    statuses = {name: side["verdict"]["status"] for name, side in found["sides"].items()}
    assert statuses[PRUNED.name] == statuses[faithful.name] == "agrees"  # told apart over two sittings
    assert statuses[wrong.name] == "disagrees"
    assert [list(samples) for samples in found["sittings"]] == [[DENSE.name, PRUNED.name], [DENSE.name, faithful.name]]


def test_a_cell_that_is_cut_short_keeps_the_raw_seconds_of_its_last_sitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(_Sitting):
        def run(self, sides: list[Side], after_round: Any) -> None:
            super().run(sides, after_round)
            if len(self.seated) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "Sitting", Interrupted)
    _Sitting.seated.clear()
    faithful = Side("faithful", "v1.5", 8)
    sides, settings = [DENSE, PRUNED, faithful], Settings("cpu", (1, 8), at_once=2)
    with pytest.raises(KeyboardInterrupt):
        matrix.run_cell(CELL, sides, settings, tmp_path, lambda message: None)
    unfinished = tmp_path / "unfinished" / f"{CELL.key}.json"
    assert list(json.loads(unfinished.read_text())["samples"]) == [DENSE.name, faithful.name]
    found = matrix.run_cell(CELL, sides, settings, tmp_path, lambda message: None)
    assert not unfinished.parent.exists()
    assert _Sitting.seated == [[DENSE.name, PRUNED.name], *[[DENSE.name, faithful.name]] * 2]
    assert list(found["sides"]) == [DENSE.name, PRUNED.name, faithful.name]


def test_a_sitting_of_which_no_round_ended_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Roundless(_Sitting):
        def run(self, sides: list[Side], after_round: Any) -> None:
            super().run(sides, lambda: None)

    monkeypatch.setattr(matrix, "Sitting", Roundless)
    matrix.run_cell(CELL, [DENSE], Settings("cpu", (1, 8)), tmp_path, lambda message: None)
    assert (tmp_path / f"{CELL.key}.json").exists() and not (tmp_path / "unfinished").exists()


def test_one_row_engines_sit_out_larger_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "Sitting", _Sitting)
    sides = [DENSE, Side("faithful", "v1.5", 8), Side("batched", "v1.5", 8)]
    found = matrix.run_cell(replace(CELL, batch=2), sides, Settings("cpu"), tmp_path, lambda message: None)
    assert list(found["sides"]) == ["jax:dense", "batched:v1.5@8"]


def test_sittings_hold_as_many_as_are_allowed_and_always_the_first() -> None:
    others = [Side("jax", "v1.5", n) for n in range(1, 6)]
    sittings = seat(CELL, [DENSE, *others], "cpu", at_once=3)
    assert [len(sitting) for sitting in sittings] == [3, 3, 2]
    assert all(sitting[0] == DENSE for sitting in sittings)


def test_jax_sides_take_one_seat_on_a_gpu() -> None:
    pruned, torch_sides = [Side("jax", "v1.5", n) for n in (8, 6, 4)], [Side("sdpa", "dense"), Side("eager", "dense")]
    sittings = seat(CELL, [DENSE, *torch_sides, *pruned], "gpu", at_once=2)
    assert sittings == [[DENSE, torch_sides[0]], [DENSE, torch_sides[1], *pruned]]


def test_sides_that_share_a_process_answer_as_those_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for together in (False, True):
        monkeypatch.setattr(sitting, "shares_a_process", lambda side, device, together=together: together)
        run = Sitting(CELL, Settings("cpu", (1, 4), warm_ups=0, rounds=1, phases=("generate",)), lambda message: None)
        rounds: list[list[str]] = []
        run.run([DENSE, PRUNED], after_round=lambda run=run, rounds=rounds: rounds.append(list(run.samples)))
        assert rounds == [[DENSE.name, PRUNED.name]]
        found.append(run)
    assert found[0].answers == found[1].answers and set(found[1].answers) == {DENSE, PRUNED}
    assert [list(run.samples) for run in found] == [[DENSE.name, PRUNED.name]] * 2


def test_in_16_bit_only_sides_with_a_counterpart_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(gate: matrix.Gate, side: Side) -> dict[str, Any]:
        asked.append(side.name)
        return {"answer": {"tokens": [[1]], "selections": []}, "drift": None}

    monkeypatch.setattr(matrix, "Sitting", _Sitting)
    monkeypatch.setattr(matrix.Gate, "_answer", answer)
    sides = [DENSE, PRUNED, Side("sdpa", "dense")]
    found = matrix.run_cell(replace(CELL, dtype="bfloat16"), sides, Settings("cpu"), tmp_path, lambda message: None)
    assert asked == [DENSE.name, "sdpa:dense"]
    statuses = {name: side["verdict"]["status"] for name, side in found["sides"].items()}
    assert statuses == {DENSE.name: "agrees", PRUNED.name: "alone", "sdpa:dense": "agrees"}


def test_no_more_tokens_are_compared_than_caches_have_room_for() -> None:
    assert Settings("cpu", (1, 8)).gate_tokens == 8
    assert Settings("cpu", (1, 16, 128)).gate_tokens == 16


def test_phases_are_the_codes_named_scopes() -> None:
    program = '  %fusion.3 = f32[2] fusion(%x), metadata={op_type="dot" op_name="jit(start)/Llava/score/dot_general"}'
    assert phases_of(program) == {"fusion.3": "score"}
    assert phase_of("jit(start)/Llava/vision_tower/layers_0/self_attn/q_proj/dot_general") == "tower"
    assert phase_of("jit(start)/add") == OTHER


def test_a_worker_reports_its_errors_and_goes_on() -> None:
    with Worker(CELL, DENSE, 4, "cpu") as worker:
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.ask("no_such_thing")
        turn = worker.ask("turn", marks=[1, 2], phases=["generate"])
    assert turn.keys() == {"tokens_1", "tokens_2"}


def test_a_worker_ends_in_the_middle_of_its_work_when_its_parent_is_gone() -> None:
    """A killed parent closes the pipe, as this does."""
    with subprocess.Popen(
        [sys.executable, "-m", "sparsevlm_jax.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        what = {"cell": asdict(CELL), "side": asdict(DENSE), "room": 4, "device": "cpu", "alone": True}
        begin = {"of": DENSE.name, "do": "begin", **what}
        answers, _ = worker.communicate(json.dumps(begin) + "\n", timeout=60)
    assert worker.returncode == 0 and not answers


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shape", "huge"], "--shape huge"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "abacus"], "abacus"),
        (["--break-even", "v1.5", "--mesh", "tensor=2"], "--mesh tensor=2"),
        (["--report-only", "--out", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_options_are_one_line(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsevlm", "bench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert named in error and len(error.splitlines()) == 1
