"""A conversion that kills itself at a given moment, as `kill -9` would."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

from sparsevlm_jax.checkpoints import convert as run
from sparsevlm_jax.checkpoints import orbax
from sparsevlm_jax.checkpoints.manifest import MANIFEST

GROUPS = 9  # of the recorded model
# Moment -> groups that are finished by then.
MOMENTS = {
    "while the first group is read": 0,
    "while the first group is written": 0,
    "behind the first group": 1,
    "before the fifth group is written": 4,
    "while the fifth group is written": 4,
    "before the fifth group is noted": 4,
    "behind the fifth group": 5,
    "behind the last group": GROUPS,
    "before the files are copied": GROUPS,
    "in the middle of the manifest": GROUPS,
    "behind the manifest": GROUPS,
    "before the folder gets its name": GROUPS,
    "after the folder got its name": GROUPS,
}


def victim(source: Path, target: Path, moment: str) -> None:
    """Runs until the moment; does not return."""
    number = {"first": 1, "fifth": 5, "last": GROUPS}.get(moment.split(" group")[0].rsplit(" ", 1)[-1], 0)
    if moment.endswith("group is read"):
        _kill_in(orbax, "parallel", number)
    elif moment.startswith("before") and moment.endswith("group is written"):
        _kill_in(run, "_write_group", number)
    elif moment.endswith("group is written"):
        _kill_in(AtomicRenameTemporaryPath, "finalize", number)  # data are there, their name is not
    elif moment.endswith("group is noted"):
        _kill_in(orbax, "write", number)
    elif moment.startswith("behind the") and number:
        _kill_in(orbax, "save_group", number, after=True)
    elif moment == "before the files are copied":
        _kill_in(run, "copy_files")
    elif moment == "in the middle of the manifest":
        write = Path.write_text

        def write_half(file: Path, text: str) -> int:
            if file.name == MANIFEST:
                write(file, text[: len(text) // 2])
                _die()
            return write(file, text)

        setattr(Path, "write_text", write_half)  # noqa: B010
    elif moment == "behind the manifest":
        _kill_in(run, "publish")
    elif moment.endswith("name"):
        _kill_in(os, "rename", target=target, after=moment.startswith("after"))
    run.convert(source, target)


def _kill_in(module: Any, name: str, call: int = 1, *, after: bool = False, target: Path | None = None) -> None:
    """Replaces a function by one that dies in its n-th call, before or after it has worked."""
    function: Callable[..., Any] = getattr(module, name)
    calls = 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += target is None or target in arguments
        if calls != call:
            return function(*arguments, **options)
        if after:
            function(*arguments, **options)
        _die()

    setattr(module, name, dying)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
