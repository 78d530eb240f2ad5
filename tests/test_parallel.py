"""One model over several devices: presets, where parameters lie, what programs exchange, and the same answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import sparsevlm_jax as sv
from sparsevlm_jax.aot.programs import Prompts, lowered
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.cli import main
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.inputs.processor import Processor
from sparsevlm_jax.parallel.arrays import device_bytes, mesh_of, require_rows
from sparsevlm_jax.parallel.mesh import MeshShape, make_mesh
from sparsevlm_jax.parallel.rules import placement, require_divides, spec_of
from tests import models, two_processes
from tests.hf import tiny_llava
from tests.layouts import HF
from tests.on_mesh import in_numbers

ROOT = Path(__file__).parent.parent
LAYERS, HEADS = 3, 8
FAMILIES = {
    "llava": {},
    "vipllava": {"top": {"vision_feature_layer": [-2, -3, 1]}},
    "llava_next": {"top": {"image_grid_pinpoints": [[56, 112], [112, 56]]}},
    "video_llava": {},
}
PRESETS = ("tensor=8", "data=8", "data=2,tensor=4")
WAYS = (
    *("dense", "v1", "v2.0", "pyramiddrop", "vision", "random"),
    *("chat, again", "chat, first", "in batches", "stream, sampled", "benchmark", "eight bits"),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def on_mesh(what: str, family: str, place: Path) -> dict[str, Any]:
    """What tests/on_mesh.py finds about a tiny model of eight heads."""
    folder = place / family
    if not folder.exists():
        tiny_llava(folder, layers=LAYERS, heads=HEADS, kv_heads=HEADS, family=family, **FAMILIES[family])
    return json.loads(_run(8, "tests.on_mesh", what, str(folder)).communicate()[0].splitlines()[-1])


def _run(devices: int, module: str, *arguments: str) -> subprocess.Popen[str]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | flags, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("shape", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_devices_give_the_tokens_of_one(family: str, shape: str, checkpoints: Path) -> None:
    alone, together = on_mesh("every", family, checkpoints)[shape]
    assert len(alone) == 8 and len(set(alone)) > 3
    assert together == alone


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_gives_the_tokens_of_one_device(way: str, checkpoints: Path) -> None:
    found = on_mesh("ways", "llava", checkpoints)
    assert found.keys() == {*WAYS}
    alone, together = found[way]
    assert alone and together == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_programs_exchange_what_tensor_parallelism_needs(family: str, checkpoints: Path) -> None:
    """Two sums a layer, one of words, one of scores per pruning layer; logits, and features of shared images."""
    found = on_mesh("every", family, checkpoints)["collectives"]
    points = found["points"]["pruning"]
    assert points == 2
    assert found["start"] == {"all-reduce": 2 * LAYERS + 1 + points, "all-gather": 2}
    assert found["decode"] == {"all-reduce": 2 * LAYERS + 1, "all-gather": 1}


def test_two_processes_of_two_devices_each_answer_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo, tiny = tmp_path / "demo", tmp_path / "tiny"
    convert(demo_model.path(), demo, dtype="float32")
    convert(tiny_llava(tmp_path / "source", layers=2), tiny)
    wanted = {"demo": two_processes.demo_answers(sv.load(demo))}
    monkeypatch.setattr(Processor, "decode", in_numbers)
    wanted["tiny"] = two_processes.tiny_answers(sv.load(tiny))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    running = [_run(2, "tests.two_processes", port, str(number), str(demo), str(tiny)) for number in range(2)]
    try:
        found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    finally:
        for process in running:
            process.kill()
    assert len(wanted["demo"]) == 12
    assert found == [wanted, wanted]


def test_a_mesh_of_one_device_gives_the_same_tokens_and_logits() -> None:
    """The code of meshes with nothing to share: what it adds changes no bit."""
    config = models.config(layers=3)
    params, plan = models.params(config), sv.make_plan(sv.Sparsity.v15(), config, 16, 32)
    ids = np.concatenate([np.arange(1, 9), np.full(16, config.image_token_id), np.arange(20, 44)]).astype(np.int32)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 56, 56)).astype(np.float32)
    where = placement("tensor=1", config)
    cut = jax.tree_util.tree_map_with_path(lambda path, x: jax.device_put(x, where(_names(path), x.shape)), params)
    settings: Any = {"sparsity": sv.Sparsity.v15(), "max_new_tokens": 6, "end_tokens": ()}
    assert mesh_of(cut) is not None and mesh_of(params) is None and len(plan.stages) > 1
    alone, together = (sv.generate_ids(held, config, [ids, ids[1:]], pixels, **settings) for held in (params, cut))
    assert together.tokens == alone.tokens and together.visual_tokens == alone.visual_tokens


def _names(path: Any) -> tuple[str, ...]:
    return tuple(part.key for part in path)


def test_without_a_mesh_programs_hold_no_trace_of_one() -> None:
    config = sv.tiny()
    prompts = Prompts(2, (config.image_layout(config.fullest_image),), 20, 10)
    plain, on_one = (
        lowered(config, sv.Sparsity.v15(), prompts, "float32", where, "cpu")
        for where in (jax.devices()[0], make_mesh("tensor=1"))
    )
    for name in ("start", "decode"):
        assert not _about_meshes(getattr(plain, name).as_text())
        assert len(_about_meshes(getattr(on_one, name).as_text())) > config.text.num_hidden_layers


def _about_meshes(text: str) -> list[str]:
    """Lines that say how something is cut; jax's own random numbers say so of no mesh at all."""
    return [line for line in text.splitlines() if "sdy." in line and "@empty_mesh" not in line]


@pytest.mark.parametrize(
    "text, shape", [("tensor=4", (1, 4)), ("data=2", (2, 1)), ("data=2,tensor=4", (2, 4)), ("tensor=4,data=2", (2, 4))]
)
def test_presets_are_read_and_written(text: str, shape: tuple[int, int]) -> None:
    found = MeshShape.parse(text)
    assert (found.data, found.tensor, found.devices) == (*shape, shape[0] * shape[1])
    assert MeshShape.parse(str(found)) == found


@pytest.mark.parametrize(
    "text", ["", "4", "tensor", "tensor=0", "tensor=-1", "tensor=2,tensor=2", "model=2", "data=2,"]
)
def test_what_is_no_preset_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected tensor=N, data=N or both"):
        MeshShape.parse(text)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "6 attention heads, which tensor=4 does not divide"),
        ({"num_key_value_heads": 2}, "2 key-value heads, which tensor=4 does not divide"),
        ({"intermediate_size": 98}, "98 channels in its MLP, which tensor=4 does not divide"),
    ],
)
def test_a_decoder_that_comes_out_uneven_is_refused_with_both_numbers(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_divides(MeshShape(tensor=4), replace(sv.tiny().text, **sizes))


def test_too_few_devices_and_other_axes_are_refused() -> None:
    with pytest.raises(UserError, match=r'mesh="tensor=64" takes 64 devices, there are \d+ \(on a CPU XLA_FLAGS'):
        sv.load(HF, sharding="tensor=64")
    with pytest.raises(UserError, match=r"the mesh has axes \('x',\)"):
        sv.load(HF, sharding=jax.make_mesh((1,), ("x",)))


def _on_stand_ins(data: int, tensor: int, spec: PartitionSpec) -> dict[str, Any]:
    """A parameter on devices that are not there."""
    mesh = AbstractMesh((data, tensor), ("data", "tensor"))
    return {"weight": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, spec))}


def test_a_batch_that_comes_out_uneven_is_refused_with_both_numbers() -> None:
    params = _on_stand_ins(2, 2, PartitionSpec())
    require_rows(params, 4)
    with pytest.raises(UserError, match="a batch of 3 prompts, which data=2 of the mesh does not divide"):
        require_rows(params, 3)


def test_bytes_are_those_of_each_device() -> None:
    assert device_bytes(_on_stand_ins(2, 4, PartitionSpec(None, "tensor"))) == 8 * 4 * 4 // 4
    assert device_bytes(_on_stand_ins(2, 4, PartitionSpec())) == 8 * 4 * 4


@pytest.mark.parametrize("command", ["ask", "answer", "plan"])
def test_commands_say_what_is_wrong_with_a_mesh(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scene, questions = str(demo_model.samples()[0].image), tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "image": "scene.png", "text": "what?"}) + "\n")
    options = {
        "ask": ["--image", scene, "--question", "what?", "--mesh", "tensor=64"],
        "answer": [
            *("--questions", str(questions), "--images", str(tmp_path), "--answers", str(tmp_path / "a.jsonl")),
            *("--mesh", "tensor=x"),
        ],
        "plan": ["--model", "tiny", "--mesh", "tensor=2"],
    }
    monkeypatch.setattr("sys.argv", ["sparsevlm", command, *options[command]])
    with pytest.raises(SystemExit) as stop:
        main.main()
    out, err = capsys.readouterr()
    *notes, error = err.splitlines()
    assert stop.value.code == 2 and not out
    assert len(notes) == (command == "answer")  # which says that it asks the embedded model
    message = {
        "ask": '--mesh "tensor=64" takes 64 devices, there are',
        "answer": '--mesh "tensor=x": expected tensor=N, data=N or both',
        "plan": "--mesh tensor=2: has an effect with --compile-for only",
    }
    assert message[command] in error


def test_vocabularies_that_come_out_uneven_stay_whole() -> None:
    path = ("language_model", "lm_head", "weight")
    assert spec_of(path, (320, 64), 4) == PartitionSpec("tensor", None)
    assert spec_of(path, (321, 64), 4) == PartitionSpec()
