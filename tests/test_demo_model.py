"""The demo model: a small random LLaVA in Hugging Face format, and the photograph."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from sparsevlm_jax import demo
from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.pictures import open_image
from sparsevlm_jax.processing import Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo.build(tmp_path_factory.mktemp("demo") / "model")


def digests(folder) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def inputs(folder):
    config = LlavaConfig.from_file(folder)
    processor = Processor.from_pretrained(folder, config)
    assert processor is not None
    return processor, processor([[demo.photo()]], ["What is in this picture?"])


def test_transformers_loads_it_without_missing_or_unexpected_keys(folder):
    from transformers import LlavaForConditionalGeneration

    load: Any = LlavaForConditionalGeneration.from_pretrained  # typed as if it returned the model alone
    model, found = load(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert model.config.text_config.rope_parameters["rope_theta"] == demo.LANGUAGE["rope_theta"]


def test_attention_of_the_question_prefers_some_visual_tokens(folder):
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    _, (ids, pixels) = inputs(folder)
    row = torch.from_numpy(ids[0][None]).long()
    with torch.no_grad():
        attentions = model(input_ids=row, pixel_values=torch.from_numpy(pixels), output_attentions=True).attentions
    visual = row[0] == model.config.image_token_id
    for attention in attentions:
        scores = attention[0, :, -1, visual].mean(0)
        assert scores.max() > 1.5 * scores.mean()


def test_picture_and_question_become_inputs(folder):
    processor, found = inputs(folder)
    assert found.pixel_values.shape == (1, 3, 96, 96)
    assert (found.ids[0] == processor.config.image_token_id).sum() == 144
    assert processor.decode(found.ids[0]).endswith("USER: \nWhat is in this picture? ASSISTANT:")


def test_every_token_is_printable(folder):
    processor, _ = inputs(folder)
    text = processor.decode(range(processor.config.text.vocab_size)).replace("\n", "")
    assert text.isascii() and text.isprintable()


def test_same_seed_gives_the_same_bytes(folder, tmp_path):
    assert digests(demo.build(tmp_path / "again")) == digests(folder)


def test_another_seed_gives_other_weights(folder, tmp_path):
    other = digests(demo.build(tmp_path / "other", seed=1))
    assert [name for name, digest in digests(folder).items() if other[name] != digest] == ["model.safetensors"]


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine: exists already"):
        demo.build(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"] and not list((tmp_path / "mine").iterdir())


def test_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        demo.build(tmp_path / "file" / "model")


def test_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_weights", lambda vocabulary, seed: {"x": np.zeros(1)}["y"])
    with pytest.raises(KeyError):
        demo.build(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_cached_model_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = demo.path()
    built = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder == tmp_path / "sparsevlm_jax" / f"demo-{demo.VERSION}"
    assert demo.path() == folder and (folder / "model.safetensors").stat().st_mtime_ns == built


def test_losing_the_race_to_build_is_fine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write = demo._write

    def slower(folder, seed):
        monkeypatch.setattr(demo, "_write", write)
        demo.path()  # another process builds it all in the meantime
        write(folder, seed)

    monkeypatch.setattr(demo, "_write", slower)
    folder = demo.path()
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_photo_is_a_photograph_of_modest_size():
    assert open_image(demo.photo()).size == (640, 427)
    assert demo.photo().stat().st_size < 200_000
