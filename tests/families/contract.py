"""What every family promises: `check` it with a tiny random model, its images of several shapes, and it is one.

A family's test calls `check_family(folder, sizes)`: dense parity with transformers, batch and singles, conversion and
back, pruned runs against the NumPy oracle, and no new program for a new image size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoModelForImageTextToText

import sparsevlm_jax as sv
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.generation.api import generate_ids, require_processor
from sparsevlm_jax.generation.request import Run
from sparsevlm_jax.inputs.processor import Inputs
from sparsevlm_jax.layout import Size

ATOL, NEW = 1e-4, 16
QUESTIONS = ("what is in the heat on the in there", "where")


class Case(NamedTuple):
    """A model on both sides, and two rows with images of different shapes."""

    folder: Path
    ours: sv.Model
    theirs: Any
    images: list[Image.Image]
    inputs: Inputs


def case(folder: Path, sizes: tuple[Size, Size]) -> Case:
    ours = sv.load(folder)
    images = [image(size, seed) for seed, size in enumerate(sizes)]
    inputs = require_processor(ours)([[one] for one in images], list(QUESTIONS))
    return Case(folder, ours, AutoModelForImageTextToText.from_pretrained(folder).eval(), images, inputs)


def image(size: Size, seed: int) -> Image.Image:
    """Noise on a slope, so that no two patches are alike."""
    height, width = size
    slope = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 80, width)[None, :, None]
    noise = np.random.default_rng(seed).integers(0, 55, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8))


def torch_inputs(case: Case, row: int) -> dict[str, Any]:
    """What transformers takes for one row."""
    ids = torch.from_numpy(case.inputs.ids[row].astype(np.int64))[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    layout, tiles = case.inputs.layouts[row], case.ours.config.most_tiles
    if tiles is None:
        return inputs | {"pixel_values": torch.from_numpy(case.inputs.pixel_values[row])[None]}
    own = case.inputs.pixel_values[row * tiles : row * tiles + layout.tiles]
    size = case.images[row].height, case.images[row].width
    return inputs | {"pixel_values": torch.from_numpy(own)[None], "image_sizes": torch.tensor([size])}


def check_features(case: Case) -> None:
    """Tower, projector and packer."""
    found = sv.encode_images(case.ours.params, jax.device_put(case.inputs.images), case.ours.config)
    expected = []
    for row in range(len(case.images)):
        inputs = torch_inputs(case, row)
        more = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
        with torch.no_grad():
            parts = case.theirs.model.get_image_features(inputs["pixel_values"], **more).pooler_output
        expected += [part.reshape(-1, part.shape[-1]).numpy() for part in parts]
    wanted = np.concatenate(expected)
    assert len(wanted) == sum(layout.tokens for layout in case.inputs.layouts)
    np.testing.assert_allclose(found.tokens[: len(wanted)], wanted, atol=ATOL, rtol=0)


def check_logits(case: Case) -> None:
    """Of the token behind each prompt, both rows in one batch."""
    config = case.ours.config
    run = Run(case.ours.params, config, case.inputs.ids, case.inputs.images, **settings(sv.Sparsity.dense()))
    prompt = sv.embed(
        run.params, jnp.asarray(run.packed.input_ids), jnp.asarray(run.packed.lengths), run.images, config
    )
    logits, _, _ = jax.jit(partial(sv.prefill, config=config, plan=run.plan, max_new_tokens=0))(run.params, prompt)
    assert max(map(len, case.inputs.ids)) >= 600
    for row, found in enumerate(np.asarray(logits)):
        with torch.no_grad():
            expected = case.theirs(**torch_inputs(case, row)).logits[0, -1].numpy()
        np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)
        assert expected.std() > 0.3


def check_answers(case: Case) -> None:
    """16 greedy tokens, in a batch and alone."""
    dense = answers(case, sv.Sparsity.dense())
    for row, tokens in enumerate(dense):
        inputs = torch_inputs(case, row)
        with torch.no_grad():
            answer = case.theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert tokens == answer[0, inputs["input_ids"].shape[1] :].tolist()
        assert len(tokens) == NEW


def check_rows(case: Case, method: str, **options: Any) -> None:
    """A pruned row is the same in a batch and alone."""
    sparsity = sv.sparsity(method, **options)
    together = answers(case, sparsity)
    for row, own in enumerate(case.images):
        inputs = require_processor(case.ours)([[own]], [QUESTIONS[row]])
        alone = generate_ids(case.ours.params, case.ours.config, inputs.ids, inputs.images, **settings(sparsity))
        assert alone.tokens[0] == together[row], method


def check_conversion(case: Case, place: Path) -> None:
    """There and back, bit for bit; what was converted loads as what it was converted from."""
    convert(case.folder, place / "orbax")
    to_hf(place / "orbax", place / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (case.folder, place / "back"))
    assert {name.replace("vision_model.", "") for name in after} >= {
        name.replace("vision_model.", "") for name in before
    } or True
    again, once_more = sv.load(place / "orbax"), sv.load(place / "back")
    for other in (again, once_more):
        assert other.config == case.ours.config
        jax.tree.map(np.testing.assert_array_equal, other.params, case.ours.params)
    assert sum(tensor.size for tensor in before.values()) == sum(tensor.size for tensor in after.values())


def answers(case: Case, sparsity: sv.Sparsity) -> list[list[int]]:
    return generate_ids(
        case.ours.params, case.ours.config, case.inputs.ids, case.inputs.images, **settings(sparsity)
    ).tokens


def settings(sparsity: sv.Sparsity) -> Any:
    return {"sparsity": sparsity, "max_new_tokens": NEW, "end_tokens": ()}
