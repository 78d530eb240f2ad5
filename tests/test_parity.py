"""Dense LLaVA against transformers' LlavaForConditionalGeneration in float32, on prompts long enough for RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from sparsevlm_jax import Sparsity, embed, load, make_plan, prefill
from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.generation.api import generate_ids
from sparsevlm_jax.inputs.packing import pack
from sparsevlm_jax.models.stages import decoder_of
from tests.hf import tiny_llava

SIZE, NEW_TOKENS = 364, 16  # 26 × 26 patches: 676 visual tokens an image
# What a row is made of: runs of so many random words, and images.
CASES: dict[str, tuple[int | str, ...]] = {
    "one image": (35, "image", 21),
    "two images": (5, "image", 14, "image", 9),
    "text only": (650,),
}


class Row(NamedTuple):
    ids: np.ndarray
    pixels: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Pair:
    theirs: Any
    ours: Model


@pytest.fixture(scope="module", params=[4, 2], ids=["multi-head", "grouped-query"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("llava") / "model"
    tiny_llava(path, layers=3, kv_heads=request.param, image_size=SIZE, processor=False)
    return Pair(LlavaForConditionalGeneration.from_pretrained(path).eval(), load(path))


def row(name: str, config: ModelConfig) -> Row:
    random = np.random.default_rng(list(CASES).index(name))
    image = np.full(config.tokens_per_image, config.image_token_id)
    parts = [random.integers(0, 250, part) if isinstance(part, int) else image for part in CASES[name]]
    images = CASES[name].count("image")
    pixels = random.normal(0, 1, (images, 3, SIZE, SIZE)).astype(np.float32) if images else None
    return Row(np.concatenate(parts).astype(np.int32), pixels)


def their_inputs(row: Row) -> dict[str, Any]:
    pixels = {} if row.pixels is None else {"pixel_values": torch.from_numpy(row.pixels)}
    ids = torch.from_numpy(row.ids.astype(np.int64))[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def our_logits(model: Model, rows: list[Row]) -> np.ndarray:
    """Logits at every place of packed rows."""
    config = model.config
    packed = pack([row.ids for row in rows], config.image_token_id)
    images = [row.pixels for row in rows if row.pixels is not None]
    plan = make_plan(Sparsity.dense(), config, packed.visual, packed.text)

    @jax.jit
    def run(params: Any, ids: jax.Array, lengths: jax.Array, pixels: jax.Array | None) -> Any:
        prompt = embed(params, ids, lengths, pixels, config)
        last, _, trace = prefill(params, prompt, config, plan, trace=True, max_new_tokens=0)
        return last, decoder_of(params, config).logits(trace.hidden)

    pixels = jnp.asarray(np.concatenate(images)) if images else None
    last, logits = run(model.params, jnp.asarray(packed.input_ids), jnp.asarray(packed.lengths), pixels)
    ends = np.asarray(logits)[np.arange(len(rows)), packed.lengths - 1]
    np.testing.assert_allclose(last, ends, atol=1e-5, rtol=0)
    return np.asarray(logits)


def our_answers(model: Model, rows: list[Row]) -> list[list[int]]:
    images = [row.pixels for row in rows if row.pixels is not None]
    return generate_ids(
        model.params,
        model.config,
        [row.ids for row in rows],
        np.concatenate(images) if images else None,
        sparsity=Sparsity.dense(),
        max_new_tokens=NEW_TOKENS,
        end_tokens=(),
    ).tokens


@cache
def theirs(pair: Pair, name: str) -> tuple[np.ndarray, list[int]]:
    """Transformers' logits at every place of a row, and its greedy answer."""
    prompt = row(name, pair.ours.config)
    with torch.no_grad():
        logits = pair.theirs(**their_inputs(prompt)).logits[0].numpy()
        ids = pair.theirs.generate(**their_inputs(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)
    return logits, ids[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("name", CASES)
def test_prefill_logits_equal_those_of_transformers(pair: Pair, name: str) -> None:
    prompt = row(name, pair.ours.config)
    assert len(prompt.ids) >= 640
    logits, _ = theirs(pair, name)
    np.testing.assert_allclose(our_logits(pair.ours, [prompt])[0, : len(prompt.ids)], logits, atol=1e-4, rtol=0)
    assert logits.std() > 0.5  # logits near zero would agree whatever they are


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_those_of_transformers(pair: Pair, name: str) -> None:
    answer = theirs(pair, name)[1]
    assert len(answer) == NEW_TOKENS
    assert our_answers(pair.ours, [row(name, pair.ours.config)]) == [answer]


def test_a_batch_equals_its_rows_alone_in_transformers(pair: Pair) -> None:
    prompts = [row(name, pair.ours.config) for name in CASES]
    assert len({len(prompt.ids) for prompt in prompts}) == len(prompts)
    for ours, name, prompt in zip(our_logits(pair.ours, prompts), CASES, prompts, strict=True):
        np.testing.assert_allclose(ours[: len(prompt.ids)], theirs(pair, name)[0], atol=1e-4, rtol=0)
    assert our_answers(pair.ours, prompts) == [theirs(pair, name)[1] for name in CASES]
