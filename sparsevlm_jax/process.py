"""This process: its memory, and the versions of what it runs on."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def memory() -> dict[str, int]:
    """Bytes: VmRSS (now), VmHWM (its peak) and RssAnon (without mapped files), as Linux counts them; 0 elsewhere."""
    file = Path("/proc/self/status")
    text = file.read_text() if file.exists() else ""
    found = {match[1]: int(match[2]) * 1024 for match in re.finditer(r"(\w+):\s+(\d+) kB", text)}
    return {key: found.get(key, 0) for key in ("VmRSS", "VmHWM", "RssAnon")}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):  # this package itself, in a checkout
            found[name] = version(name)
    return found
