"""What this process uses."""

from __future__ import annotations

import re
from pathlib import Path


def memory() -> dict[str, int]:
    """Bytes: VmRSS (now), VmHWM (its peak) and RssAnon (without mapped files), as Linux counts them; 0 elsewhere."""
    file = Path("/proc/self/status")
    text = file.read_text() if file.exists() else ""
    found = {match[1]: int(match[2]) * 1024 for match in re.finditer(r"(\w+):\s+(\d+) kB", text)}
    return {key: found.get(key, 0) for key in ("VmRSS", "VmHWM", "RssAnon")}
