"""Conversion to orbax and back: every layout, the same parameters; the way back, the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlavaForConditionalGeneration

from sparsevlm_jax import Sparsity, UserError, embed, load, make_plan, prefill
from sparsevlm_jax.checkpoints import export, orbax
from sparsevlm_jax.checkpoints.check import check
from sparsevlm_jax.checkpoints.convert import convert, workplace
from sparsevlm_jax.checkpoints.describe import describe
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.checkpoints.manifest import read_manifest
from sparsevlm_jax.checkpoints.safetensors import list_tensors
from sparsevlm_jax.checkpoints.source import open_source
from sparsevlm_jax.checkpoints.verify import verify
from sparsevlm_jax.cli import main
from sparsevlm_jax.inputs.processor import Processor
from tests.conftest import ROOT
from tests.layouts import GOLDEN, HF, LAYOUTS, NAMES, ORIGINAL, contents, original, original_with_clip, weights

RECORDED = np.load(GOLDEN / "tiny_llava_dense.npz")  # by transformers, from the same weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded model, converted; not to be changed."""
    target = tmp_path_factory.mktemp("converted") / "orbax"
    convert(HF, target)
    return target


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The recorded model, converted; to be changed."""
    convert(HF, tmp_path / "orbax")
    return tmp_path / "orbax"


def flat(params: dict[str, Any]) -> dict[str, tuple[str, bytes]]:
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path): (leaf.dtype.name, np.asarray(leaf).tobytes()) for path, leaf in leaves}


def logits(model: Model, case: str = "c0") -> np.ndarray:
    """Logits behind a recorded prompt, with the model's own image token."""
    recorded = RECORDED[f"{case}_input_ids"]
    ids = np.where(recorded == 190, model.config.image_token_id, recorded)[None]
    pixels = jnp.asarray(RECORDED[f"{case}_pixel_values"])
    plan = make_plan(Sparsity.dense(), model.config, model.config.tokens_per_image)
    prompt = embed(model.params, jnp.asarray(ids), jnp.asarray([ids.shape[1]]), pixels, model.config)
    return np.asarray(prefill(model.params, prompt, model.config, plan, max_new_tokens=0)[0][0])


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda build: build.__name__)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded model, converted from every layout; not to be changed."""
    home = tmp_path_factory.mktemp(request.param.__name__)
    layout = request.param(home / "source")
    convert(layout.folder, home / "orbax", vision_tower=layout.tower)
    return home / "orbax"


def test_every_layout_gives_the_same_parameters(each):
    assert flat(load(each).params) == flat(load(HF).params)


def test_every_layout_gives_the_logits_of_transformers(each):
    model = load(each)
    for case in ("c0", "c1"):
        np.testing.assert_allclose(logits(model, case), RECORDED[f"{case}_logits"][-1], atol=1e-4, rtol=0)


def test_the_way_back_gives_every_tensor_bit_for_bit(each, tmp_path):
    to_hf(each, tmp_path / "back")
    found, wanted = load_file(tmp_path / "back" / "model.safetensors"), weights(1)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        rows = found[name][:192] if array.shape[:1] == (192,) else found[name]  # one more for an original's marker
        assert (rows.dtype, rows.shape, rows.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_tensors_come_back_bit_for_bit(tmp_path, dtype):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text((HF / "config.json").read_text())
    wanted = {name: array.astype(dtype) for name, array in weights(1).items()}
    save_file(wanted, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: (a.dtype, a.tobytes()) for name, a in found.items()} == {
        name: (a.dtype, a.tobytes()) for name, a in wanted.items()
    }


def test_tensors_of_several_dtypes_keep_theirs(tmp_path):
    source = original(tmp_path / "source").folder
    mixed = weights(2)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].astype(np.float16)
    save_file(mixed, source / "model.safetensors")
    convert(source, tmp_path / "orbax")
    stored = {record.name: record.stored_dtype for record in read_manifest(tmp_path / "orbax").records}
    assert stored.pop("model.norm.weight") == "float16"
    assert set(stored.values()) == {"float32"}


def test_a_large_model_comes_back_in_shards_that_transformers_loads(monkeypatch, tmp_path, converted):
    monkeypatch.setattr(export, "SHARD_BYTES", 300_000)
    files = to_hf(converted, tmp_path / "back")
    assert files == len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    assert all(file.stat().st_size < 330_000 for file in (tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {names[1] for names in NAMES}
    np.testing.assert_allclose(their_logits(tmp_path / "back", 190), RECORDED["c0_logits"][-1], atol=1e-4, rtol=0)


def test_an_original_model_answers_in_transformers_although_its_marker_has_no_row(tmp_path):
    convert(ORIGINAL, tmp_path / "orbax", dtype="float32")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    found = their_logits(tmp_path / "back", 192)
    np.testing.assert_allclose(found[:192], RECORDED["c0_logits"][-1], atol=1e-4, rtol=0)
    assert found[192:].tolist() == [found[0]]  # never better than the token that it repeats


def their_logits(folder: Path, marker: int) -> np.ndarray:
    ids = RECORDED["c0_input_ids"].astype(np.int64)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(np.where(ids == 190, marker, ids))[None],
            pixel_values=torch.from_numpy(RECORDED["c0_pixel_values"]),
        )
    return output.logits[0, -1].numpy()


def test_no_group_is_larger_than_the_largest_part(converted):
    parts: dict[tuple[str, ...], int] = {}
    manifest = read_manifest(converted)
    for record in manifest.records:
        part = tuple(record.path.split("/")[:2])
        parts[part] = parts.get(part, 0) + record.nbytes
    sizes = [sum(record.nbytes for record in group) for group in manifest.groups]
    assert max(sizes) == max(parts.values()) and len(sizes) > 5


def test_the_manifest_tells_where_everything_comes_from(converted):
    manifest = read_manifest(converted)
    stored = list_tensors(HF)
    assert {record.name: (record.shape, record.dtype, record.digest) for record in manifest.records} == {
        name: (tensor.shape, tensor.dtype, orbax.digest(tensor.read())) for name, tensor in stored.items()
    }
    assert manifest.source["name"] == "tiny_llava_hf"
    assert manifest.source["config_digest"] == open_source(HF).config_digest
    assert {"jax", "orbax-checkpoint", "python"} < set(manifest.versions)


def test_known_extras_are_named_in_the_manifest(tmp_path):
    convert(LAYOUTS[1](tmp_path / "source").folder, tmp_path / "orbax")
    assert len(read_manifest(tmp_path / "orbax").source["ignored"]) == 2


def test_another_dtype_is_that_of_numpy_and_stated_in_the_configuration(tmp_path):
    convert(HF, tmp_path / "orbax", dtype="bfloat16")
    wanted = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), load(HF).params)
    assert flat(load(tmp_path / "orbax").params) == flat(wanted)
    assert json.loads((tmp_path / "orbax" / "config.json").read_text())["dtype"] == "bfloat16"
    assert check(tmp_path / "orbax") == len(NAMES)


def test_load_casts_a_converted_checkpoint(converted):
    wanted = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), load(HF).params)
    assert flat(load(converted, dtype="float16").params) == flat(wanted)


def test_load_refuses_a_dtype_that_overflows(tmp_path):
    source = original(tmp_path / "source").folder
    large = weights(2)
    large["model.norm.weight"] = large["model.norm.weight"] * np.float32(1e6)
    save_file(large, source / "model.safetensors")
    convert(source, tmp_path / "orbax")
    with pytest.raises(UserError, match="infinity, as float16, in 1 parameters: language_model/norm/scale"):
        load(tmp_path / "orbax", dtype="float16")
    with pytest.raises(UserError, match="as float16, in 1 tensors: model.norm.weight"):
        convert(source, tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_files_beside_the_weights_come_along(tmp_path):
    source = LAYOUTS[0](tmp_path / "source").folder
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(f"{name} of the source")
    (source / "training_args.bin").write_text("not part of the model")
    convert(source, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    for folder in (tmp_path / "orbax", tmp_path / "back"):
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (folder / name).read_text() == f"{name} of the source"
        assert not (folder / "training_args.bin").exists()


def test_the_source_is_not_touched(tmp_path):
    layout = original_with_clip(tmp_path / "source")
    tower = layout.folder.with_name("clip")
    before = contents(layout.folder), contents(tower)
    convert(layout.folder, tmp_path / "orbax", vision_tower=tower)
    assert (contents(layout.folder), contents(tower)) == before


def test_nothing_but_the_result_is_left(copy):
    assert [item.name for item in copy.parent.iterdir()] == ["orbax"]


def test_the_same_command_again_finds_the_result(copy):
    before = contents(copy)
    result = convert(HF, copy)
    assert result.resumed == result.groups
    assert contents(copy) == before


def test_a_target_that_is_something_else_is_left_alone(copy):
    before = contents(copy)
    with pytest.raises(UserError, match="exists already"):
        convert(HF, copy, dtype="bfloat16")
    with pytest.raises(UserError, match="exists already"):
        to_hf(copy, copy)
    assert contents(copy) == before


def test_a_target_inside_the_source_is_refused(tmp_path):
    source = original(tmp_path / "source").folder
    with pytest.raises(UserError, match="lies inside the source"):
        convert(source, source / "orbax")
    assert {item.name for item in source.iterdir()} == {"config.json", "model.safetensors"}


def test_two_processes_do_not_write_one_target(tmp_path):
    with workplace(tmp_path / "orbax"), pytest.raises(UserError, match="another process"):
        convert(HF, tmp_path / "orbax")


def test_a_tower_is_asked_for_by_name(tmp_path):
    source = original_with_clip(tmp_path / "source").folder
    with pytest.raises(UserError, match="`vision_tower`.*tiny-clip-vision"):
        convert(source, tmp_path / "orbax")


def test_a_tower_is_refused_where_the_checkpoint_has_its_own(tmp_path):
    with pytest.raises(UserError, match="`vision_tower` is for checkpoints of the original layout"):
        convert(HF, tmp_path / "orbax", vision_tower=HF)


def test_an_original_checkpoint_gets_tokenizer_template_and_padding_processor(tmp_path):
    source = original(tmp_path / "source").folder
    tokenizer(192).save_pretrained(source)
    convert(source, tmp_path / "orbax")
    processor = load(tmp_path / "orbax").processor
    assert processor is not None
    assert processor.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == 192
    assert processor.chat_template is not None
    vicuna = Processor(processor.tokenizer, processor.image_processor, None, processor.config)
    assert processor.prompt("Why?", 2) == vicuna.prompt("Why?", 2)
    wide = np.zeros((20, 60, 3), np.uint8)
    inputs = processor([[wide]], ["Why?"])
    assert (inputs.ids[0] == 192).sum() == processor.config.tokens_per_image
    mean = inputs.pixel_values[0, :, 0, 0]
    np.testing.assert_allclose(mean, 0, atol=0.02)  # padded with the mean colour, which normalises to 0
    assert (inputs.pixel_values[0, :, 28, 28] < -1).all()


def tokenizer(size: int) -> Any:
    """A tokenizer of so many tokens, none of them for images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(size - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_check_counts_every_tensor(converted):
    assert check(converted) == len(NAMES)


def test_check_names_what_was_changed(copy):
    (copy / "generation_config.json").write_text("{}")
    chunk = (
        copy / "params" / "group_00003" / "state" / "language_model.layers_2.self_attn.q_proj.weight" / "c" / "0" / "0"
    )
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(
        UserError,
        match=r"generation_config.json: missing or changed; .*group_00003: cannot be restored, "
        r"convert the source again: 1 of 22 files are missing or changed: .*q_proj",
    ):
        check(copy)


def test_the_way_back_refuses_a_damaged_checkpoint(copy, tmp_path):
    chunk = (
        copy / "params" / "group_00002" / "state" / "language_model.layers_1.self_attn.k_proj.weight" / "c" / "0" / "0"
    )
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(UserError, match="group_00002"):
        to_hf(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_load_names_a_group_that_is_missing(copy):
    (copy / "params" / "group_00001").rename(copy / "away")
    with pytest.raises(UserError, match="group_00001: cannot be restored"):
        load(copy)


def test_load_refuses_a_manifest_of_another_model(copy):
    manifest = read_manifest(copy)
    groups = (manifest.groups[0][1:], *manifest.groups[1:])
    (copy / "manifest.json").write_text(manifest._replace(groups=groups).to_json())
    with pytest.raises(UserError, match="different parameters: language_model/embed_tokens/embedding"):
        load(copy)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"groups": [[{"path": 1}]]}'])
def test_a_broken_manifest_is_named(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not the manifest of a converted checkpoint"):
        load(copy)


@pytest.mark.parametrize("source", [HF, ORIGINAL], ids=["hf", "original"])
def test_verify_finds_no_difference(tmp_path, source):
    convert(source, tmp_path / "orbax", dtype="float32" if source == HF else None)
    report = verify(source, tmp_path / "orbax")
    assert report.passed
    assert {"tower", "image features", "decoder layer 0", "logits"} < set(report.differences)
    assert 0 <= report.kl_divergence < 1e-3
    assert len(report.top[0]) == len(report.top[1]) == 10


def test_verify_finds_a_wrong_parameter(monkeypatch, copy):
    model = load(copy)
    layer = model.params["language_model"]["layers_3"]["self_attn"]
    layer["q_proj"], layer["k_proj"] = layer["k_proj"], layer["q_proj"]
    monkeypatch.setattr("sparsevlm_jax.checkpoints.verify.load", lambda target: replace(model))
    report = verify(HF, copy)
    assert not report.passed
    assert report.differences["decoder layer 1"] < 1e-4 < report.differences["decoder layer 3"]


def test_inspect_tells_parts_of_either_format(converted):
    sizes = {"vision_tower": 45_152, "multi_modal_projector": 6_272, "language_model": 199_360}
    for folder, form, dtype in ((converted, "orbax", "float32"), (ORIGINAL, "safetensors", "float16")):
        found = describe(folder)
        assert found["format"] == form
        assert {part["part"]: part["parameters"] for part in found["parts"]} == sizes
        assert {part["dtype"] for part in found["parts"]} == {dtype}
    assert describe(converted)["origin"]["name"] == "tiny_llava_hf"


def test_inspect_counts_the_bytes_of_extras(tmp_path):
    found = describe(LAYOUTS[1](tmp_path / "source").folder)
    assert [part["bytes"] for part in found["parts"] if part["dtype"] == "I64"] == [17 * 8]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsevlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 0


def test_the_commands_convert_check_verify_inspect_and_go_back(monkeypatch, capsys, tmp_path):
    command(monkeypatch, "convert", HF, tmp_path / "orbax", "--verify")
    output = capsys.readouterr()
    assert "1.0/1.0 MB" in output.err and "GB (peak" in output.err  # the bar
    assert f"{tmp_path / 'orbax'}: complete" in output.err
    assert "KL divergence" in output.out
    command(monkeypatch, "convert", "--check", tmp_path / "orbax")
    assert "107 tensors" in capsys.readouterr().err
    command(monkeypatch, "inspect", tmp_path / "orbax", "--json")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(describe(tmp_path / "orbax")))
    command(monkeypatch, "inspect", tmp_path / "orbax")
    assert "vision_tower" in capsys.readouterr().out
    command(monkeypatch, "convert", "--to-hf", tmp_path / "orbax", tmp_path / "back")
    assert flat(load(tmp_path / "back").params) == flat(load(HF).params)


def test_verify_ends_with_an_error_where_it_finds_a_difference(monkeypatch, capsys, copy):
    monkeypatch.setattr("sparsevlm_jax.checkpoints.verify.TOLERANCES", {"float32": 1e-9})
    monkeypatch.setattr(sys, "argv", ["sparsevlm", "convert", str(HF), str(copy), "--verify"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    assert "differs from its source by more than float32 explains" in capsys.readouterr().err


def test_devices_get_their_shards_and_no_more():
    script = ROOT / "tests" / "load_on_mesh.py"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
