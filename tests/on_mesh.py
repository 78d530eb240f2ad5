"""Run by test_parallel.py with eight devices: answers on one device and on meshes of eight, as JSON.

python -m tests.on_mesh every FOLDER     one method, by all presets
python -m tests.on_mesh ways FOLDER      every way to ask, and methods that score each in their own way
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

import sparsevlm_jax as sv
from sparsevlm_jax.aot.hlo import parse
from sparsevlm_jax.aot.programs import Prompts, lowered
from sparsevlm_jax.bench.jax_side import JaxRunner
from sparsevlm_jax.bench.shapes import Cell, Side
from sparsevlm_jax.inputs.processor import Processor
from sparsevlm_jax.parallel.mesh import MeshShape, make_mesh

DEVICES, NEW = 8, 6
OUTPUTS_CUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # of which scales are cut, too
PRESETS = ("tensor=8", "data=8", "data=2,tensor=4")
QUESTIONS = ("what is in the heat", "where on the inn is it", "in what is that there on the heat in", "is he there")
METHODS = {
    "dense": sv.Sparsity.dense(),
    "v1": sv.sparsity("v1", layers=(0, 1), scale=1.5, bias=1.0),
    "v2.0": sv.sparsity("v2.0", heads=3),
    "pyramiddrop": sv.sparsity("pyramiddrop", layers=(0, 1), ratio=0.5),
    "vision": sv.sparsity("vision", keep=8),
    "random": sv.sparsity("random", layers=(0, 1), ratio=0.5),
}
Asked = Callable[[sv.Model], Any]


def in_numbers(self: Processor, ids: Sequence[int] | np.ndarray) -> str:
    """In place of text: what random weights say is hardly any."""
    return " ".join(map(str, ids))


def shown(model: sv.Model, rows: int) -> dict[str, Any]:
    """Images of two shapes in turn, and of a family with videos clips beside them."""
    random = np.random.default_rng(0)
    shapes = ((60, 130, 3), (70, 50, 3))
    images = [[random.integers(0, 255, shapes[row % 2], np.uint8)] for row in range(rows)]
    if model.config.video_token_id is None:
        return {"images": images}
    clips = [[random.integers(0, 255, (5, 60, 80, 3), np.uint8)] if row % 2 else [] for row in range(rows)]
    return {"images": images, "videos": clips, "frames": 3}


def generated(model: sv.Model, rows: int = DEVICES, **settings: Any) -> list[str]:
    questions = [QUESTIONS[row % len(QUESTIONS)] for row in range(rows)]
    return sv.generate(model, prompts=questions, max_new_tokens=NEW, **shown(model, rows), **settings)  # pyright: ignore


def in_batches(model: sv.Model) -> list[str]:
    found = sv.answer_all(model, shown(model, 4)["images"], QUESTIONS, batch_size=4, max_new_tokens=NEW)
    return [answer.text for _, answer in sorted(found)]


def streamed(model: sv.Model) -> str:
    (image, *_) = shown(model, 1)["images"]
    return "".join(sv.stream(model, image, QUESTIONS[0], max_new_tokens=NEW, temperature=0.7, seed=3))


def chatted(model: sv.Model, selection: str) -> list[str]:
    chat = sv.Chat(model, *shown(model, 1)["images"], selection=selection, max_new_tokens=NEW)
    return [chat.ask(question) for question in QUESTIONS[:2]]


def benched(mesh: str) -> list[Any]:
    """The benchmark's tokens, what its sides keep, and that every phase of its runs."""
    runner = JaxRunner(Cell("tiny", 2, 48, 16, "float32"), Side("jax", "v1.5", 8).on(mesh), NEW)
    tokens, seconds = runner.generate((1, NEW))
    followed, logits = runner.follow(2, tokens[:, :2])
    for phase in runner.phases().values():
        phase()
    return [tokens.tolist(), runner.selections(), followed.tolist(), logits.argmax(axis=-1).tolist(), len(seconds)]


def ways() -> dict[str, tuple[str, Asked]]:
    both, cut = PRESETS[2], "tensor=4"
    asked = {name: (both, partial(generated, rows=4, sparsity=sparsity)) for name, sparsity in METHODS.items()}
    asked |= {f"chat, {how}": (cut, partial(chatted, selection=how)) for how in ("again", "first")}
    return asked | {"in batches": (both, in_batches), "stream, sampled": (cut, streamed)}


def require_cut(params: Any, tensor: int) -> None:
    """Every device holds its part of the decoder's matrices, and whole copies of the rest."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [part.key for part in path]
        cut = leaf.ndim == 2 or names[-1] == "scale" and names[-2] in OUTPUTS_CUT
        parts = tensor if names[0] == "language_model" and cut else 1
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}, path


def collectives(config: sv.ModelConfig, shape: str) -> dict[str, dict[str, int]]:
    """Of the prefill and of the decoding loop, as XLA compiles them for these devices."""
    prompts = Prompts(DEVICES, (config.image_layout(config.fullest_image),), 20, 10)
    programs = lowered(config, sv.Sparsity.v15(), prompts, "float32", make_mesh(shape), "cpu")
    found = {"points": {"pruning": len(programs.plan.stages) - 1}}
    for name in ("start", "decode"):
        counts = found.setdefault(name, {})
        for each in parse(getattr(programs, name).compile().as_text()).instructions():
            if each.opcode.startswith(("all-", "reduce-scatter", "collective-")):
                counts[each.opcode] = counts.get(each.opcode, 0) + len(each.shapes)
    return found


def main(what: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any]
    assert jax.device_count() == DEVICES
    Processor.decode = in_numbers
    if what == "ways":
        alone, on_mesh = sv.load(folder), {shape: sv.load(folder, sharding=shape) for shape in (PRESETS[2], "tensor=4")}
        found = {name: [ask(alone), ask(on_mesh[shape])] for name, (shape, ask) in ways().items()}
        found["benchmark"] = [benched(""), benched(PRESETS[2])]
        eight = [sv.load(folder, quantize="int8", sharding=shape) for shape in (None, PRESETS[2])]
        require_cut(eight[1].params, MeshShape.parse(PRESETS[2]).tensor)
        found["eight bits"] = [generated(model) for model in eight]
        return found
    alone = generated(sv.load(folder))
    found = {}
    for shape in PRESETS:
        model = sv.load(folder, sharding=shape)
        require_cut(model.params, MeshShape.parse(shape).tensor)
        found[shape] = [alone, generated(model)]
    return found | {"collectives": collectives(model.config, PRESETS[0])}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
