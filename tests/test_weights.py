"""The weight table: names of every layout, both directions, and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sparsevlm_jax import LlavaConfig, tiny
from sparsevlm_jax.checkpoints.assign import all_finite, assign
from sparsevlm_jax.checkpoints.safetensors import Tensor, list_tensors
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.llava import NAMES
from sparsevlm_jax.models.names import Entry, Table
from sparsevlm_jax.models.parameters import abstract_params

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = json.loads((GOLDEN / "tiny_llava_key_layouts.json").read_text())  # [5.x, 4.x, original] of every tensor
TINY = tiny()
UNUSUAL = replace(
    TINY,
    text=replace(
        TINY.text,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=True,
        tie_word_embeddings=True,
        num_key_value_heads=2,
    ),
    projector_bias=False,
)
HARMLESS = (
    "model.layers.3.self_attn.rotary_emb.inv_freq",
    "language_model.model.rotary_emb.inv_freq",
    "vision_tower.vision_model.embeddings.position_ids",
    "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
)


def entries(of: LlavaConfig = TINY) -> dict[str, Entry]:
    return NAMES.entries(abstract_params(of, np.dtype(np.float32)))


def unread(shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
    def read() -> np.ndarray:
        raise AssertionError("names and shapes are checked without reading")

    return Tensor(Path("model.safetensors"), dtype, shape, read)


def complete_checkpoint() -> dict[str, Tensor]:
    return {name: unread(entry.shape) for name, entry in entries().items()}


@pytest.mark.parametrize("layout", [0, 1, 2], ids=["transformers 5", "transformers 4", "original"])
def test_every_name_of_a_layout_has_one_canonical_name(layout):
    assert [NAMES.canonical(names[layout]) for names in LAYOUTS] == [names[1] for names in LAYOUTS]


def test_names_of_the_model_that_transformers_builds_are_known():
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(GOLDEN / "tiny_llava_hf"))
    names = [NAMES.canonical(name) for name in model.state_dict()]
    assert sorted(str(name) for name in names) == sorted(entries())


def test_a_tower_of_its_own_fills_the_tower_and_nothing_else():
    tower = {name for name in entries() if name.startswith("vision_tower.")}
    alone = {name.replace("vision_tower.vision_model.", "vision_model.") for name in tower}
    assert {NAMES.canonical(name) for name in alone} == tower


@pytest.mark.parametrize("of", [TINY, UNUSUAL], ids=["as published", "biases, tied"])
def test_every_parameter_has_a_name_of_its_own(of):
    leaves = jax.tree.leaves(abstract_params(of, np.dtype(np.float32)))
    assert len(entries(of)) == len(leaves) == len({entry.path for entry in entries(of).values()})


def test_every_name_of_the_table_is_its_own_canonical_name():
    assert all(NAMES.canonical(name) == name for name in entries() | entries(UNUSUAL))


@pytest.mark.parametrize("folder", ["tiny_llava_hf", "tiny_llava_original"])
def test_shapes_are_those_of_the_stored_tensors(folder):
    stored = {NAMES.canonical(name): tensor.shape for name, tensor in list_tensors(GOLDEN / folder).items()}
    assert stored == {name: entry.shape for name, entry in entries().items()}


@pytest.mark.parametrize("name", HARMLESS)
def test_known_extras_are_harmless(name):
    known = NAMES.canonical(name)
    assert known is not None and NAMES.is_harmless(known)


def test_no_weight_counts_as_harmless():
    assert not any(NAMES.is_harmless(name) for name in entries() | entries(UNUSUAL))


@pytest.mark.parametrize(
    "name",
    [
        "model.image_newline",
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.model.layers.00.input_layernorm.weight",
        "language_model.model.layers.{i}.input_layernorm.weight",
        "model.model.norm.weight",
        "text_model.embeddings.position_ids",
        "model.layers.0.rotary_emb.inv_freq",
        "embeddings.position_ids",
    ],
)
def test_other_names_are_unknown(name):
    known = NAMES.canonical(name)
    assert known is None or known not in entries()


def test_a_name_that_two_rows_claim_is_an_error():
    twice = {first: (first, "x.") for first in ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2.")}
    with pytest.raises(ValueError, match="in more than one way"):
        Table(NAMES.rows, twice).canonical("x.weight")


def test_a_parameter_without_row_is_an_error():
    with pytest.raises(ValueError, match="language_model/gate"):
        NAMES.entries({"language_model": {"gate": jax.ShapeDtypeStruct((1,), jnp.float32)}})


def test_a_complete_checkpoint_is_paired_in_its_own_order():
    tensors = dict(reversed(complete_checkpoint().items())) | {name: unread((4,), "I64") for name in HARMLESS}
    pairs = assign(NAMES, entries(), tensors, "here")
    assert [name for name, _ in pairs] == list(reversed(entries()))
    assert all(name == entry.name for name, entry in pairs)


def test_everything_that_does_not_fit_is_in_one_message():
    tensors = complete_checkpoint()
    del tensors["language_model.model.norm.weight"], tensors["multi_modal_projector.linear_1.bias"]
    tensors["model.image_newline"] = unread((64,))
    tensors["model.layers.5.input_layernorm.weight"] = unread((64,))
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]
    tensors["multi_modal_projector.linear_1.weight"] = unread((32, 64))  # already transposed
    tensors["multi_modal_projector.linear_2.bias"] = unread((64,), "I8")
    with pytest.raises(UserError) as raised:
        assign(NAMES, entries(), tensors, "here")
    assert str(raised.value).split(": ", 2)[:2] == ["here", "tensors do not fit the configuration"]
    for problem in (
        "2 missing: language_model.model.norm.weight, multi_modal_projector.linear_1.bias",
        "2 not part of this model: model.image_newline, model.layers.5.input_layernorm.weight",
        "1 there under two names: lm_head.weight (language_model.lm_head.weight)",
        "1 of another shape: multi_modal_projector.linear_1.weight is [32, 64], expected [64, 32]",
        "1 neither float32, bfloat16 nor float16: multi_modal_projector.linear_2.bias is I8",
    ):
        assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_long_list_is_cut_and_counted():
    with pytest.raises(UserError, match=r"107 missing: .* and 97 more$") as raised:
        assign(NAMES, entries(), {}, "here")
    assert str(raised.value).count(",") == 9


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_not_finite(dtype, value):
    assert not all_finite(np.asarray([[0.0, 1.0], [value, -2.0]], dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_and_smallest_numbers_are_finite(dtype):
    info = ml_dtypes.finfo(dtype)
    assert all_finite(np.asarray([info.max, info.min, info.smallest_subnormal, -0.0], dtype))
