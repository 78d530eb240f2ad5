"""Conversion to orbax: group by group into a folder beside the target, which gets its name when all is complete."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsevlm_jax.checkpoints import llava_original, orbax, torch_bin
from sparsevlm_jax.checkpoints.assign import all_finite
from sparsevlm_jax.checkpoints.check import Watch
from sparsevlm_jax.checkpoints.groups import Pair, group
from sparsevlm_jax.checkpoints.manifest import MANIFEST, VERSION, Manifest, Record, is_converted, read_manifest
from sparsevlm_jax.checkpoints.source import FILES, Source, open_source, with_dtype
from sparsevlm_jax.config import DTYPES, read_config
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import inside, open_regular, user_path
from sparsevlm_jax.process import versions
from sparsevlm_jax.text import in_bytes, shortlist

_PACKAGES = ("sparsevlm_jax", "orbax-checkpoint", "jax", "flax", "transformers", "numpy")
_MARK = ".sparsevlm-convert"  # a file in every folder that is worked in


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
      watch: is told about progress.

    Raises:
      UserError: a faulty source, a target that is in the way, a full disk. What was finished stays for the next try.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f'dtype "{dtype}" is not supported: choose {", ".join(DTYPES)}')
    opened, target = open_source(source, revision=revision, vision_tower=vision_tower), user_path(target)
    groups, job = group(opened), _job(opened, dtype)
    sizes = [sum(opened.nbytes(name) for name, _ in pairs) for pairs in groups]
    result = Result(len(groups), len(groups), sum(sizes), max(sizes))
    if is_converted(target) and read_manifest(target).job == job:
        (target / _MARK).unlink(missing_ok=True)
        return result  # a run that was killed just after its last step
    _check_target(target, opened.folder)
    with workplace(target) as partial:
        finished = _resume(partial, job, len(groups))
        earlier = set(finished)
        result = result._replace(resumed=len(earlier))
        left = [pair for number, pairs in enumerate(groups) if number not in finished for pair in pairs]
        check_room(partial, sum(_stored_bytes(opened, pair, dtype) for pair in left))
        done = sum(sizes[number] for number in finished)
        watch(done, result.nbytes)
        numbers = [number for number in range(len(groups)) if number not in finished]
        for number, tensors in zip(numbers, _read_ahead(opened, [groups[n] for n in numbers], dtype), strict=True):
            check_room(partial, sum(array.nbytes for array, _ in tensors.values()))  # others fill the disk too
            finished[number] = _write_group(orbax.group_folder(partial, number), tensors, job)
            done += sizes[number]
            watch(done, result.nbytes)
        records = [finished[number] for number in range(len(groups))]
        _finalise(partial, opened, dtype, job, records)
        _require_unchanged(partial, opened, records, earlier)
        publish(partial, target)
    return result


Tensors = dict[tuple[str, ...], tuple[np.ndarray, Record]]  # of a group, by path


def _read_ahead(source: Source, groups: Sequence[Sequence[Pair]], dtype: str | None) -> Iterator[Tensors]:
    """Group after group; a thread reads the next one while one is written."""
    with ThreadPoolExecutor(1) as ahead:
        following = None
        for pairs, later in zip_longest(groups, groups[1:]):
            tensors = _read_group(source, pairs, dtype) if following is None else following.result()
            following = None if later is None else ahead.submit(_read_group, source, later, dtype)
            yield tensors


def _read_group(source: Source, pairs: Sequence[Pair], dtype: str | None) -> Tensors:
    """Reads, checks and casts a group; its arrays as they are stored.

    Raises:
      UserError: a tensor that cannot be read, or NaN or infinity in one.
    """

    def read(pair: Pair) -> tuple[np.ndarray, Record]:
        name, entry = pair
        tensor = source.tensors[name]
        array = tensor.read()
        digest = stored_digest = orbax.digest(array)
        if dtype not in (None, tensor.dtype):
            with np.errstate(over="ignore"):  # an overflow is reported below, with its name
                array = array.astype(dtype)
            stored_digest = orbax.digest(array)
        path, stored = "/".join(entry.path), array.dtype.name
        record = Record(path, name, tensor.file.name, tensor.shape, tensor.dtype, digest, stored, stored_digest)
        return orbax.in_order(entry.to_param(array)), record

    tensors = orbax.parallel(read, pairs)
    torch_bin.release()
    spoilt = [record.name for array, record in tensors if not all_finite(array)]
    if spoilt:
        stored = tensors[0][1].stored_dtype
        raise UserError(f"{source.folder}: NaN or infinity, as {stored}, in {len(spoilt)} tensors: {shortlist(spoilt)}")
    return {entry.path: tensor for (_, entry), tensor in zip(pairs, tensors, strict=True)}


def _write_group(folder: Path, tensors: Tensors, job: str) -> tuple[Record, ...]:
    records = tuple(record for _, record in tensors.values())
    orbax.save_group(folder, {path: array for path, (array, _) in tensors.items()}, job, records)
    return records


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """The folder beside the target in which it is made; one process at a time.

    Raises:
      UserError: it cannot be made, something else has its name, or another process works in it.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        if not os.path.lexists(partial):
            partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except NotADirectoryError:
        raise UserError(_in_the_way(partial)) from None
    except OSError as error:
        raise UserError(f"{partial}: cannot be made: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        _sign(partial)
        yield partial
    except BlockingIOError:
        raise UserError(f"{partial}: another process is writing {target}") from None
    except OSError as error:
        raise UserError(f"{error.filename or partial}: cannot be written: {error.strerror or error}") from error
    finally:
        os.close(handle)


def _sign(partial: Path) -> None:
    """Marks a folder as made here, which may then be emptied: only an empty one, or one that is marked already.

    Raises:
      UserError: it is neither.
    """
    mark = partial / _MARK
    if mark.is_symlink() or not mark.is_file():
        if any(partial.iterdir()):
            raise UserError(_in_the_way(partial))
        mark.write_text("`sparsevlm convert` makes this folder and empties it as it needs.\n")


def _in_the_way(partial: Path) -> str:
    return f"{partial}: is in the way, no conversion has made it; move it, or choose another target"


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


def _finalise(partial: Path, source: Source, dtype: str | None, job: str, groups: Sequence[tuple[Record, ...]]) -> None:
    """Writes what stands beside the parameters, the manifest last."""
    copy_files(source.folder, partial, FILES if source.layout == "hf" else ("generation_config.json",))
    if source.layout == "original":
        aspect = read_config(source.folder).get("image_aspect_ratio")
        llava_original.write_processor(source.folder, partial, source.config, aspect)
    config = source.config if dtype is None else with_dtype(source.config, dtype)
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
            if item.is_file() and item.name != _MARK
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
        doubtful = [record for record in records if number in earlier or record.file in touched]
        found = orbax.parallel(same, doubtful)
        changed += [record.name for record, equal in zip(doubtful, found, strict=True) if not equal]
        torch_bin.release()
    if changed:
        clear(partial)
        raise UserError(f"{source.folder}: changed while it was converted, convert it again: {shortlist(changed)}")


def clear(partial: Path, keep: Collection[Path] = ()) -> None:
    """Empties a folder, but for its mark and some groups. Links are removed, not followed."""
    params = orbax.group_folder(partial, 0).parent
    items = [*partial.iterdir(), *(params.iterdir() if _is_folder(params) else ())]
    for item in items:
        if item not in keep and item.name != _MARK and not (item == params and keep):
            shutil.rmtree(item) if _is_folder(item) else item.unlink(missing_ok=True)


def publish(partial: Path, target: Path) -> None:
    """Gives a complete folder its name; what it holds is on the disk before."""
    files = [item for item in (*partial.iterdir(), *partial.glob("params/*")) if item.is_file()]
    for item in [*files, partial]:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    os.rename(partial, target)
    (target / _MARK).unlink(missing_ok=True)


def _is_folder(item: Path) -> bool:
    return item.is_dir() and not item.is_symlink()


def _job(source: Source, dtype: str | None) -> str:
    """Identifies what is converted and how, without reading the weights."""
    files = [(Path(file).name, stamp) for file, stamp in source.stamps.items()]
    pairs = [(name, entry.path, source.tensors[name].dtype) for name, entry in source.pairs]
    whole = [VERSION, source.config_digest, source.config, files, sorted(pairs), dtype]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _check_target(target: Path, source: Path) -> None:
    if os.path.lexists(target):  # a link to nothing would be in the way as well, at the very end
        raise UserError(f"{target}: exists already, and is not the result of this conversion; choose another folder")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target}: lies inside the source, which is never touched; choose another folder")


def check_room(folder: Path, needed: int) -> None:
    """A disk that is too small is better known at once.

    Raises:
      UserError: it has fewer than `needed` bytes left.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        missing = f"{in_bytes(needed - free)} too little"
        raise UserError(f"{folder}: needs {in_bytes(needed)} more, the disk has {in_bytes(free)} left: {missing}")


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copies those of the files that are there.

    Raises:
      UserError: one is a link out of its folder, or no regular file.
    """
    for name in names:
        if os.path.lexists(source / name):
            with open_regular(inside(source, name)) as content, (target / name).open("wb") as copy:
                shutil.copyfileobj(content, copy)


def _stored_bytes(source: Source, pair: Pair, dtype: str | None) -> int:
    name, entry = pair
    return math.prod(entry.shape) * np.dtype(dtype or source.tensors[name].dtype).itemsize
