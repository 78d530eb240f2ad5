"""A small random model that answers, and explanations of its answers, shared by the tests of `explain` and `demo`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

import sparsevlm_jax as sv
from sparsevlm_jax.checkpoints.load import GenerationDefaults
from sparsevlm_jax.explain.trace_run import Explanation, explain
from sparsevlm_jax.inputs.processor import Processor
from tests import models
from tests.hf import CHAT_TEMPLATE, image_processor, llama_tokenizer

SIDE, GRID = 112, 8
QUESTION = "what is on the table?"


@cache
def model(class_token: bool = False) -> sv.Model:
    """Six layers, 8 × 8 patches of 14 pixels, words of several tokens; no token ends an answer."""
    tokenizer, base = llama_tokenizer(), models.config(image_size=SIDE)
    config = replace(
        base,
        text=replace(base.text, vocab_size=320),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full" if class_token else "default",
    )
    processor = Processor(tokenizer, image_processor(SIDE), CHAT_TEMPLATE, config)
    return sv.Model(config, models.params(config), processor, GenerationDefaults((), 0), "small")


def processor() -> Processor:
    found = model().processor
    assert found is not None
    return found


def image(seed: int = 0) -> Image.Image:
    """Coloured noise, smooth enough to survive scaling."""
    pixels = np.random.default_rng(seed).integers(0, 256, (GRID, GRID, 3), np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def image_size(file: Path) -> tuple[int, int]:
    """Width and height."""
    with Image.open(file) as image:
        return image.size


@cache
def explained(
    method: str = "v1.5", images: int = 1, question: str = QUESTION, class_token: bool = False, seed: int = 0
) -> Explanation:
    """An explanation of two words of answer, by the method with settings that suit the model."""
    own = {"v1": {"scale": 2.0, "bias": 3.0}, "v2.0": {"heads": 2}}.get(method, {})
    shown = [image(seed + number) for number in range(images)]
    return explain(model(class_token), shown, question, sv.sparsity(method, **own), max_new_tokens=2)
