"""Kernels in eight bits: what they are, that the linear layer takes them, and how far answers go from the model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

import sparsevlm_jax as sv
from benchmarks.int8 import compare, outcome
from sparsevlm_jax.bench.agreement import drift
from sparsevlm_jax.bench.shapes import Side
from sparsevlm_jax.checkpoints.check import check
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.checkpoints.load import load
from sparsevlm_jax.checkpoints.manifest import MANIFEST
from sparsevlm_jax.checkpoints.verify import verify
from sparsevlm_jax.cli.main import main
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.evaluate.record import describe_model, differences
from sparsevlm_jax.models.parameters import abstract_params, tree_bytes
from sparsevlm_jax.models.quantize import in_eight_bits, quantization_of, quantize_params, scale_of
from sparsevlm_jax.ops.attention import target
from sparsevlm_jax.ops.layers import FEW, scaled_product
from sparsevlm_jax.parallel.rules import spec_of
from sparsevlm_jax.pruning.methods import sparsity
from tests import models
from tests.layouts import HF
from tests.test_load import assert_same
from training.heldout import held_out

LAYER = ("language_model", "layers_0")
ROWS = [(5, 16, 9), (3, 16, 12)]
STEPS = 8
Flat = dict[tuple[str, ...], Any]


def flat(params: dict[str, Any]) -> Flat:
    return dict(traverse_util.flatten_dict(params))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded model in eight bits; not to be changed."""
    target = tmp_path_factory.mktemp("int8") / "orbax"
    convert(HF, target, quantize="int8")
    return target


def weight(inputs: int = 96, outputs: int = 40, dtype: str = "float32") -> jax.Array:
    """[outputs, inputs], with outputs of very different sizes, one of them all zero."""
    values = np.random.default_rng(0).normal(0, 0.1, (inputs, outputs)) * np.geomspace(1e-3, 10, outputs)
    values[:, 7] = 0
    return jnp.asarray(values.T, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_is_within_half_a_step_and_the_largest_of_an_output_is_exact(dtype: str) -> None:
    wanted = weight(dtype=dtype)
    values, scale = in_eight_bits(wanted)
    assert (values.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, (40,))
    steps = np.asarray(scale, np.float64)[:, None]
    wide, found = np.asarray(wanted, np.float64), np.asarray(values, np.float64) * steps
    assert (np.abs(found - wide) <= 0.5001 * steps).all()
    assert (np.abs(np.asarray(values)).max(axis=1) == np.where(np.arange(40) == 7, 0, 127)).all()
    np.testing.assert_allclose(np.abs(found).max(axis=1), np.abs(wide).max(axis=1), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 8e-3), ("float16", 1e-3)])
def test_a_product_is_that_with_the_weights_that_the_values_stand_for(
    dtype: str, error: float, rows: int, platform: str
) -> None:
    values, scale = in_eight_bits(weight(inputs=2048, outputs=130))  # several blocks
    x = jnp.asarray(np.random.default_rng(1).normal(0, 30, (rows, 2048)), dtype)
    with target(platform):
        found = jax.jit(lambda *args: scaled_product(*args))(x, values, scale)
    wide, whole = np.asarray(x, np.float64), np.asarray(values, np.float64).T
    weights = whole * np.asarray(scale, np.float64)
    assert found.dtype == x.dtype
    assert np.abs(wide @ whole).max() > 65504  # what float16 cannot hold
    far = np.abs(np.asarray(found, np.float64) - wide @ weights)
    assert (far <= error * (np.abs(wide) @ np.abs(weights))).all()


def test_a_tree_in_eight_bits_has_them_in_the_decoders_layers_and_nowhere_else() -> None:
    config = models.config()
    whole = models.params(config)
    held = quantize_params(whole)
    before, after = flat(whole), flat(held)
    linear = {path for path in before if scale_of(path) is not None}
    assert len(linear) == 7 * config.text.num_hidden_layers
    assert after.keys() - before.keys() == {scale_of(path) for path in linear}
    for path, leaf in before.items():
        assert after[path].dtype == jnp.int8 if path in linear else after[path] is leaf
    shapes = abstract_params(config, "float32", "int8")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), held) == jax.tree.map(
        lambda s: (s.shape, s.dtype), shapes
    )
    assert quantization_of(held) == "int8" and quantization_of(whole) is None


def logits(weights: dict[str, Any], config: Any, tokens: np.ndarray) -> np.ndarray:
    """Behind the prompts and behind each of the tokens [b, STEPS], float32 [b, STEPS + 1, vocab]."""
    plan = sv.make_plan(sv.Sparsity.dense(), config, 16, 21)
    return models.forced_logits(weights, config, plan, models.prompt(ROWS, text=21, visual=16), tokens)[0]


def rolled(params: dict[str, Any]) -> dict[str, Any]:
    """With every scale that of another output."""
    found = flat(params)
    for path in filter(None, [scale_of(path) for path in found]):
        found[path] = jnp.roll(found[path], 1)
    return traverse_util.unflatten_dict(found)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_stay_near_those_of_the_model_and_hang_on_every_scale(kv_heads: int) -> None:
    config = models.config(kv_heads=kv_heads)
    tokens = np.random.default_rng(3).integers(1, 180, (len(ROWS), STEPS))
    whole = models.params(config)
    wanted, held, wrong = (
        logits(params, config, tokens) for params in (whole, quantize_params(whole), rolled(quantize_params(whole)))
    )
    near, far = drift(wanted, held, [], []), drift(wanted, wrong, [], [])
    assert near.kl < 0.1 and near.top1 >= 0.7, (
        near
    )  # 0.06 and 0.78 at worst; its head is four times as wide as a model's
    assert far.kl > 1 and far.top1 < 0.3, far


@pytest.mark.parametrize("method", ["dense", "v1.5"])
def test_the_embedded_model_answers_held_out_questions_as_it_does(method: str) -> None:
    """The bound is about twice what benchmarks/results/int8.json has for v1.5."""
    data = held_out(8)
    whole, held = (outcome(form, data, sparsity(method)) for form in ("float32", "int8"))
    row = compare(held, whole, data)
    assert len(data.questions) > 60
    assert row["kl"] < 5e-3 and row["top1"] >= 0.97, row


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_loading_in_eight_bits_gives_what_converting_in_eight_bits_stores(dtype: str | None, tmp_path: Path) -> None:
    held, plain = load(HF, quantize="int8", dtype=dtype), load(HF, dtype=dtype)
    convert(HF, tmp_path / "int8", quantize="int8", dtype=dtype)
    convert(HF, tmp_path / "plain")
    assert_same(load(tmp_path / "int8").params, held.params)
    assert_same(load(tmp_path / "plain", quantize="int8", dtype=dtype).params, held.params)
    before, after = flat(plain.params), flat(held.params)
    kept = [path for path in before if scale_of(path) is None]
    assert len(kept) > 20
    assert_same({path: after[path] for path in kept}, {path: before[path] for path in kept})


def test_a_checkpoint_in_eight_bits_stays_so_and_computes_in_the_dtype_that_is_asked_for(converted: Path) -> None:
    narrow = load(converted, dtype="bfloat16")
    stored, found = flat(load(converted).params), flat(narrow.params)
    assert quantization_of(narrow.params) == "int8"
    for path, leaf in found.items():
        as_it_is = leaf.dtype == jnp.int8 or any(scale_of(other) == path for other in found)
        assert leaf.dtype == (stored[path].dtype if as_it_is else jnp.bfloat16), path


def test_a_checkpoint_in_eight_bits_is_checked_described_and_compared_with_its_source(converted: Path) -> None:
    scales = sum(leaf.dtype == jnp.int8 for leaf in flat(load(converted).params).values())
    assert check(converted) == len(flat(load(HF).params)) + scales
    report = verify(HF, converted)
    assert report.dtype == "int8" and report.passed
    assert report.differences["tower"] < 1e-5 and 1e-4 < report.differences["logits"] < 0.08


def test_a_changed_scale_is_noticed(converted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    chunk = next(copy.glob("params/*/state/*q_proj.scale/c/0"))
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match="missing or changed"):
        load(copy)


def as_if_float(records: list[dict[str, Any]]) -> None:
    next(record for record in records if record["stored_dtype"] == "int8")["stored_dtype"] = "float32"


def without_scale(records: list[dict[str, Any]]) -> None:
    records.remove(next(record for record in records if record["path"].endswith("q_proj/scale")))


@pytest.mark.parametrize("spoil", [as_if_float, without_scale])
def test_a_manifest_that_is_of_two_minds_is_refused(
    spoil: Callable[[list[dict[str, Any]]], None], converted: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    spoil(next(group for group in manifest["groups"] if any(r["stored_dtype"] == "int8" for r in group)))
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest and config.json describe different parameters"):
        load(copy)


def refused(run: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        run()
    return str(raised.value)


def test_contradictions_are_refused_by_name(converted: Path, tmp_path: Path) -> None:
    assert refused(lambda: load(HF, quantize="int4")) == 'quantize="int4" is not supported: choose int8'
    assert refused(lambda: convert(HF, tmp_path / "a", quantize="fp8")).startswith('quantize="fp8" is not supported')
    assert "is in int8 already, and stays so" in refused(lambda: load(converted, quantize="int8"))
    assert "is in int8, which cannot be undone" in refused(lambda: to_hf(converted, tmp_path / "hf"))
    assert "is not the result of this conversion" in refused(lambda: convert(HF, converted))
    assert refused(lambda: Side.parse("sdpa:dense/int8", 16)) == 'quantize="int8": sdpa takes its weights as they are'
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: its exit code, and what it printed."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        assert isinstance(stop.value.code, int)
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return call


def test_commands_say_what_is_wrong_in_their_own_words(converted: Path, run: Callable[..., Any]) -> None:
    for command, said in (
        (("ask", "--question", "a", "--quantize", "int4"), '--quantize "int4" is not supported: choose int8'),
        (("ask", "--question", "a", "--model", converted, "--quantize", "int8"), "leave --quantize out"),
        (("convert", "--to-hf", "a", "b", "--quantize", "int8"), "--quantize goes with SRC DST only"),
        (("plan", "--model", "llava-1.5-7b", "--quantize", "int2"), '--quantize "int2" is not supported'),
    ):
        code, _, err = run(*command)
        assert code == 2 and said in err


def test_a_plan_says_what_parameters_take(converted: Path, run: Callable[..., Any]) -> None:
    for model, options, quantize in ((HF, (), None), (HF, ("--quantize", "int8"), "int8"), (converted, (), "int8")):
        code, out, _ = run("plan", "--model", model, "--json", *options)
        assert code == 0
        shapes = abstract_params(load(HF).config, jnp.bfloat16, quantize)
        assert json.loads(out)["parameter_bytes"] == tree_bytes(shapes)


def test_seven_billion_weights_in_eight_bits_leave_half_of_sixteen_gigabytes() -> None:
    config = sv.llava_15_7b()
    whole, held = (tree_bytes(abstract_params(config, jnp.bfloat16, quantize)) for quantize in (None, "int8"))
    assert whole > 0.87 * 15 * 2**30 and held < 0.5 * 15 * 2**30


def test_answers_in_eight_bits_are_not_gone_on_with_in_others() -> None:
    whole, held = (describe_model(load(HF, quantize=quantize)) for quantize in (None, "int8"))
    assert held["quantize"] == "int8" and held["dtype"] == whole["dtype"]
    assert {line.split()[0] for line in differences(whole, held)} == {"quantize", "weights"}
    older = {key: value for key, value in whole.items() if key != "quantize"}
    assert not list(differences(older, whole))


def test_scales_lie_with_the_outputs_that_they_are_of() -> None:
    shapes: Any = flat(abstract_params(models.config(), "float32", "int8"))
    cut = {path[-3:]: spec_of(path, leaf.shape, 2) for path, leaf in shapes.items() if path[:2] == LAYER}
    for name in ("q_proj", "k_proj", "v_proj"):
        assert cut["self_attn", name, "scale"] == P("tensor") and cut["self_attn", name, "weight"] == P("tensor", None)
    for name in ("gate_proj", "up_proj"):
        assert cut["mlp", name, "scale"] == P("tensor") and cut["mlp", name, "weight"] == P("tensor", None)
    assert cut["self_attn", "o_proj", "scale"] == cut["mlp", "down_proj", "scale"] == P()
    assert cut["self_attn", "o_proj", "weight"] == cut["mlp", "down_proj", "weight"] == P(None, "tensor")
