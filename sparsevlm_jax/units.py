"""Large numbers for people."""

from __future__ import annotations

import math


def in_si(value: float | int) -> str:
    """1234567 as "1.23 M"."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def in_bytes(value: float | int) -> str:
    """1234567 as "1.18 MiB"."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float | int, step: int, units: tuple[str, ...]) -> str:
    power = min(int(math.log(max(value, 1), step)), len(units) - 1)
    return f"{value / step**power:.2f} {units[power]}".rstrip()
