"""Converted checkpoints that are damaged or lead elsewhere: one line, whoever reads them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsevlm_jax import UserError, load
from sparsevlm_jax.checkpoints import orbax
from sparsevlm_jax.checkpoints.check import check
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.describe import describe, print_description
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.checkpoints.manifest import VERSION, read_manifest
from sparsevlm_jax.cli.options import ModelOptions
from tests.layouts import HF

QUERY = "state/language_model.layers_2.self_attn.q_proj.weight"
KEY = "state/language_model.layers_2.self_attn.k_proj.weight"
CHUNK = "c/0/0"
GROUP = 3  # of decoder layer 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded model, converted; not to be changed."""
    target = tmp_path_factory.mktemp("converted") / "orbax"
    convert(HF, target)
    return target


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The recorded model, converted; to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "orbax"))


@pytest.fixture
def group(copy: Path) -> Path:
    return orbax.group_folder(copy, GROUP)


def error_of(read: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


# Every byte.


@pytest.mark.parametrize("place", [0, 1, 100, -21, -20, -10, -4, -1])
def test_load_notices_a_flipped_byte_anywhere_in_a_chunk(copy, group, place):
    flip(group / QUERY / CHUNK, place)
    error = error_of(load, copy)
    assert "group_00003: cannot be restored, convert the source again: 1 of " in error and QUERY in error
    assert "group_00003" in error_of(check, copy)


def test_load_notices_a_flipped_byte_in_every_file_of_a_group(copy, group):
    manifest = read_manifest(copy)
    for file in (item for item in group.rglob("*") if item.is_file()):
        for place in (0, file.stat().st_size // 2, -1) if file.stat().st_size else ():
            flip(file, place)
            assert str(file.relative_to(group)) in error_of(orbax.require_whole, copy, GROUP, manifest)
            flip(file, place)
    orbax.require_whole(copy, GROUP, manifest)


def lose(group: Path) -> None:
    (group / QUERY / CHUNK).unlink()


def cut(group: Path) -> None:
    os.truncate(group / QUERY / CHUNK, 100)


def swap(group: Path) -> None:
    """Both are of one shape, and whole."""
    (group / QUERY).rename(group / "other")
    (group / KEY).rename(group / QUERY)
    (group / "other").rename(group / KEY)


def swap_groups(group: Path) -> None:
    """With their notes."""
    other = group.with_name("group_00004")
    for suffix in ("", ".json"):
        mine, theirs = (folder.with_name(folder.name + suffix) for folder in (group, other))
        mine.rename(group.with_name("between"))
        theirs.rename(mine)
        group.with_name("between").rename(theirs)


def lose_note(group: Path) -> None:
    group.with_suffix(".json").unlink()


def break_note(group: Path) -> None:
    group.with_suffix(".json").write_text('{"job": 1, "records": [{}], "files": {}}')


def lose_all(group: Path) -> None:
    shutil.rmtree(group)


@pytest.mark.parametrize("spoil", [lose, cut, swap, swap_groups, lose_note, break_note, lose_all])
def test_load_and_check_name_a_group_that_is_not_what_was_written(copy, group, spoil):
    spoil(group)
    assert "group_00003" in error_of(load, copy)
    assert "group_00003" in error_of(check, copy)


@pytest.mark.parametrize("spoil", [lose_all, cut])
def test_what_cannot_be_read_is_one_line_without_digests_too(copy, group, spoil):
    spoil(group)
    assert "group_00003: cannot be restored" in error_of(load, copy, check=False)


def test_a_check_looks_at_digests_before_anything_is_restored(copy, group, monkeypatch):
    (group / QUERY / CHUNK).write_bytes(b"")
    restore = orbax.restore_group
    restored: list[int] = []
    monkeypatch.setattr(
        orbax, "restore_group", lambda folder, number: restored.append(number) or restore(folder, number)
    )
    assert f"missing or changed: {QUERY}/{CHUNK}" in error_of(check, copy)
    assert restored and GROUP not in restored


def test_what_is_logged_of_reads_that_were_left_behind_is_not_shown(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.NOTSET)
    orbax.silence_orbax()
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    logging.getLogger().warning("TensorStore data files not found in checkpoint path /x")
    logging.getLogger().warning("anything else")
    assert caplog.messages == ["anything else"]


def test_digests_need_not_be_compared(copy, group):
    flip(group / QUERY / CHUNK, 100)
    assert load(copy, check=False).params.keys() == load(HF).params.keys()


def test_commands_compare_digests_unless_they_are_told_not_to(copy, group):
    flip(group / QUERY / CHUNK, 100)
    assert "group_00003" in error_of(ModelOptions(model=str(copy)).load)
    assert ModelOptions(model=str(copy), check=False).load().name == "orbax"


def test_load_notices_a_change_in_a_file_beside_the_parameters(copy):
    flip(copy / "generation_config.json", 0)
    assert "generation_config.json: missing or changed" in error_of(load, copy)


# Links.


def link(item: Path, folder: Path) -> None:
    """Moves something out of the checkpoint and leaves a link to it."""
    away = folder.parent / "away"
    item.rename(away)
    item.symlink_to(away)


@pytest.mark.parametrize("options", [{}, {"check": False}], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "params",
        "params/group_00003",
        "params/group_00003/state",
        f"params/group_00003/{QUERY}",
        f"params/group_00003/{QUERY}/{CHUNK}",
        f"params/group_00003/{QUERY}/zarr.json",
        "params/group_00003/_CHECKPOINT_METADATA",
    ],
)
def test_no_link_leads_out_of_a_checkpoint(copy, tmp_path, name, options):
    link(copy / name, copy)
    assert "a link that leads out of its folder" in error_of(load, copy, **options)
    assert "a link that leads out of its folder" in error_of(check, copy)
    assert "a link that leads out of its folder" in error_of(to_hf, copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_note_of_a_group_cannot_be_a_link_out(copy, group):
    link(group.with_suffix(".json"), copy)
    assert "a link that leads out of its folder" in error_of(load, copy)


def test_a_checkpoint_in_the_hubs_cache_consists_of_links_to_blobs(whole, tmp_path):
    home = tmp_path / "models--someone--tiny"
    snapshot = Path(shutil.copytree(whole, home / "snapshots" / ("c" * 40)))
    (home / "blobs").mkdir()
    for number, file in enumerate([item for item in snapshot.rglob("*") if item.is_file()]):
        blob = home / "blobs" / f"{number:064}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    assert load(snapshot).params.keys() == load(HF).params.keys()
    assert check(snapshot)


@pytest.mark.parametrize("options", [{}, {"check": False}], ids=str)
@pytest.mark.parametrize("name", ["config.json", "manifest.json", f"params/group_00003/{QUERY}/{CHUNK}"])
def test_a_pipe_in_a_checkpoint_is_never_opened(copy, name, options):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert name in error_of(load, copy, **options)
    assert name.rsplit("state/", 1)[0].rstrip("/") in error_of(check, copy)


# The manifest.


def rewrite(folder: Path, **fields: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def with_record(folder: Path, **fields: Any) -> list[Any]:
    groups = json.loads((folder / "manifest.json").read_text())["groups"]
    groups[0][0] |= fields
    return groups


@pytest.mark.parametrize(
    "fields",
    [
        {"source": []},
        {"source": None},
        {"files": ["config.json"]},
        {"files": {"../elsewhere": ""}},
        {"versions": 1},
        {"version": None},
        {"version": True},
        {"groups": {}},
        {"groups": [[1]]},
        {"groups": 1},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_that_is_none_is_one_line(copy, fields):
    rewrite(copy, **fields)
    for read in (load, describe, check):
        assert "manifest.json" in error_of(read, copy)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "garbage"},
        {"stored_dtype": "V0"},
        {"stored_dtype": 1},
        {"path": None},
        {"shape": 1},
        {"shape": ["a"]},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": [10**90]},
        {"shape": [1] * 1000},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_record_that_is_none_is_one_line(copy, fields):
    rewrite(copy, groups=with_record(copy, **fields))
    for read in (load, describe, check):
        assert "not the manifest of a converted checkpoint" in error_of(read, copy)


def test_a_record_of_another_shape_than_the_configurations_is_named(copy):
    rewrite(copy, groups=with_record(copy, shape=[3, 3]))
    for read in (load, check):
        assert "different parameters: language_model/embed_tokens" in error_of(read, copy)


@pytest.mark.parametrize("other", [VERSION - 1, VERSION + 1])
def test_a_checkpoint_of_another_layout_is_to_be_converted_again(copy, other):
    rewrite(copy, version=other)
    for read in (load, check):
        assert f"layout {other}, this release reads {VERSION}; convert the source again, to" in error_of(read, copy)


def test_inspect_prints_nothing_that_steers_a_terminal(copy, capsys):
    rewrite(copy, source={"name": "\x1b[31m[/red]", "files": 1})
    print_description(describe(copy))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"\x1b[31m[/red]" in printed


# Names.


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 2100 + "y", "~nosuchuser/x", "a\0b"], ids=lambda name: name[:5])
def test_a_name_that_cannot_be_is_one_line(name, tmp_path):
    for read in (load, check, describe, lambda path: convert(path, tmp_path / "orbax"), lambda path: convert(HF, path)):
        assert len(error_of(read, name)) < 500
    assert not list(tmp_path.iterdir())
