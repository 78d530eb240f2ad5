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

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert import run
from convert.run import convert
from sparsevlm_jax import UserError, cli
from sparsevlm_jax.shards import INDEX
from tests.conftest import ROOT
from tests.layouts import HF, Weights, save_bin, shard, weights
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
        cli.main()
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


def link_out(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / SECOND)
    (folder / SECOND).symlink_to(folder.parent / SECOND)


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
    "key twice in a header": (repeat_in_a_header, [FIRST, "repeats a"]),
    "unknown key": (rewrite(lambda t: t.update({"lora.weight": t[NORM]})), ["not part of this model", "lora.weight"]),
    "missing key": (rewrite(lambda t: t.pop(NORM)), ["missing", NORM]),
    "integers": (rewrite(lambda t: t.update({NORM: np.ones(64, np.int32)})), [NORM, "I32"]),
    "not a number": (rewrite(lambda t: t[NORM].fill(np.nan)), ["NaN", NORM]),
    "bad index json": (lambda folder: (folder / INDEX).write_text('{"weight_map": '), [INDEX]),
    "index without a map": (lambda folder: (folder / INDEX).write_text("[1]"), [INDEX, "weight_map"]),
    "link out of the folder": (link_out, [SECOND, "leads out"]),
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
    monkeypatch.setattr(run, "_convert_group", lambda *a: pytest.fail("a group was converted"))
    assert "needs 0.0 GB more" in fails(monkeypatch, capsys, "convert", HF, tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()


def test_a_disk_that_fills_up_on_the_way_is_an_error_and_the_same_command_goes_on(monkeypatch, capsys, tmp_path):
    usage, saved = shutil.disk_usage(tmp_path), []
    save = run.store.save_group
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "disk_usage", lambda folder: usage._replace(free=1_000 if len(saved) == 3 else usage.free)
        )
        patch.setattr(run.store, "save_group", lambda *a: saved.append(a) or save(*a))
        assert "the disk has 0.0 GB left" in fails(patch, capsys, "convert", HF, tmp_path / "orbax")
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
