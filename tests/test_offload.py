"""Towers kept on the host: the same answers, and no program of the decoder holds a tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import sparsevlm_jax as sv
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.request import GenerationRequest
from sparsevlm_jax.models.offload import is_offloaded, tower_on_device
from sparsevlm_jax.models.parameters import tree_bytes
from tests.hf import tiny_llava
from tests.on_mesh import in_numbers, shown

QUESTIONS = ["what is in the heat", "is he there"]
NEW = 4


@pytest.fixture(scope="module", params=["llava", "llava_next", "video_llava"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[sv.Model, sv.Model]:
    """A model as it always was, and with its tower on the host."""
    top = {"image_grid_pinpoints": [[56, 112], [112, 56]]} if request.param == "llava_next" else None
    folder = tiny_llava(tmp_path_factory.mktemp(request.param), family=request.param, layers=3, top=top)
    return sv.load(folder), sv.load(folder, offload_tower=True)


def asked(model: sv.Model) -> Any:
    return sv.generate(model, prompts=QUESTIONS, max_new_tokens=NEW, **shown(model, 2))  # pyright: ignore


def in_batches(model: sv.Model) -> Any:
    found = sv.answer_all(model, shown(model, 2)["images"], QUESTIONS, batch_size=2, max_new_tokens=NEW)
    return [answer.text for _, answer in sorted(found)]


def chatted(model: sv.Model) -> Any:
    chat = sv.Chat(model, *shown(model, 1)["images"], max_new_tokens=NEW)
    return [chat.ask(question) for question in QUESTIONS]


@pytest.mark.parametrize("ask", [asked, in_batches, chatted])
def test_answers_are_the_same(
    ask: Callable[[sv.Model], Any], pair: tuple[sv.Model, sv.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsevlm_jax.inputs.processor.Processor.decode", in_numbers)
    whole, apart = pair
    assert is_offloaded(apart.params) and not is_offloaded(whole.params)
    assert ask(apart) == ask(whole)
    assert is_offloaded(apart.params)  # and stays so


def test_the_tower_is_on_the_device_no_longer_than_it_is_used(pair: tuple[sv.Model, sv.Model]) -> None:
    _, apart = pair
    with tower_on_device(apart.params) as params:
        placed = [leaf for name, part in params.items() if name != "language_model" for leaf in jax.tree.leaves(part)]
        assert placed and all(isinstance(leaf, jax.Array) and not leaf.is_deleted() for leaf in placed)
        assert params["language_model"] is apart.params["language_model"]
    assert all(leaf.is_deleted() for leaf in placed)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(apart.params["language_model"]))


def test_the_prefill_takes_no_tower_by_xlas_account(pair: tuple[sv.Model, sv.Model]) -> None:
    taken = []
    for model in pair:
        inputs = model.processor([[image] for image, *_ in shown(model, 2)["images"]], QUESTIONS)  # pyright: ignore
        settings: Any = {"sparsity": "v1.5", "max_new_tokens": NEW, "end_tokens": ()}
        run = GenerationRequest(model.params, model.config, inputs.ids, inputs.images, **settings)
        run.prefill()
        (program,) = [made for (key, *_), made in run._programs._compiled.items() if "start" in str(key)]
        images = tree_bytes(run.images)
        taken.append(program.memory_analysis().argument_size_in_bytes - images)
    tower = tree_bytes({name: part for name, part in pair[0].params.items() if name != "language_model"})
    unused = taken[0] - taken[1]
    assert 0 < unused <= tower and unused > 0.8 * tower / (2 if pair[0].config.video_token_id else 1)


def test_a_mesh_and_a_tower_on_the_host_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`offload_tower` is for one device"):
        sv.load(tiny_llava(tmp_path, layers=2), sharding="tensor=1", offload_tower=True)
