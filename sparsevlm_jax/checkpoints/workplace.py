"""The folder beside a target in which it is made, until it is complete and gets its name."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sparsevlm_jax.checkpoints import orbax
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import inside, open_regular
from sparsevlm_jax.text import in_bytes

MARK = ".sparsevlm-convert"  # a file in every folder that is worked in


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
    mark = partial / MARK
    if mark.is_symlink() or not mark.is_file():
        if any(partial.iterdir()):
            raise UserError(_in_the_way(partial))
        mark.write_text("`sparsevlm convert` makes this folder and empties it as it needs.\n")


def _in_the_way(partial: Path) -> str:
    return f"{partial}: is in the way, no conversion has made it; move it, or choose another target"


def clear(partial: Path, keep: Collection[Path] = ()) -> None:
    """Empties a folder, but for its mark and some groups. Links are removed, not followed."""
    params = orbax.group_folder(partial, 0).parent
    items = [*partial.iterdir(), *(params.iterdir() if _is_folder(params) else ())]
    for item in items:
        if item not in keep and item.name != MARK and not (item == params and keep):
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
    (target / MARK).unlink(missing_ok=True)


def _is_folder(item: Path) -> bool:
    return item.is_dir() and not item.is_symlink()


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
