"""Faulty sources and full disks: one line on stderr, exit code 2, nothing under the final name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sparsevlm_jax import UserError, load
from sparsevlm_jax.checkpoints import convert as run
from sparsevlm_jax.checkpoints.check import check
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.describe import describe
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.checkpoints.manifest import read_manifest
from sparsevlm_jax.checkpoints.safetensors import INDEX
from sparsevlm_jax.checkpoints.source import FILES
from sparsevlm_jax.cli import main
from tests.conftest import ROOT
from tests.layouts import HF, Weights, bin_shards, contents, save_bin, shard, transformers_4, weights
from tests.test_load import write_raw

NORM, QUERY = "language_model.model.norm.weight", "language_model.model.layers.0.self_attn.q_proj.weight"
FIRST, SECOND = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
BIN = "pytorch_model.bin"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tiny model in three shards."""
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copyfile(HF / "config.json", folder / "config.json")
    shard(weights(1), folder)
    return folder


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["sparsevlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    *bars, error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2, error
    assert error.startswith("sparsevlm: error: ")
    assert all(bar.startswith("converting ") for bar in bars), bars
    return error


def rewrite(change: Callable[[Weights], object]) -> Callable[[Path], None]:
    """A fault in the tensors, not in the files."""

    def spoil(folder: Path) -> None:
        tensors = weights(1)
        change(tensors)
        shard(tensors, folder)

    return spoil


def reindex(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """A fault in the index."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def truncate(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


def lead_out(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / SECOND)
    reindex(lambda places: places.update({k: f"../{SECOND}" for k, v in places.items() if v == SECOND}))(folder)


def repeat_in_another_shard(folder: Path) -> None:
    save_file({NORM: weights(1)[NORM]}, folder / "model-00004-of-00004.safetensors")
    reindex(lambda places: places.update({"extra": "model-00004-of-00004.safetensors"}))(folder)


def repeat_in_a_header(folder: Path) -> None:
    entry = '"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    write_raw(folder / FIRST, f"{{{entry}, {entry}}}".encode())


class Code:
    """What unpickling must not run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["PICKLE_RAN"],)


def only_bin(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def code_in_a_bin(folder: Path) -> None:
    only_bin(folder)
    torch.save({"a": Code()}, folder / BIN)


def code_in_a_bare_pickle(folder: Path) -> None:
    only_bin(folder)
    (folder / BIN).write_bytes(pickle.dumps({"a": Code()}))


def truncated_bin(folder: Path) -> None:
    only_bin(folder)
    save_bin(weights(1), folder / BIN)
    os.truncate(folder / BIN, 1000)


def list_in_a_bin(folder: Path) -> None:
    only_bin(folder)
    torch.save([torch.ones(2)], folder / BIN)


FAULTS = {
    "truncated shard": (truncate, [SECOND, "truncated"]),
    "missing shard": (lambda folder: (folder / SECOND).unlink(), [SECOND, "no such file"]),
    "wrong shape": (
        rewrite(lambda t: t.update({QUERY: np.ones((64, 65), np.float32)})),
        [QUERY, "[64, 65]", "[64, 64]"],
    ),
    "transposed shape": (
        rewrite(lambda t: t.update({QUERY.replace("self_attn.q", "mlp.up"): np.ones((64, 96), np.float32)})),
        ["up_proj", "[64, 96]", "[96, 64]"],
    ),
    "two names of one tensor": (rewrite(lambda t: t.update({"model.norm.weight": t[NORM]})), ["two names", NORM]),
    "tensor in two shards": (repeat_in_another_shard, ["model-00004", NORM]),
    "key twice in a header": (repeat_in_a_header, [FIRST, "repeats 'a'"]),
    "unknown key": (rewrite(lambda t: t.update({"lora.weight": t[NORM]})), ["not part of this model", "lora.weight"]),
    "missing key": (rewrite(lambda t: t.pop(NORM)), ["missing", NORM]),
    "integers": (rewrite(lambda t: t.update({NORM: np.ones(64, np.int32)})), [NORM, "I32"]),
    "not a number": (rewrite(lambda t: t[NORM].fill(np.nan)), ["NaN", NORM]),
    "bad index json": (lambda folder: (folder / INDEX).write_text('{"weight_map": '), [INDEX]),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "../ in the index": (lead_out, [INDEX, f"../{SECOND}"]),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), ["config.json", "no such file"]),
    "another architecture": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        ["config.json", "bert"],
    ),
    "code in a .bin": (code_in_a_bin, [BIN, "refused"]),
    "code in a bare pickle": (code_in_a_bare_pickle, [BIN, "refused"]),
    "truncated .bin": (truncated_bin, [BIN, "truncated"]),
    "no names in a .bin": (list_in_a_bin, [BIN, "expected tensors by name"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_source_is_refused(monkeypatch, capsys, tmp_path, source, fault):
    monkeypatch.setenv("PICKLE_RAN", str(tmp_path / "ran"))
    spoil, wanted = FAULTS[fault]
    spoil(source)
    error = fails(monkeypatch, capsys, "convert", source, tmp_path / "orbax")
    assert all(text in error for text in wanted), error
    assert not (tmp_path / "orbax").exists()
    assert not (tmp_path / "ran").exists()


def test_all_that_is_wrong_stands_in_one_message(monkeypatch, capsys, tmp_path, source):
    rewrite(lambda t: (t.pop(NORM), t.update(lora=np.ones(1, np.float32), **{QUERY: np.ones(3, np.float32)})))(source)
    error = fails(monkeypatch, capsys, "convert", source, tmp_path / "orbax")
    assert all(text in error for text in (NORM, "lora", QUERY))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["convert", HF], "expected SRC DST"),
        (["convert", HF, "a", "b"], "expected SRC DST"),
        (["convert", "--check", HF, "a"], "expected CKPT"),
        (["convert", "--check", HF], "manifest.json: no such file"),
        (["convert", "--to-hf", HF, "a"], "manifest.json: no such file"),
        (["convert", "--to-hf", "--check", HF], "give one of them"),
        (["convert", "--to-hf", HF, "a", "--dtype", "float16"], "--dtype goes with SRC DST only"),
        (["convert", HF, "a", "--dtype", "int8"], 'dtype "int8"'),
        (["convert", "./nowhere", "a"], "./nowhere: no such folder"),
        (["inspect", "./nowhere"], "nowhere: no such folder"),
        (["inspect", HF.parent], "holds no weights"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(str(a).rsplit("/", 1)[-1] for a in value),
)
def test_wrong_arguments_are_named(monkeypatch, capsys, tmp_path, arguments, wanted):
    monkeypatch.chdir(tmp_path)
    assert wanted in fails(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(monkeypatch, capsys, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(run, "_write_group", lambda *a: pytest.fail("a group was converted"))
    error = fails(monkeypatch, capsys, "convert", HF, tmp_path / "orbax")
    assert "needs 979.62 KiB more, the disk has 976.56 KiB left: 3.06 KiB too little" in error
    assert not (tmp_path / "orbax").exists()


def test_a_disk_that_fills_up_on_the_way_is_an_error_and_the_same_command_goes_on(monkeypatch, capsys, tmp_path):
    usage, saved = shutil.disk_usage(tmp_path), []
    save = run.orbax.save_group
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "disk_usage", lambda folder: usage._replace(free=1_000 if len(saved) == 3 else usage.free)
        )
        patch.setattr(run.orbax, "save_group", lambda *a: saved.append(a) or save(*a))
        assert "the disk has 1000.00 B left" in fails(patch, capsys, "convert", HF, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
    assert convert(HF, tmp_path / "orbax").resumed == 3


@pytest.mark.parametrize("limit", [4_000, 20_000])
def test_a_disk_that_takes_no_more_is_an_error_and_the_same_command_goes_on(tmp_path, limit):
    # The kernel refuses to let a file grow: the nearest thing to a full disk that any user may cause.
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); import runpy, sys; "
    script += "runpy.run_module('convert', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(HF), str(tmp_path / "orbax")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    error = done.stderr.strip().splitlines()[-1]  # tensorstore may have complained about its other writes before
    assert done.returncode == 2, done.stderr[-2000:]
    assert error.startswith("sparsevlm: error: ") and error.endswith("cannot be written: File too large")
    assert not (tmp_path / "orbax").exists()
    convert(HF, tmp_path / "orbax")
    assert [item.name for item in tmp_path.iterdir()] == ["orbax"]


@pytest.mark.parametrize("step", ["copy_files", "publish"])
def test_a_disk_that_is_full_at_the_end_is_an_error(monkeypatch, tmp_path, step):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "file"))

    with monkeypatch.context() as patch:
        patch.setattr(run, step, full)
        with pytest.raises(UserError, match="file: cannot be written: No space left on device"):
            convert(HF, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()
    result = convert(HF, tmp_path / "orbax")
    assert result.resumed == result.groups


# What is there already.


def own_folder(partial: Path) -> None:
    partial.mkdir()
    (partial / "diary.txt").write_text("mine")


def link_to_a_folder(partial: Path) -> None:
    own_folder(partial.parent / "elsewhere")
    partial.symlink_to(partial.parent / "elsewhere")


def link_to_nothing(partial: Path) -> None:
    partial.symlink_to(partial.parent / "nowhere")


def link_as_mark(partial: Path) -> None:
    own_folder(partial)
    (partial.parent / "file").write_text("")
    (partial / ".sparsevlm-convert").symlink_to(partial.parent / "file")


def own_file(partial: Path) -> None:
    partial.write_text("mine")


@pytest.mark.parametrize("make", [own_folder, link_to_a_folder, link_to_nothing, link_as_mark, own_file])
def test_what_no_conversion_made_is_neither_emptied_nor_filled(tmp_path, whole, make):
    home = tmp_path / "home"
    home.mkdir()
    make(home / ".orbax.partial")
    before = contents(home)
    for attempt in (lambda: convert(HF, home / "orbax"), lambda: to_hf(whole, home / "orbax")):
        with pytest.raises(UserError, match=r"\.orbax\.partial: is in the way, no conversion has made it"):
            attempt()
    assert contents(home) == before
    assert not (home / "orbax").exists() and not (home / "nowhere").exists()


def test_a_target_that_is_a_link_to_nothing_is_in_the_way_from_the_start(monkeypatch, tmp_path, whole):
    monkeypatch.setattr(run, "_write_group", lambda *a: pytest.fail("a group was converted"))
    (tmp_path / "orbax").symlink_to(tmp_path / "nowhere")
    for attempt in (lambda: convert(HF, tmp_path / "orbax"), lambda: to_hf(whole, tmp_path / "orbax")):
        with pytest.raises(UserError, match="orbax: exists already"):
            attempt()
    assert [item.name for item in tmp_path.iterdir()] == ["orbax"]


def test_a_link_in_the_folder_of_an_earlier_run_is_not_followed(monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(run, "publish", stop)
        convert(HF, tmp_path / "orbax")
    params = tmp_path / ".orbax.partial" / "params"
    params.rename(tmp_path / "params")
    params.symlink_to(tmp_path / "params")
    before = contents(tmp_path / "params")
    assert convert(HF, tmp_path / "orbax").resumed == 0
    assert contents(tmp_path / "params") == before
    assert not (tmp_path / "orbax" / "params").is_symlink() and check(tmp_path / "orbax")


def test_the_mark_of_a_folder_that_is_worked_in_goes_with_the_end(whole):
    assert {item.name for item in whole.iterdir()} == {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "params",
    }


def stop(*arguments: object) -> None:
    raise UserError("stopped")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded model, converted; not to be changed."""
    target = tmp_path_factory.mktemp("converted") / "orbax"
    convert(HF, target)
    return target


# A source that changes.


def overwrite_weights(source: Path) -> None:
    shard({name: array + 1 for name, array in weights(1).items()}, source)


def overwrite_weights_and_turn_back_their_clock(source: Path) -> None:
    files = list(source.glob("*.safetensors"))
    times = [(file.stat().st_atime_ns, file.stat().st_mtime_ns) for file in files]
    overwrite_weights(source)
    for file, ns in zip(files, times, strict=True):
        os.utime(file, ns=ns)


def overwrite_config(source: Path) -> None:
    (source / "config.json").write_text((source / "config.json").read_text().replace("1e-05", "2e-05"))


def add_a_template(source: Path) -> None:
    (source / "chat_template.jinja").write_text("new")


def remove_a_shard(source: Path) -> None:
    (source / SECOND).rename(source / "gone")
    (source / SECOND).write_bytes((source / "gone").read_bytes())  # the same bytes, later


CHANGES = {
    overwrite_weights: "tensors",
    overwrite_weights_and_turn_back_their_clock: "weight",
    overwrite_config: "config.json",
    add_a_template: "chat_template.jinja",
    remove_a_shard: SECOND,
}


@pytest.mark.parametrize("change", list(CHANGES), ids=lambda change: change.__name__)
@pytest.mark.parametrize("last", [True, False], ids=["behind the last group", "in the middle"])
def test_a_source_that_changes_meanwhile_gives_no_target(monkeypatch, tmp_path, source, change, last):
    one_group, calls = run._write_group, []

    def convert_group(*arguments: Any) -> Any:
        calls.append(arguments)
        records = one_group(*arguments)
        if len(calls) == (9 if last else 3):
            change(source)
        return records

    with monkeypatch.context() as patch:
        patch.setattr(run, "_write_group", convert_group)
        with pytest.raises(UserError, match="changed while it was converted, convert it again: .*") as caught:
            convert(source, tmp_path / "orbax")
    assert CHANGES[change] in str(caught.value) or change is overwrite_weights
    assert not (tmp_path / "orbax").exists()
    assert convert(source, tmp_path / "orbax").resumed == 0
    assert check(tmp_path / "orbax")


def test_a_source_that_changed_between_two_runs_unseen_gives_no_target(monkeypatch, tmp_path, source):
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(run, "copy_files", stop)
        convert(source, tmp_path / "orbax")
    overwrite_weights_and_turn_back_their_clock(source)
    with pytest.raises(UserError, match="changed while it was converted"):
        convert(source, tmp_path / "orbax")
    assert convert(source, tmp_path / "orbax").resumed == 0


# Links and pipes.


@pytest.mark.parametrize("name", ["config.json", *FILES])
def test_no_file_beside_the_weights_may_be_a_link_out_of_the_source(tmp_path, source, name):
    (tmp_path / "secret").write_bytes((HF / "config.json").read_bytes())
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name}: a link that leads out of its folder"):
        convert(source, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists() and not (tmp_path / ".orbax.partial").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors", BIN])
def test_a_pipe_in_a_source_is_never_opened(tmp_path, source, name):
    if name in ("model.safetensors", BIN):
        only_bin(source)
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(UserError, match=f"{name}: .*not a regular file"):
        convert(source, tmp_path / "orbax")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "config.json", "model.safetensors", BIN])
def test_what_git_lfs_left_is_named_and_not_copied(tmp_path, source, name):
    if name == BIN:
        only_bin(source)
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14\n")
    with pytest.raises(UserError, match=f"{name}: a Git LFS pointer, not the file itself"):
        convert(source, tmp_path / "orbax")
    assert [item.name for item in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("names", [["adapter_config.json"], ["adapter_config.json", "a.bin"], ["adapter_model.bin"]])
def test_an_adapter_is_named_and_not_sent_to_and_fro(tmp_path, source, names):
    for file in source.glob("model*"):
        file.unlink()
    for name in names:
        (source / name).write_text("{}")
    for attempt in (load, describe, lambda folder: convert(folder, tmp_path / "orbax")):
        with pytest.raises(UserError, match="an adapter"):
            attempt(source)


def test_a_bin_of_another_name_is_not_sent_to_the_converter_by_the_converter(tmp_path, source):
    only_bin(source)
    (source / "pytorch_model-00001-of-00001.bin").write_text("")
    with pytest.raises(UserError, match="holds no weights"):
        convert(source, tmp_path / "orbax")


@pytest.mark.parametrize("layout", [transformers_4, bin_shards], ids=["safetensors", "bin"])
def test_weights_may_be_links(tmp_path, layout, whole):
    folder = layout(tmp_path / "source").folder
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        file.rename(tmp_path / file.name)
        file.symlink_to(tmp_path / file.name)
    convert(folder, tmp_path / "orbax")
    digests = [{record.path: record.digest for record in read_manifest(t).records} for t in (tmp_path / "orbax", whole)]
    assert digests[0] == digests[1]


def test_a_snapshot_of_the_hubs_cache_is_converted(tmp_path, source):
    (source / "chat_template.jinja").write_text("template")
    home = tmp_path / "models--someone--tiny"
    snapshot = home / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    source.rename(home / "blobs")
    for blob in (home / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    convert(snapshot, tmp_path / "orbax")
    assert (tmp_path / "orbax" / "chat_template.jinja").read_text() == "template"
    assert not (tmp_path / "orbax" / "chat_template.jinja").is_symlink()


# PyTorch's own files.


def as_tensors() -> dict[Any, Any]:
    return {name: torch.from_numpy(array) for name, array in weights(1).items()}


def test_parameters_that_were_saved_as_they_are_trained_are_converted(tmp_path, source, whole):
    only_bin(source)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in as_tensors().items()}
    torch.save(parameters | {NORM: as_tensors()[NORM].requires_grad_()}, source / BIN)
    convert(source, tmp_path / "orbax")
    digests = [{record.path: record.digest for record in read_manifest(t).records} for t in (tmp_path / "orbax", whole)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({NORM: torch.ones(64).to_sparse()}, f"{NORM} is sparse or without data"),
        ({NORM: torch.ones(64, device="meta")}, f"{NORM} is sparse or without data"),
        ({7: torch.ones(64)}, "expected tensors by name"),
        ({"state_dict": {}}, "state_dict is dict"),
        ({NORM: torch.ones(64, dtype=torch.complex64)}, f"{NORM} is complex64"),
    ],
    ids=["sparse", "meta", "integer key", "nested", "complex"],
)
def test_what_is_no_array_in_a_bin_is_one_line(monkeypatch, capsys, tmp_path, source, changes, wanted):
    only_bin(source)
    torch.save(as_tensors() | changes, source / BIN)
    assert wanted in fails(monkeypatch, capsys, "convert", source, tmp_path / "orbax")


# Tied embeddings.


def tie(folder: Path, head: Any) -> None:
    """One file whose configuration ties the head to the table of embeddings, and a head in it all the same."""
    only_bin(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = weights(1)
    tensors["language_model.lm_head.weight"] = head(tensors["language_model.model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")


def test_a_head_that_is_the_table_of_embeddings_over_again_is_left_out(tmp_path, source):
    tie(source, lambda table: table.copy())
    assert "lm_head" not in load(source).params["language_model"]
    convert(source, tmp_path / "orbax")
    assert "lm_head" not in load(tmp_path / "orbax").params["language_model"]
    assert read_manifest(tmp_path / "orbax").source["ignored"] == ["language_model.lm_head.weight"]


@pytest.mark.parametrize(
    "head",
    [lambda table: table + 1, lambda table: table[:-1].copy(), lambda table: table.astype(np.int32)],
    ids=["other values", "another shape", "integers"],
)
def test_another_head_than_the_tied_one_is_named(tmp_path, source, head):
    tie(source, head)
    for read in (load, lambda folder: convert(folder, tmp_path / "orbax")):
        with pytest.raises(
            UserError, match=r"1 stored, while config.json ties it to .*which differs: .*lm_head.weight"
        ):
            read(source)


# What an inspection may meet.


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "BOOL", "U16"])
def test_inspect_counts_values_of_any_dtype_of_the_format(tmp_path, source, dtype):
    only_bin(source)
    header = {"extra": {"dtype": dtype, "shape": [4], "data_offsets": [0, {"F4": 2, "U16": 8}.get(dtype, 4)]}}
    write_raw(source / "model.safetensors", header, bytes(header["extra"]["data_offsets"][1]))
    assert describe(source)["parts"][0]["bytes"] == {"U16": 8}.get(dtype, 4)


@pytest.mark.parametrize("dtype", ["", "²", "[/b]", "F99999999999", [], {}, None, 5, "V\x1b[0m"], ids=str)
def test_inspect_says_in_one_line_that_a_dtype_is_none(monkeypatch, capsys, source, dtype):
    only_bin(source)
    header = {"extra": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    write_raw(source / "model.safetensors", header, bytes(4))
    assert "malformed header" in fails(monkeypatch, capsys, "inspect", source)
