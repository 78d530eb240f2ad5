"""`load()`: every accepted form of a checkpoint gives the same parameters, every faulty one its own error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsevlm_jax import tiny
from sparsevlm_jax.checkpoints.load import GenerationDefaults, load
from sparsevlm_jax.checkpoints.safetensors import INDEX, SINGLE, Tensor, list_tensors
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.parameters import abstract_params

GOLDEN = Path(__file__).parent / "golden"
HF, ORIGINAL = GOLDEN / "tiny_llava_hf", GOLDEN / "tiny_llava_original"
LAYOUTS = json.loads((GOLDEN / "tiny_llava_key_layouts.json").read_text())  # [5.x, 4.x, original] of every tensor
NORM = "language_model.model.norm.weight"
Weights = dict[str, np.ndarray]


@pytest.fixture
def stored() -> Weights:
    return load_file(HF / SINGLE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The configuration of the tiny model; tests put weights beside it."""
    home = tmp_path / "model"
    home.mkdir()
    shutil.copyfile(HF / "config.json", home / "config.json")
    return home


def write_shards(folder: Path, weights: Weights, count: int = 3) -> dict[str, str]:
    """Writes shards and their index; returns the index's map."""
    names = list(weights)
    places = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = names[number::count]
        save_file({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    write_index(folder, places)
    return places


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_raw(file: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def assert_same(params: dict, expected: dict) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (path, found), wanted in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(expected), strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), path
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes(), path


def error_of(source: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        load(source, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message


# What loads.


def test_the_tree_is_that_of_the_model():
    params = load(HF).params
    wanted = abstract_params(tiny(), np.dtype(np.float32))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), wanted
    )


def test_config_and_name_are_those_of_the_folder():
    model = load(HF)
    assert (model.config, model.name) == (tiny(), "tiny_llava_hf")


@pytest.mark.parametrize("layout", [1, 2], ids=["transformers 4", "original"])
def test_every_layout_gives_the_same_bytes(folder, stored, layout):
    save_file({names[layout]: stored[names[0]] for names in LAYOUTS}, folder / SINGLE)
    assert_same(load(folder).params, load(HF).params)


def test_original_float16_weights_give_the_same_bytes(folder):
    shutil.copyfile(ORIGINAL / SINGLE, folder / SINGLE)
    assert_same(load(folder, dtype="float32").params, load(HF).params)


def test_shards_give_the_same_bytes(folder, stored):
    write_shards(folder, stored)
    assert_same(load(folder).params, load(HF).params)


def test_shards_are_listed_one_after_the_other(folder, stored):
    write_shards(folder, stored)
    files = [tensor.file for tensor in list_tensors(folder).values()]
    assert files == sorted(files) and len(set(files)) == 3


def test_older_buffers_are_left_out(folder, stored):
    stored["vision_tower.embeddings.position_ids"] = np.arange(17)[None]
    stored["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(stored, folder / SINGLE)
    assert_same(load(folder).params, load(HF).params)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_default_dtype_is_the_files_own(folder, stored, dtype):
    save_file({name: value.astype(dtype) for name, value in stored.items()}, folder / SINGLE)
    wanted = jax.tree.map(lambda leaf: leaf.astype(dtype), load(HF).params)
    assert_same(load(folder).params, wanted)


def test_mixed_dtypes_become_float32(folder, stored):
    stored[NORM] = stored[NORM].astype(ml_dtypes.bfloat16)
    save_file(stored, folder / SINGLE)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load(folder).params)} == {"float32"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_converts_every_parameter(dtype):
    assert_same(load(HF, dtype=dtype).params, jax.tree.map(lambda leaf: leaf.astype(dtype), load(HF).params))


def test_parameters_outlive_their_files(folder, stored):
    save_file(stored, folder / SINGLE)
    params = load(folder).params
    with (folder / SINGLE).open("r+b") as stream:
        stream.truncate(0)
    assert_same(params, load(HF).params)


def test_tied_embeddings_need_no_head(folder, stored):
    settings = json.loads((HF / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(settings))
    del stored["language_model.lm_head.weight"]
    save_file(stored, folder / SINGLE)
    assert "lm_head" not in load(folder).params["language_model"]


def test_a_folder_without_processor_files_loads_for_token_level_use():
    assert load(HF).processor is None


def test_parameters_take_one_sharding_or_one_each():
    script = """
import jax, numpy as np, sys
from jax.sharding import NamedSharding, PartitionSpec as P
from sparsevlm_jax.checkpoints.load import load
mesh = jax.make_mesh((8,), ("x",))
everywhere = NamedSharding(mesh, P())
def place(path, shape):
    assert isinstance(path, tuple) and isinstance(shape, tuple)
    return NamedSharding(mesh, P(None, "x")) if path[-1] == "weight" and len(shape) == 2 else everywhere
plain, copied, split = (load(sys.argv[1], sharding=s).params for s in (None, everywhere, place))
for a, b, (path, c) in zip(jax.tree.leaves(plain), jax.tree.leaves(copied), jax.tree.leaves_with_path(split)):
    assert len(a.devices()) == 1 and b.sharding == everywhere
    assert c.sharding == place(tuple(k.key for k in path), c.shape)
    assert np.array_equal(a, b) and np.array_equal(a, c)
weight = split["language_model"]["lm_head"]["weight"]
assert [shard.data.shape for shard in weight.addressable_shards] == [(192, 8)] * 8
"""
    subprocess.run(
        [sys.executable, "-c", script, str(HF)],
        check=True,
        cwd=GOLDEN.parent.parent,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
    )


# Ends of answers.


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 5, "pad_token_id": 7}, ((5,), 7)),
        ({"eos_token_id": [5, 6]}, ((5, 6), 0)),
        ({}, ((2,), 0)),
        (None, ((2,), 0)),
    ],
    ids=["one", "several", "silent", "no file"],
)
def test_end_and_padding_come_from_generation_config_then_config(folder, stored, generation, expected):
    save_file(stored, folder / SINGLE)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load(folder).generation == GenerationDefaults(*expected)


@pytest.mark.parametrize(("top", "pad"), [({}, 2), ({"pad_token_id": 150}, 150)], ids=["end token", "top level"])
def test_padding_falls_back_to_the_top_level_then_to_the_end_token(folder, stored, top, pad):
    settings = json.loads((HF / "config.json").read_text()) | top
    settings["text_config"]["pad_token_id"] = None
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(stored, folder / SINGLE)
    assert load(folder).generation.pad_token_id == pad


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "two"}'])
def test_broken_generation_settings_are_named(folder, stored, text):
    save_file(stored, folder / SINGLE)
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json: " in error_of(folder)


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["Infinity", "1e30", "2147483648", "-2", "true", "[1, 2.5]", "{}", "9" * 90])
def test_an_id_that_is_none_is_named(folder, stored, key, value):
    save_file(stored, folder / SINGLE)
    (folder / "generation_config.json").write_text(f'{{"{key}": {value}}}')
    assert f"generation_config.json: {key} is " in error_of(folder)


# Where a model is looked for.


@pytest.fixture
def cached(tmp_path, monkeypatch, stored) -> Path:
    """The hub's cache with one sharded model in it, as links from a snapshot into blobs."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--someone--tiny"
    snapshot, commit = home / "snapshots" / ("c" * 40), "c" * 40
    for directory in (snapshot, home / "blobs", home / "refs"):
        directory.mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "refs" / "v1").write_text(commit)
    shutil.copyfile(HF / "config.json", snapshot / "config.json")
    write_shards(snapshot, stored)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(home / "blobs" / f"{number:064}")
        file.symlink_to(f"../../blobs/{number:064}")
    return snapshot


@pytest.mark.parametrize("revision", [None, "v1", "c" * 40])
def test_a_hub_id_loads_from_the_cache_without_network(cached, revision):
    model = load("someone/tiny", revision=revision)
    assert model.name == "someone/tiny"
    assert_same(model.params, load(HF).params)


def test_the_cache_is_used_when_a_proxy_is_down(cached, monkeypatch):
    import huggingface_hub

    ask = huggingface_hub.snapshot_download

    def ask_through_proxy(name: str, *, local_files_only: bool, **options: Any) -> str:
        if not local_files_only:
            raise RuntimeError("proxy")
        return ask(name, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask_through_proxy)
    assert load("someone/tiny").name == "someone/tiny"


def test_a_snapshot_folder_of_the_cache_loads(cached):
    assert_same(load(cached).params, load(HF).params)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("someone/else", {}, "someone/else: not a folder, not complete in the hub's cache"),
        ("someone/tiny", {"revision": "v2"}, 'someone/tiny (revision "v2"): not a folder, not complete'),
        ("no such id", {}, "no such id: neither a folder nor a hub id (OWNER/NAME)"),
        ("./nowhere", {}, "./nowhere: no such folder"),
        ("some/where/else", {}, "some/where/else: no such folder"),
        (Path("nowhere"), {}, "nowhere: no such folder"),
        (HF / "config.json", {}, "config.json: a file, expected a folder"),
        (HF, {"revision": "main"}, 'a revision ("main") can be chosen of a hub id only'),
        (HF, {"dtype": "int8"}, 'dtype "int8" is not supported: choose float32, bfloat16, float16'),
    ],
)
def test_a_source_that_cannot_be_is_refused(cached, source, options, message):
    assert message in error_of(source, **options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "neither a folder nor a public model on the hub"),
        ("GatedRepoError", "the hub wants its terms accepted"),
        ("RevisionNotFoundError", "the hub has no such revision"),
        ("HfHubHTTPError", "the hub answers: 503"),
    ],
)
def test_what_the_hub_answers_is_one_line(monkeypatch, kind, message):
    import huggingface_hub

    said = {"__init__": lambda self: None, "__str__": lambda self: "503 unavailable\nmore"}
    error = type(kind, (getattr(huggingface_hub.errors, kind),), said)

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert message in error_of("someone/else")


# Weights that cannot be right.


def test_a_folder_without_config_is_refused(tmp_path):
    assert "config.json: no such file" in error_of(tmp_path)


def test_a_folder_without_weights_is_refused(folder):
    assert f"holds no weights ({SINGLE}, or {INDEX} and its shards)" in error_of(folder)


def test_pickled_weights_are_sent_to_the_converter(folder):
    (folder / "pytorch_model.bin").touch()
    assert "holds .bin weights only; convert them with `sparsevlm convert`" in error_of(folder)


@pytest.mark.parametrize("source", [None, 5, [], b"x" * 3])
def test_what_is_no_path_is_refused(unchecked, source):
    with pytest.raises(UserError, match="cannot be the name of a file"):
        load(source)


def test_an_original_folder_is_sent_to_the_converter():
    assert "the original LLaVA layout; convert it with `sparsevlm convert`" in error_of(ORIGINAL)


def test_tensors_that_do_not_fit_are_in_one_message(folder, stored):
    stored["image_newline"] = stored.pop(NORM)
    stored["multi_modal_projector.linear_1.weight"] = stored["multi_modal_projector.linear_1.weight"].T.copy()
    save_file(stored, folder / SINGLE)
    message = error_of(folder)
    assert all(part in message for part in (f"1 missing: {NORM}", "image_newline", "[32, 64], expected [64, 32]"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_with_nan_or_infinity_is_named(folder, stored, dtype):
    weights = {name: value.astype(dtype) for name, value in stored.items()}
    weights[NORM][3] = np.nan
    weights["multi_modal_projector.linear_2.weight"][5, 7] = -np.inf
    save_file(weights, folder / SINGLE)
    message = error_of(folder)
    assert "in 2 of 107 tensors" in message and NORM in message and "linear_2.weight" in message


def test_numbers_too_large_for_the_wanted_dtype_are_named(folder, stored):
    stored[NORM][0] = 1e6
    save_file(stored, folder / SINGLE)
    assert f"NaN or infinity, as float16, in 1 of 107 tensors: {NORM}" in error_of(folder, dtype="float16")


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_truncated_file_is_named(folder, size):
    data = (HF / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:size])
    message = error_of(folder)
    assert SINGLE in message and "truncated" in message


def test_a_file_that_shrinks_after_listing_is_an_error(folder):
    shutil.copyfile(HF / SINGLE, folder / SINGLE)
    tensor = list_tensors(folder)[NORM]
    with (folder / SINGLE).open("r+b") as stream:
        stream.truncate(9000)
    with pytest.raises(UserError, match=f"ends inside {NORM}"):
        tensor.read()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{", b""),
        (b"\xff\xff", b""),
        ([], b""),
        ({"a": 3}, b""),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        ({"a": ENTRY | {"shape": [3]}}, bytes(8)),
        ({"a": ENTRY | {"shape": [-2]}}, bytes(8)),
        ({"a": ENTRY | {"shape": ["2"]}}, bytes(8)),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
        ({"a": ENTRY, "b": ENTRY}, bytes(8)),
        ({"a": ENTRY | {"data_offsets": [0.0, 8.0]}}, bytes(8)),
        ({"a": ENTRY | {"shape": [2.0]}}, bytes(8)),
        ({"a": ENTRY | {"shape": [True, 2]}}, bytes(8)),
        ({"a": ENTRY | {"shape": [1] * 100_000 + [2]}}, bytes(8)),
        ({"a": ENTRY | {"dtype": "odd"}}, bytes(8)),
        ({"a": ENTRY | {"dtype": ["F32"]}}, bytes(8)),
        ({"a": ENTRY | {"dtype": "I64", "shape": [2]}}, bytes(8)),
        (b'{"a": %b, "a": %b}' % (2 * (json.dumps(ENTRY).encode(),)), bytes(8)),
    ],
    ids=lambda value: None if isinstance(value, bytes) and not value.strip(b"\0") else str(value)[:60],
)
def test_a_malformed_header_is_an_error(folder, header, data):
    write_raw(folder / SINGLE, header, data)
    assert f"{SINGLE}: malformed header" in error_of(folder)


def test_a_header_is_read_as_it_was_written(folder):
    write_raw(folder / SINGLE, {"a": ENTRY, "__metadata__": {"format": "pt"}, "b": ENTRY | {"data_offsets": [8, 16]}},
              np.arange(4, dtype=np.float32).tobytes())  # fmt: skip
    tensors: dict[str, Tensor] = list_tensors(folder)
    assert {name: tensor.read().tolist() for name, tensor in tensors.items()} == {"a": [0, 1], "b": [2, 3]}


# Shards and their index.


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_every_missing_and_truncated_shard_is_named(folder, stored):
    write_shards(folder, stored)
    first, second, _ = shards_of(folder)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    message = error_of(folder)
    assert f"{first}: no such file" in message and f"{second}: truncated" in message and "do not fit" not in message


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "\xff",
             '{"weight_map": {"a": "b", "a": "c"}}']
)  # fmt: skip
def test_a_bad_index_is_named(folder, text):
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    assert INDEX in error_of(folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\\b", "a\0b"]
)
def test_an_index_cannot_name_a_file_elsewhere(folder, stored, name):
    write_index(folder, write_shards(folder, stored) | {NORM: name})
    shown = name.replace("\0", "\\x00")
    assert f'"{shown}" is not the name of a file in this folder' in error_of(folder)


def test_shards_and_their_index_may_be_links_to_anywhere(folder, stored):
    write_shards(folder, stored)
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    for number, file in enumerate([*shards_of(folder), folder / INDEX]):
        file.symlink_to(file.rename(elsewhere / str(number)))
    assert_same(load(folder).params, load(HF).params)


def test_a_single_file_may_be_a_link_to_anywhere(folder):
    (folder / SINGLE).symlink_to(HF / SINGLE)
    assert_same(load(folder).params, load(HF).params)


def test_a_link_to_nothing_is_named(folder):
    (folder / SINGLE).symlink_to(folder / "nothing")
    assert f"{SINGLE}: no such file" in error_of(folder)


def test_a_link_inside_its_folder_is_followed(folder, stored):
    write_shards(folder, stored)
    shard = shards_of(folder)[0]
    shard.symlink_to(shard.rename(folder / "data").name)
    assert_same(load(folder).params, load(HF).params)


def test_a_tensor_in_two_shards_is_named(folder, stored):
    write_shards(folder, stored)
    for shard in shards_of(folder)[:2]:
        save_file(load_file(shard) | {NORM: stored[NORM]}, shard)
    message = error_of(folder)
    assert f"repeats tensors of another shard: {NORM}" in message


def change(places: dict[str, str], how: Callable[[dict[str, str]], object]) -> dict[str, str]:
    how(places)
    return places


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda places: places.pop(NORM), "does not name tensors of its files"),
        (lambda places: places.update(ghost=places[NORM]), "tensors are not in the file it names: ghost"),
        (
            lambda places: places.update({NORM: next(file for file in places.values() if file != places[NORM])}),
            f"tensors are not in the file it names: {NORM}",
        ),
    ],
    ids=["unlisted", "not there", "elsewhere"],
)
def test_an_index_that_disagrees_with_its_shards_is_an_error(folder, stored, how, message):
    write_index(folder, change(write_shards(folder, stored), how))
    assert message in error_of(folder)


# What does not belong.


def test_a_header_of_100_000_repeats_is_refused_at_once(folder):
    write_raw(folder / SINGLE, b"{" + b",".join(b'"%d":1' % (i // 2) for i in range(100_000)) + b"}")
    assert "malformed header: cannot be read as JSON: repeats" in error_of(folder)


def test_a_deeper_config_than_the_weights_is_refused_before_it_is_traced(folder, stored):
    settings = json.loads((HF / "config.json").read_text())
    settings["text_config"]["num_hidden_layers"] = 256
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(stored, folder / SINGLE)
    assert "config.json describes 259 layers" in error_of(folder)


@pytest.mark.parametrize("names", [["adapter_config.json", "adapter_model.safetensors"], ["adapter_model.bin"]])
def test_an_adapter_is_named(folder, names):
    for name in names:
        (folder / name).write_text("{}")
    assert "an adapter (LoRA, PEFT), not a model: merge it into its base first" in error_of(folder)


@pytest.mark.parametrize("name", [SINGLE, "config.json", "generation_config.json"])
def test_what_git_lfs_left_is_named(folder, stored, name):
    save_file(stored, folder / SINGLE)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14\n")
    assert f"{name}: a Git LFS pointer, not the file itself" in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_settings_that_are_a_link_out_of_the_folder_are_refused(folder, stored, name):
    save_file(stored, folder / SINGLE)
    (folder.parent / "elsewhere.json").write_bytes((HF / "config.json").read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../elsewhere.json")
    assert f"{name}: a link that leads out of its folder" in error_of(folder)


@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json", "generation_config.json", "tokenizer.json"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(folder, stored, name):
    if name not in (SINGLE, INDEX):
        save_file(stored, folder / SINGLE)
    (folder / name).unlink(missing_ok=True)
    if name == "tokenizer.json":
        (folder / "preprocessor_config.json").write_text("{}")
    os.mkfifo(folder / name)
    assert f"{name}: cannot be read: a pipe, socket or device" in error_of(folder)
