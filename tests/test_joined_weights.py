"""Phi-3's joined weights: split where they are listed, joined again on the way back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsevlm_jax import load
from sparsevlm_jax.checkpoints import export
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.describe import describe
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.checkpoints.joined import parts_of, split, whole_of
from sparsevlm_jax.checkpoints.safetensors import list_tensors
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.family import config_of, family_of
from sparsevlm_jax.models.parameters import entries
from tests import hf

LAYER = "language_model.model.layers.0."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phi3") / "model"
    return hf.tiny_llava(path, decoder="phi3", layers=2, kv_heads=2, pad_token_id=0, processor=False)


def changed(folder: Path, target: Path, name: str, *arrays: tuple[str, np.ndarray]) -> Path:
    """A copy whose tensor of that name (its end) is replaced."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    full = next(key for key in tensors if key.endswith(name))
    del tensors[full]
    save_file(tensors | {full.replace(name, other): array for other, array in arrays}, target / "model.safetensors")
    return target


def stored(folder: Path, name: str) -> np.ndarray:
    return next(x for key, x in load_file(folder / "model.safetensors").items() if key.endswith(name))


def test_a_part_is_its_rows_of_the_stored_tensor(folder: Path) -> None:
    layer = load(folder).params["language_model"]["layers_1"]
    joined = stored(folder, "layers.1.self_attn.qkv_proj.weight")
    for part, rows in (("q_proj", slice(0, 64)), ("k_proj", slice(64, 96)), ("v_proj", slice(96, 128))):
        np.testing.assert_array_equal(layer["self_attn"][part]["weight"], joined[rows])
    joined = stored(folder, "layers.1.mlp.gate_up_proj.weight")
    np.testing.assert_array_equal(layer["mlp"]["gate_proj"]["weight"], joined[:96])
    np.testing.assert_array_equal(layer["mlp"]["up_proj"]["weight"], joined[96:])


def test_a_part_keeps_its_own_rows_alone_in_memory(folder: Path) -> None:
    config = config_of(folder)
    tensors = split(family_of(config).names, list_tensors(folder), entries(config), str(folder))
    part = next(tensor for name, tensor in tensors.items() if name.endswith("layers.1.self_attn.k_proj.weight"))
    assert part.read().base is None and part.read().shape == part.shape == (32, 64)


def test_names_of_parts_and_wholes_undo_each_other() -> None:
    for module in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        parts = parts_of(f"{LAYER}{module}.weight")
        assert len(parts) > 1 and {whole_of(part) for part in parts} == {f"{LAYER}{module}.weight"}
    for name in (
        f"{LAYER}self_attn.o_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    ):
        assert whole_of(name) == name and parts_of(name) == (name,)


def test_a_conversion_holds_the_parts_and_writes_the_wholes_into_any_number_of_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(folder, tmp_path / "orbax")
    monkeypatch.setattr(export, "SHARD_BYTES", 60_000)
    assert to_hf(tmp_path / "orbax", tmp_path / "back") > 3
    back = list_tensors(tmp_path / "back")
    before = load_file(folder / "model.safetensors")
    assert len(back) == len(before)
    for name in ("qkv_proj", "gate_up_proj"):
        for layer in range(2):
            end = f"layers.{layer}.{'self_attn' if name == 'qkv_proj' else 'mlp'}.{name}.weight"
            after = next(tensor.read() for key, tensor in back.items() if key.endswith(end))
            np.testing.assert_array_equal(after, stored(folder, end))
    assert convert(tmp_path / "back", tmp_path / "again").groups


def test_joined_weights_are_described_as_the_decoders(folder: Path) -> None:
    assert {row["part"] for row in describe(folder)["parts"]} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }


def test_a_joined_weight_of_another_shape_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    name = "layers.0.self_attn.qkv_proj.weight"
    broken = changed(folder, tmp_path / "x", name, (name, np.zeros((127, 64), np.float32)))
    with pytest.raises(UserError, match=rf"{name} is \[127, 64\], expected \[128, 64\]"):
        load(broken)


def test_a_checkpoint_with_the_parts_themselves_is_read_and_with_both_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = "layers.0.mlp.gate_up_proj.weight"
    halves = [("layers.0.mlp.gate_proj.weight", 0), ("layers.0.mlp.up_proj.weight", 96)]
    arrays = [(name, stored(folder, whole)[start : start + 96].copy()) for name, start in halves]
    plain = load(changed(folder, tmp_path / "parts", whole, *arrays)).params
    expected = load(folder).params
    np.testing.assert_array_equal(
        *(x["language_model"]["layers_0"]["mlp"]["up_proj"]["weight"] for x in (plain, expected))
    )
    with pytest.raises(UserError, match=rf"1 not part of this model: \S*{whole}"):
        load(changed(folder, tmp_path / "both", whole, *arrays, (whole, stored(folder, whole))))
