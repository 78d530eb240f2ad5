"""Decoders of other model types inside LLaVA, against transformers: what each adds to Llama's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlavaForConditionalGeneration

from sparsevlm_jax import Sparsity, embed, load, make_plan, prefill
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.api import generate_ids
from tests.hf import tiny_llava

SIZE, WORDS, NEW = 364, (35, 21), 8  # 676 visual tokens between words
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
DECODERS: dict[str, dict[str, Any]] = {
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
}


@pytest.fixture(scope="module", params=DECODERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("decoder") / "model"
    return tiny_llava(path, layers=2, image_size=SIZE, processor=False, **DECODERS[request.param])


def prompt(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    image = np.full(config.tokens_per_image, config.image_token_id)
    before, after = (random.integers(0, 250, count) for count in WORDS)
    ids = np.concatenate([before, image, after]).astype(np.int32)
    return ids, random.normal(0, 1, (1, 3, SIZE, SIZE)).astype(np.float32)


def test_answers_are_those_of_transformers(folder: Any) -> None:
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    ours = load(folder)
    ids, pixels = prompt(ours.config)
    inputs = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        answer = theirs.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            pixel_values=torch.from_numpy(pixels),
            max_new_tokens=NEW,
            do_sample=False,
        )[0, len(ids) :]
    for sparsity in (Sparsity.dense(), Sparsity.v15(keep_at=[(0, 600)])):
        found = generate_ids(
            ours.params, ours.config, [ids], pixels, sparsity=sparsity, max_new_tokens=NEW, end_tokens=()
        )
        assert len(found.tokens[0]) == NEW
        if sparsity.method == "dense":
            assert found.tokens[0] == answer.tolist()


def test_first_logits_are_those_of_transformers(folder: Any) -> None:
    ours, theirs = load(folder), LlavaForConditionalGeneration.from_pretrained(folder).eval()
    ids, pixels = prompt(ours.config)
    inputs = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        expected = theirs(input_ids=inputs, pixel_values=torch.from_numpy(pixels)).logits[0, -1].numpy()
    plan = make_plan(Sparsity.dense(), ours.config, ours.config.tokens_per_image, sum(WORDS))
    rows, lengths = jnp.asarray(ids[None]), jnp.asarray([len(ids)], jnp.int32)
    made = embed(ours.params, rows, lengths, jnp.asarray(pixels), ours.config)
    logits, _, _ = prefill(ours.params, made, ours.config, plan, max_new_tokens=0)
    np.testing.assert_allclose(logits[0], expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5


def test_a_conversion_and_back_keeps_every_bit(folder: Any, tmp_path: Any) -> None:
    convert(folder, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    kept = {name.removeprefix("model."): tensor for name, tensor in before.items()}
    assert len(after) >= len(kept)
    for tensor in kept.values():
        assert any(tensor.shape == other.shape and (tensor == other).all() for other in after.values())


def test_a_prompt_longer_than_the_window_is_refused(tmp_path: Any) -> None:
    folder = tiny_llava(
        tmp_path / "model", layers=1, image_size=SIZE, processor=False, decoder="mistral", sliding_window=512
    )
    model = load(folder)
    assert model.config.text.max_position_embeddings == 512
    ids, pixels = prompt(model.config)
    with pytest.raises(UserError, match="732 tokens.*context of 512"):
        generate_ids(
            model.params, model.config, [ids], pixels, sparsity=Sparsity.dense(), max_new_tokens=1, end_tokens=()
        )
