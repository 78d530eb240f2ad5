"""Conversion to orbax: group by group into a folder beside the target, which gets its name when all is complete."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsevlm_jax.ahead import ahead
from sparsevlm_jax.checkpoints import llava_original, orbax, torch_bin
from sparsevlm_jax.checkpoints.assign import all_finite
from sparsevlm_jax.checkpoints.check import Watch
from sparsevlm_jax.checkpoints.groups import Pair, group
from sparsevlm_jax.checkpoints.manifest import MANIFEST, VERSION, Manifest, Record, is_converted, read_manifest
from sparsevlm_jax.checkpoints.source import FILES, Source, open_source, with_dtype
from sparsevlm_jax.checkpoints.workplace import MARK, check_room, clear, copy_files, publish, workplace
from sparsevlm_jax.config import DTYPES, read_config
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import user_path
from sparsevlm_jax.models.names import Entry
from sparsevlm_jax.models.quantize import ParamPath, check_quantize, held_as, scale_of
from sparsevlm_jax.process import versions
from sparsevlm_jax.text import shortlist

_PACKAGES = ("sparsevlm_jax", "orbax-checkpoint", "jax", "flax", "transformers", "numpy")


class Form(NamedTuple):
    """How parameters are stored."""

    dtype: str | None  # None for each tensor's own
    quantize: str | None


class Result(NamedTuple):
    """What a conversion did."""

    groups: int
    resumed: int  # groups that an earlier run had finished
    nbytes: int  # of the source's tensors
    largest_group: int  # bytes


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    vision_tower: str | Path | None = None,
    watch: Watch = lambda done, total: None,
) -> Result:
    """Converts a PyTorch checkpoint; the same call resumes one that was interrupted.

    Args:
      source, revision, vision_tower: see `open_source`. The source is only read.
      target: a folder that does not exist yet, or the finished result of this very conversion. Until it is complete
        everything is in a folder beside it, `.NAME.partial`.
      dtype: "float32", "bfloat16" or "float16"; by default every tensor keeps its own.
      quantize: "int8" stores the weights of the decoder's layers in eight bits, which cannot be undone.
      watch: is told about progress.

    Raises:
      UserError: a faulty source, a target that is in the way, a full disk. What was finished stays for the next try.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f'dtype "{dtype}" is not supported: choose {", ".join(DTYPES)}')
    check_quantize(quantize)
    form = Form(dtype, quantize)
    opened, target = open_source(source, revision=revision, vision_tower=vision_tower), user_path(target)
    groups, job = group(opened), _job(opened, form)
    sizes = [sum(opened.nbytes(name) for name, _ in pairs) for pairs in groups]
    result = Result(len(groups), len(groups), sum(sizes), max(sizes))
    if is_converted(target) and read_manifest(target).job == job:
        (target / MARK).unlink(missing_ok=True)
        return result  # a run that was killed just after its last step
    _check_target(target, opened.folder)
    with workplace(target) as partial:
        finished = _resume(partial, job, len(groups))
        earlier = set(finished)
        result = result._replace(resumed=len(earlier))
        left = [pair for number, pairs in enumerate(groups) if number not in finished for pair in pairs]
        check_room(partial, sum(_stored_bytes(opened, pair, form) for pair in left))
        done = sum(sizes[number] for number in finished)
        watch(done, result.nbytes)
        numbers = [number for number in range(len(groups)) if number not in finished]
        read = (_read_group(opened, groups[number], form) for number in numbers)
        for number, tensors in zip(numbers, ahead(read), strict=True):
            check_room(partial, sum(array.nbytes for array, _ in tensors))  # others fill the disk too
            finished[number] = _write_group(orbax.group_folder(partial, number), tensors, job)
            done += sizes[number]
            watch(done, result.nbytes)
        records = [finished[number] for number in range(len(groups))]
        _finalise(partial, opened, form, job, records)
        _require_unchanged(partial, opened, records, earlier)
        publish(partial, target)
    return result


Tensors = list[tuple[np.ndarray, Record]]  # of a group


def _read_group(source: Source, pairs: Sequence[Pair], form: Form) -> Tensors:
    """Reads, checks and casts a group; its arrays as they are stored.

    Raises:
      UserError: a tensor that cannot be read, or NaN or infinity in one.
    """

    def read(pair: Pair) -> list[tuple[np.ndarray, Record]]:
        name, entry = pair
        tensor = source.tensors[name]
        array = tensor.read()
        digest = orbax.digest(array)
        origin, made = (name, tensor.file.name), []
        for path, stored in _stored(entry, array, form).items():
            stored_digest = digest if stored is array else orbax.digest(stored)
            own = (stored.shape, tensor.dtype, digest, stored.dtype.name, stored_digest)
            made.append((stored, Record("/".join(path), *origin, *own)))
        return made

    tensors = [each for made in orbax.parallel(read, pairs) for each in made]
    torch_bin.release()
    spoilt = [record for array, record in tensors if not all_finite(array)]
    if spoilt:
        stored, names = spoilt[0].stored_dtype, shortlist([record.name for record in spoilt])
        raise UserError(f"{source.folder}: NaN or infinity, as {stored}, in {len(spoilt)} tensors: {names}")
    return tensors


def _write_group(folder: Path, tensors: Tensors, job: str) -> tuple[Record, ...]:
    state = {tuple(record.path.split("/")): array for array, record in tensors}
    records = tuple(record for _, record in tensors)
    orbax.save_group(folder, state, job, records)
    return records


def _stored(entry: Entry, tensor: np.ndarray, form: Form) -> dict[ParamPath, np.ndarray]:
    """What is stored of a tensor: itself, cast, or values and scale."""
    if scale_of(entry.path, form.quantize):
        return {path: np.asarray(part) for path, part in held_as(entry.path, tensor, form.quantize).items()}
    with np.errstate(over="ignore"):  # an overflow is reported by the caller, with its name
        return {entry.path: tensor.astype(form.dtype or tensor.dtype, copy=False)}


def _resume(partial: Path, job: str, count: int) -> dict[int, tuple[Record, ...]]:
    """The groups that an earlier run of the same job finished; everything else is removed."""
    finished = {}
    for number in range(count):
        records = orbax.group_records(partial, number, job)
        if records is not None:
            finished[number] = records
    kept = [(orbax.group_folder(partial, number), orbax.group_note(partial, number)) for number in finished]
    clear(partial, {item for pair in kept for item in pair})
    return finished


def _finalise(partial: Path, source: Source, form: Form, job: str, groups: Sequence[tuple[Record, ...]]) -> None:
    """Writes what stands beside the parameters, the manifest last."""
    copy_files(source.folder, partial, FILES if source.layout == "hf" else ("generation_config.json",))
    if source.layout == "original":
        aspect = read_config(source.folder).get("image_aspect_ratio")
        llava_original.write_processor(source.folder, partial, source.config, aspect)
    config = source.config if form.dtype is None else with_dtype(source.config, form.dtype)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    manifest = Manifest(
        version=VERSION,
        job=job,
        source={
            "name": source.name,
            "layout": source.layout,
            "config_digest": source.config_digest,
            "files": {Path(file).name: stamp[0] for file, stamp in source.stamps.items() if stamp},
            "ignored": source.ignored,
        },
        versions=versions(_PACKAGES),
        files={
            item.name: orbax.file_digest(item)
            for item in sorted(partial.iterdir())
            if item.is_file() and item.name != MARK
        },
        groups=tuple(groups),
    )
    (partial / MANIFEST).write_text(manifest.to_json())


def _require_unchanged(
    partial: Path, source: Source, groups: Sequence[tuple[Record, ...]], earlier: Collection[int]
) -> None:
    """What was converted is what the source holds now.

    Tensors are read again where the times of files do not tell: those of files that something was done to, and those
    that an earlier run read.

    Args:
      earlier: the numbers of groups that an earlier run converted.

    Raises:
      UserError: it is not; what was converted is removed.
    """

    def same(record: Record) -> bool:
        return orbax.digest(source.tensors[record.name].read()) == record.digest

    changed, touched = source.changed(), source.touched()
    for number, records in enumerate(groups):
        # By name: two may be made of one tensor.
        doubtful = {record.name: record for record in records if number in earlier or record.file in touched}
        found = orbax.parallel(same, list(doubtful.values()))
        changed += [name for name, equal in zip(doubtful, found, strict=True) if not equal]
        torch_bin.release()
    if changed:
        clear(partial)
        raise UserError(f"{source.folder}: changed while it was converted, convert it again: {shortlist(changed)}")


def _job(source: Source, form: Form) -> str:
    """Identifies what is converted and how, without reading the weights."""
    files = [(Path(file).name, stamp) for file, stamp in source.stamps.items()]
    pairs = [(name, entry.path, source.tensors[name].dtype) for name, entry in source.pairs]
    whole = [VERSION, source.config_digest, source.config, files, sorted(pairs), form.dtype]
    whole += [] if form.quantize is None else [form.quantize]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _check_target(target: Path, source: Path) -> None:
    if os.path.lexists(target):  # a link to nothing would be in the way as well, at the very end
        raise UserError(f"{target}: exists already, and is not the result of this conversion; choose another folder")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target}: lies inside the source, which is never touched; choose another folder")


def _stored_bytes(source: Source, pair: Pair, form: Form) -> int:
    name, entry = pair
    if scale_of(entry.path, form.quantize):
        return entry.shape[0] * (entry.shape[1] + 4)
    return math.prod(entry.shape) * np.dtype(form.dtype or source.tensors[name].dtype).itemsize
