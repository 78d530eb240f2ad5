"""A conversion that was killed: the same command goes on, and the result is that of an undisturbed run."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sparsevlm_jax import load
from sparsevlm_jax.checkpoints import convert as run
from sparsevlm_jax.checkpoints.check import check
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.manifest import read_manifest
from tests.convert_victim import GROUPS, MOMENTS, victim
from tests.layouts import HF


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("undisturbed") / "orbax"
    convert(HF, target)
    return target


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have everything imported already, what transformers imports late included."""
    context = multiprocessing.get_context("forkserver")
    configs = [f"transformers.models.{name}.configuration_{name}" for name in ("llava", "llama", "clip")]
    context.set_forkserver_preload(["tests.convert_victim", *configs])
    return context


def kill(processes: Any, target: Path, moment: str) -> None:
    process = processes.Process(target=victim, args=(HF, target, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def assert_same(found: Path, wanted: Path) -> None:
    """Same tree, dtypes and values, and the same manifest: digests of every tensor among others."""
    trees = [load(folder).params for folder in (found, wanted)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        assert (a.dtype, np.asarray(a).tobytes()) == (b.dtype, np.asarray(b).tobytes())
    assert read_manifest(found) == read_manifest(wanted)
    assert check(found)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_conversion_goes_on(monkeypatch, processes, tmp_path, undisturbed, moment):
    target = tmp_path / "orbax"
    kill(processes, target, moment)
    assert target.exists() == (moment == "after the folder got its name")
    converted = []
    one_group = run._write_group
    monkeypatch.setattr(run, "_write_group", lambda *a: converted.append(a[0]) or one_group(*a))
    result = convert(HF, target)
    assert (result.resumed, len(converted)) == (MOMENTS[moment], GROUPS - MOMENTS[moment])
    assert_same(target, undisturbed)
    assert [item.name for item in tmp_path.iterdir()] == ["orbax"]


def test_a_conversion_goes_on_however_often_it_is_killed(processes, tmp_path, undisturbed):
    target = tmp_path / "orbax"
    for moment in ("behind the first group", "while the fifth group is written", "in the middle of the manifest"):
        kill(processes, target, moment)
    assert convert(HF, target).resumed == GROUPS
    assert_same(target, undisturbed)


def empty_metadata(group: Path) -> None:
    (group / "_CHECKPOINT_METADATA").write_text("")


def lose_a_chunk(group: Path) -> None:
    next(item for item in group.glob("state/*/c/**/*") if item.is_file()).unlink()


def cut_a_chunk(group: Path) -> None:
    chunk = next(item for item in group.glob("state/*/c/**/*") if item.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1])


def forget_records(group: Path) -> None:
    metadata = json.loads((group / "_CHECKPOINT_METADATA").read_text())
    metadata["custom_metadata"] = {"job": "another"}
    (group / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))


@pytest.mark.parametrize("spoil", [empty_metadata, lose_a_chunk, cut_a_chunk, forget_records])
def test_a_group_that_is_not_whole_is_converted_again(processes, tmp_path, undisturbed, spoil):
    target = tmp_path / "orbax"
    kill(processes, target, "behind the fifth group")
    spoil(tmp_path / ".orbax.partial" / "params" / "group_00002")
    assert convert(HF, target).resumed == 4
    assert_same(target, undisturbed)


def test_another_job_starts_over(processes, tmp_path, undisturbed):
    target = tmp_path / "orbax"
    kill(processes, target, "behind the fifth group")
    (tmp_path / ".orbax.partial" / "stray").write_text("of something else")
    assert convert(HF, target, dtype="float16").resumed == 0
    assert {record.stored_dtype for record in read_manifest(target).records} == {"float16"}
    assert not (target / "stray").exists()


def test_a_source_that_has_changed_starts_over(processes, tmp_path):
    kill(processes, tmp_path / "orbax", "behind the fifth group")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((HF / name).read_bytes())  # the same bytes, but who knows that
    assert convert(source, tmp_path / "orbax").resumed == 0
