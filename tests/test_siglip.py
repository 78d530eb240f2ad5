"""SigLIP towers inside LLaVA, against transformers: hidden states, saliency, what a model keeps of them."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel

from sparsevlm_jax import LlavaConfig, Sparsity, encode_images, load, make_plan, sparsity
from sparsevlm_jax.checkpoints.assign import assign
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.checkpoints.safetensors import Tensor
from sparsevlm_jax.config import SiglipConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.explain.provenance import ABSENT
from sparsevlm_jax.explain.trace_run import explain
from sparsevlm_jax.models.llava import NAMES
from sparsevlm_jax.models.towers import tower_of
from sparsevlm_jax.models.towers.clip import _interpolate_positions
from sparsevlm_jax.models.towers.layers import resize_positions
from sparsevlm_jax.models.towers.siglip import look_of_all_patches
from sparsevlm_jax.ops.attention import target
from tests import hf

SIDE, PATCH = 62, 14  # four patches and 6 pixels per side, as 384 = 27 * 14 + 6
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_channels": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
CONFIG = SiglipConfig(**SIZES)
FULL = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
LOST = 'vision_feature_select_strategy is "default".*first patch is lost'


@pytest.fixture(scope="module")
def reference() -> SiglipVisionModel:
    torch.manual_seed(0)
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    model: Any = SiglipVisionModel(SiglipVisionConfig(**SIZES, **eager)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            wide = 2 if "q_proj" in name or "k_proj" in name else 1
            tensor.normal_(0, wide * max(tensor.shape[-1], 8) ** -0.5)
    return model


@pytest.fixture(scope="module")
def params(reference: SiglipVisionModel) -> dict[str, Any]:
    """Ours, moved by the table of names."""
    init = tower_of(CONFIG, (-1,)).init
    tree = {"vision_tower": jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 3, SIDE, SIDE)))["params"]}
    arrays = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    tensors = {name: Tensor(Path("x"), "float32", x.shape, lambda x=x: x) for name, x in arrays.items()}
    pairs = assign(NAMES, NAMES.entries(tree), tensors, "siglip")
    flat = {entry.path: jnp.asarray(arrays[name]) for name, entry in pairs}
    return traverse_util.unflatten_dict(flat)["vision_tower"]


def pixels(count: int = 2, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, side, side)).astype(np.float32)


@pytest.fixture(scope="module")
def theirs(reference: SiglipVisionModel) -> Any:
    with torch.no_grad():
        return reference(torch.from_numpy(pixels()), output_hidden_states=True, output_attentions=True)


def run(params: Any, layers: tuple[int, ...], image: np.ndarray) -> Any:
    return tower_of(CONFIG, layers).apply({"params": params}, jnp.asarray(image))


def siglip_llava(folder: Path, **settings: Any) -> Path:
    settings = {"image_size": SIDE, "processor": False, "layers": 2, "top": FULL, **settings}
    return hf.tiny_llava(folder, tower="siglip_vision_model", **settings)


@pytest.mark.parametrize("layers", [(-1,), (-2,), (0,), (-1, 2, 1)], ids=str)
def test_hidden_states_are_those_of_transformers(params: Any, theirs: Any, layers: tuple[int, ...]) -> None:
    found, _ = run(params, layers, pixels())
    expected = torch.cat([theirs.hidden_states[layer] for layer in layers], -1).numpy()
    assert found.shape == (2, 16, 32 * len(layers))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2])
def test_saliency_is_the_attention_that_a_patch_receives_in_the_last_layer_that_runs(
    params: Any, theirs: Any, layer: int
) -> None:
    _, found = run(params, (layer, 1), pixels())
    expected = theirs.attentions[layer].mean(dim=(1, 2)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.ptp(expected) > 0.01


def test_saliency_holds_the_attention_of_one_head_at_a_time() -> None:
    images, patches, heads = 2, 40, 6
    shape = jax.ShapeDtypeStruct((images, patches, heads, 4), jnp.float32)
    lengths = jax.ShapeDtypeStruct((images,), jnp.int32)
    text = jax.jit(look_of_all_patches).lower(shape, shape, lengths).as_text()
    sizes = {prod(map(int, dims.split("x"))) for dims in re.findall(r"tensor<(\d+(?:x\d+)*)x", text)}
    assert max(sizes) == images * patches * patches


def test_a_layer_that_is_not_the_last_is_not_asked_for_saliency(params: Any) -> None:
    with target("tpu"):  # whose attention is no loop
        text = jax.jit(lambda x: run(params, (-1,), x)).lower(pixels()).as_text()
    assert text.count("stablehlo.while") == 1


def test_positions_are_interpolated_as_clips_without_the_class_token(params: Any) -> None:
    table = params["position_embedding"]["embedding"]
    with_class_token = jnp.concatenate([table[:1], table])
    np.testing.assert_array_equal(resize_positions(table, 4, 3), _interpolate_positions(with_class_token, 4, 3)[1:])
    small = pixels(side=3 * PATCH)
    found, saliency = run(params, (0,), small)
    patches, _ = run(params | {"position_embedding": {"embedding": 0 * table}}, (0,), small)
    np.testing.assert_allclose(found - patches, jnp.broadcast_to(resize_positions(table, 4, 3), found.shape), atol=1e-6)
    assert saliency.shape == (2, 9)


@pytest.mark.parametrize(
    ("tower", "strategy", "tokens", "grid"),
    [
        ("clip_vision_model", "default", 16, 4),
        ("clip_vision_model", "full", 17, None),
        ("siglip_vision_model", "full", 16, 4),
        ("siglip_vision_model", "default", 15, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*first patch is lost")
def test_visual_tokens_are_those_of_transformers(
    tmp_path: Path, tower: str, strategy: str, tokens: int, grid: int | None
) -> None:
    top = {"vision_feature_select_strategy": strategy, "vision_feature_layer": [-1, -3]}
    folder = hf.tiny_llava(tmp_path / "model", layers=1, processor=False, tower=tower, top=top)
    model = load(folder)
    reference: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    image = pixels(side=56)
    with torch.no_grad():
        expected = reference.model.get_image_features(
            torch.from_numpy(image), vision_feature_layer=[-1, -3], vision_feature_select_strategy=strategy
        ).pooler_output
    found = encode_images(model.params, jnp.asarray(image), model.config)
    assert (model.config.tokens_per_image, model.config.image_grid) == (tokens, grid)
    assert found.saliency.shape == (2 * tokens,)
    np.testing.assert_allclose(found.tokens, torch.cat(list(expected)).numpy(), atol=1e-5)


def test_reading_a_siglip_model_that_loses_a_patch_warns_and_names_the_entry(tmp_path: Path) -> None:
    folder = siglip_llava(tmp_path / "model", top={"vision_feature_select_strategy": "default"})
    with pytest.warns(UserWarning, match=LOST) as warned:
        LlavaConfig.from_file(folder)
    assert len(warned) == 1 and str(folder / "config.json") in str(warned[0].message)


def test_a_siglip_model_that_keeps_all_patches_reads_without_a_warning(tmp_path: Path) -> None:
    model = load(siglip_llava(tmp_path / "model"))  # a warning is an error here
    assert model.config.vision == SiglipConfig(**{**SIZES, "num_hidden_layers": 3, "intermediate_size": 64})


@pytest.mark.parametrize(("method", "keep"), [("pool", 4), ("downsample", 9)])
def test_images_are_shrunk_by_both_ways(tmp_path: Path, method: str, keep: int) -> None:
    model = load(siglip_llava(tmp_path / "model"))
    plan = make_plan(sparsity(method, keep=keep), model.config, model.config.tokens_per_image)
    found = encode_images(model.params, jnp.asarray(pixels()), model.config, plan)
    assert len(found.tokens) == 2 * plan.visual_tokens
    assert np.isfinite(np.asarray(found.tokens)).all()


@pytest.mark.parametrize("entry", [("patch_size", 63), ("num_attention_heads", 5)])
def test_a_tower_without_patches_is_refused(entry: tuple[str, int]) -> None:
    with pytest.raises(UserError, match=f"vision_config.{entry[0]} is {entry[1]}"):
        SiglipConfig(**{**SIZES, entry[0]: entry[1]})


def test_a_pooling_head_is_left_out_and_the_way_back_says_so(tmp_path: Path) -> None:
    """A bare SigLIP brings one; no hidden state passes through it."""
    folder = siglip_llava(tmp_path / "model")
    headless = load(folder).params
    stored = load_file(folder / "model.safetensors")
    heads = {name for name in stored if ".head." in name}
    assert len(heads) == 11
    convert(folder, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back")
    again: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    reference, info = again
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any(".head." in name for name in reference.state_dict())
    save_file({name: tensor for name, tensor in stored.items() if name not in heads}, folder / "model.safetensors")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), headless, load(folder).params))


def test_a_question_goes_through_siglips_own_image_processor(tmp_path: Path) -> None:
    model = load(siglip_llava(tmp_path / "model", processor=True))
    assert model.processor is not None
    image = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    expected = hf.siglip_processor(SIDE)([Image.fromarray(image)], return_tensors="np")["pixel_values"]
    inputs = model.processor([[image]], ["what is this"])
    np.testing.assert_array_equal(inputs.pixel_values, expected)
    assert (inputs.ids[0] == model.config.image_token_id).sum() == 16
    for aspect in ("crop", "pad"):
        assert model.processor([[image]], ["what is this"], aspect).pixel_values.shape == (1, 3, SIDE, SIDE)


def test_an_explanation_draws_siglips_patches_and_leaves_out_the_one_that_is_lost(tmp_path: Path) -> None:
    image, how = np.zeros((40, 40, 3), np.uint8), Sparsity.dense()
    found = explain(
        load(siglip_llava(tmp_path / "full", processor=True, layers=1)), [image], "what", how, max_new_tokens=1
    )
    assert found.class_tokens == 0 and found.views[0].tokens.tolist() == np.arange(16).reshape(4, 4).tolist()
    top = {"vision_feature_select_strategy": "default"}
    with pytest.warns(UserWarning, match=LOST):
        lossy = load(siglip_llava(tmp_path / "default", processor=True, top=top, layers=1))
    lost = explain(lossy, [image], "what", how, max_new_tokens=1)
    assert lost.views[0].tokens.reshape(-1).tolist() == [ABSENT, *range(15)]
