"""LLaVA-NeXT in the layout of its authors: the same model as in that of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import sparsevlm_jax as sv
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.describe import describe
from sparsevlm_jax.checkpoints.source import open_source
from sparsevlm_jax.checkpoints.verify import verify
from sparsevlm_jax.generation.api import require_processor
from tests.families.contract import image
from tests.hf import tiny_llava
from tests.layouts import original_next

CANVASES = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def tiny_next(folder: Path, **settings: Any) -> Path:
    top = {"image_grid_pinpoints": CANVASES}
    return tiny_llava(folder, family="llava_next", layers=2, kv_heads=2, top=top, **settings)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_next(tmp_path_factory.mktemp("next") / "hf")


def test_the_authors_layout_is_the_same_model(hf: Path, tmp_path: Path) -> None:
    source, tower = original_next(hf, tmp_path / "source")
    convert(source, tmp_path / "orbax", vision_tower=tower)
    ours, theirs = sv.load(tmp_path / "orbax"), sv.load(hf)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    shown = [image((50, 85), 0)]
    found, wanted = (require_processor(model)([shown], ["what is in there"]) for model in (ours, theirs))
    np.testing.assert_array_equal(found.ids[0], wanted.ids[0])
    np.testing.assert_array_equal(found.pixel_values, wanted.pixel_values)
    answers = [sv.generate(model, shown, "where", max_new_tokens=4) for model in (ours, theirs)]
    assert answers[0] == answers[1]
    assert {row["part"] for row in describe(source)["parts"]} >= {"vision_tower", "image_newline"}
    settings = json.loads((tmp_path / "orbax" / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "LlavaNextImageProcessor"
    assert settings["image_grid_pinpoints"] == CANVASES


def test_a_mistral_of_the_authors_has_no_window_and_its_own_prompt(tmp_path: Path) -> None:
    hf = tiny_next(tmp_path / "hf", decoder="mistral", sliding_window=None, rope_theta=1e6, max_position=8192)
    source, tower = original_next(hf, tmp_path / "source", "llava_mistral")
    assert json.loads((source / "config.json").read_text())["sliding_window"] is None
    convert(source, tmp_path / "orbax", vision_tower=tower)
    model = sv.load(tmp_path / "orbax")
    assert model.config == sv.load(hf).config
    assert model.config.text.max_position_embeddings == 8192 and not model.config.text.windowed
    assert require_processor(model).prompt("where", 1) == "[INST] <image>\nwhere [/INST]"


def test_a_tokenizer_of_chatml_gets_the_prompt_of_34b(hf: Path, tmp_path: Path) -> None:
    source, tower = original_next(hf, tmp_path / "source")
    tokenizer = require_processor(sv.load(hf)).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(source)
    convert(source, tmp_path / "orbax", vision_tower=tower)
    assert require_processor(sv.load(tmp_path / "orbax")).prompt("where", 1) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\nwhere<|im_end|><|im_start|>assistant\n"
    )


def test_the_sizes_of_the_published_tower_need_no_other_checkpoint(hf: Path, tmp_path: Path) -> None:
    source = original_next(hf, tmp_path / "source").folder
    with pytest.raises(sv.UserError, match="image_grid_pinpoints: 56 x 112 is not made of tiles of 336 x 336"):
        open_source(source)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mm_patch_merge_type": "spatial"}, 'mm_patch_merge_type is "spatial", expected "spatial_unpad"'),
        ({"image_aspect_ratio": "pad"}, 'image_aspect_ratio is "pad", expected "anyres"'),
        ({"mm_patch_merge_type": "flat"}, 'image_aspect_ratio is "anyres" without mm_patch_merge_type'),
        ({"model_type": "llava_qwen"}, 'model_type is "llava_qwen": of the original layout'),
        ({"mm_projector_type": "linear"}, 'mm_projector_type is "linear"'),
    ],
    ids=str,
)
def test_other_ways_to_lay_out_tiles_are_refused_by_name(
    hf: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    source, tower = original_next(hf, tmp_path / "source", **changed)
    with pytest.raises(sv.UserError, match=message):
        open_source(source, vision_tower=tower)


@pytest.mark.parametrize("layout", ["original", "hf without processor"])
def test_verify_finds_no_difference_in_tiles(hf: Path, tmp_path: Path, layout: str) -> None:
    source, tower = hf, None
    if layout == "original":
        source, tower = original_next(hf, tmp_path / "source")
    else:
        source = tiny_next(tmp_path / "bare", processor=False)
    convert(source, tmp_path / "orbax", vision_tower=tower)
    report = verify(source, tmp_path / "orbax", vision_tower=tower)
    assert report.passed
    assert {"tower", "image features", "decoder layer 0", "logits"} == set(report.differences)
    assert 0 <= report.kl_divergence < 1e-3


def test_verify_sees_a_newline_that_is_another(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(hf, tmp_path / "orbax")
    model = sv.load(tmp_path / "orbax")
    model.params["image_newline"] = model.params["image_newline"] + 1.0
    monkeypatch.setattr("sparsevlm_jax.checkpoints.verify.load", lambda target: model)
    report = verify(hf, tmp_path / "orbax")
    assert report.differences["tower"] < 1e-4 < report.differences["image features"]
