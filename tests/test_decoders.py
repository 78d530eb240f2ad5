"""Decoders and towers of other model types inside LLaVA, against transformers: what each adds to CLIP and Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlavaForConditionalGeneration
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from sparsevlm_jax import Model, Sparsity, embed, load, make_plan, prefill
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.api import generate_ids
from sparsevlm_jax.ops.layers import RMSNorm
from tests import models
from tests.hf import tiny_llava

SIZE, NEW = 364, 16  # 676 visual tokens between words
WORDS = ((35, 21), (4, 30))  # of each row, before and after its image
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
MODELS: dict[str, dict[str, Any]] = {
    "llama3 rope": {"decoder": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "linear rope": {"decoder": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn": {
        "decoder": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "mistral": {"decoder": "mistral", "kv_heads": 2, "sliding_window": None, "head_dim": 32},
    "qwen2": {"decoder": "qwen2", "kv_heads": 2},
    "qwen2 tied": {"decoder": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"decoder": "qwen3", "kv_heads": 2, "head_dim": 32},
    "gemma": {"decoder": "gemma", "kv_heads": 2, "head_dim": 32},
    "phi3": {"decoder": "phi3", "kv_heads": 2, "pad_token_id": 0},
    "interleave": {
        "decoder": "qwen2",
        "kv_heads": 2,
        "tower": "siglip_vision_model",
        "image_size": 384,  # 27 patches and 6 pixels per side
        "top": {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    },
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "model"
    return tiny_llava(path, **{"layers": 2, "image_size": SIZE, "processor": False, **MODELS[request.param]})


@pytest.fixture(scope="module")
def ours(folder: Path) -> Model:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(folder).eval()


def prompts(config: ModelConfig, rows: int = len(WORDS)) -> tuple[list[np.ndarray], np.ndarray]:
    """Ids of each row, and an image for each."""
    random, side = np.random.default_rng(3), config.vision.image_size
    image = np.full(config.tokens_per_image, config.image_token_id)
    ids = [
        np.concatenate([random.integers(0, 250, before), image, random.integers(0, 250, after)]).astype(np.int32)
        for before, after in WORDS[:rows]
    ]
    return ids, random.normal(0, 1, (rows, 3, side, side)).astype(np.float32)


def torch_inputs(row: np.ndarray, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(row.astype(np.int64))[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.from_numpy(pixels)[None]}


def test_answers_are_those_of_transformers(ours: Model, theirs: Any) -> None:
    ids, pixels = prompts(ours.config)
    dense: Any = {"sparsity": Sparsity.dense(), "max_new_tokens": NEW, "end_tokens": ()}
    found = generate_ids(ours.params, ours.config, ids, pixels, **dense)
    for tokens, row, image in zip(found.tokens, ids, pixels, strict=True):
        with torch.no_grad():
            answer = theirs.generate(**torch_inputs(row, image), max_new_tokens=NEW, do_sample=False)
        assert tokens == answer[0, len(row) :].tolist()
        assert len(tokens) == NEW


def test_a_pruned_run_answers_with_shorter_caches(ours: Model) -> None:
    ids, pixels = prompts(ours.config, 1)
    pruned: Any = {"sparsity": Sparsity.v15(keep_at=[(0, 600)]), "max_new_tokens": NEW, "end_tokens": ()}
    assert len(generate_ids(ours.params, ours.config, ids, pixels, **pruned).tokens[0]) == NEW


def test_first_logits_are_those_of_transformers(ours: Model, theirs: Any) -> None:
    ids, pixels = prompts(ours.config)
    longest = max(map(len, ids))
    packed = np.stack([np.pad(row, (0, longest - len(row))) for row in ids])
    plan = make_plan(Sparsity.dense(), ours.config, ours.config.tokens_per_image)

    def first_logits(params: Any, rows: Any, lengths: Any, images: Any) -> Any:
        prompt = embed(params, rows, lengths, images, ours.config)
        return prefill(params, prompt, ours.config, plan, max_new_tokens=0)[0]

    run: Any = jax.jit(first_logits, compiler_options=models.QUICK)
    logits = run(ours.params, packed, np.asarray([len(row) for row in ids], np.int32), pixels)
    for found, row, image in zip(logits, ids, pixels, strict=True):
        with torch.no_grad():
            expected = theirs(**torch_inputs(row, image)).logits[0, -1].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
        assert expected.std() > 0.5


def test_a_conversion_and_back_keeps_every_bit(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    kept = {_plain(name): tensor for name, tensor in before.items() if ".head." not in name}
    assert {_plain(name) for name in after} == {*kept}
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, kept[_plain(name)])


def _plain(name: str) -> str:
    """A tensor's name without what writers spell differently."""
    return ".".join(part for part in name.split(".") if part not in ("model", "vision_model", "language_model"))


def test_gemmas_norm_rounds_once_behind_its_scale() -> None:
    """Llama's rounds before it, too: only 16 bit shows the difference."""
    x, scale = (np.random.default_rng(i).normal(size=size) for i, size in enumerate([(4, 64), (64,)]))
    theirs = GemmaRMSNorm(64, eps=1e-6).to(torch.bfloat16)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(scale))
        expected = theirs(torch.from_numpy(x).to(torch.bfloat16)).float().numpy()
    params = {"params": {"scale": jnp.asarray(scale, jnp.bfloat16)}}
    found: Any = RMSNorm(1e-6, offset=True).apply(params, jnp.asarray(x, jnp.bfloat16))
    np.testing.assert_array_equal(found.astype(jnp.float32), expected)


def test_a_prompt_longer_than_the_window_is_refused(tmp_path: Path) -> None:
    folder = tiny_llava(
        tmp_path / "model", layers=1, image_size=SIZE, processor=False, decoder="mistral", sliding_window=512
    )
    model = load(folder)
    assert model.config.text.max_position_embeddings == 512
    ids, pixels = prompts(model.config, 1)
    with pytest.raises(UserError, match="732 tokens.*more than the model's sliding window of 512"):
        generate_ids(
            model.params, model.config, ids, pixels, sparsity=Sparsity.dense(), max_new_tokens=1, end_tokens=()
        )
