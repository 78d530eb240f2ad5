"""What messages and reports are made of: large numbers, counts, lists, and text that a terminal may print."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsevlm_jax.errors import shown

_SHOWN, _LONGEST_NAME = 10, 200


def in_si(value: float | int) -> str:
    """1234567 as "1.23 M"."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def in_bytes(value: float | int) -> str:
    """1234567 as "1.18 MiB"."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count(number: int, noun: str) -> str:
    """3 and "image" as "3 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shortlist(items: Sequence[str]) -> str:
    """The first items and how many there are besides, on one line of bearable length."""
    rest = len(items) - _SHOWN
    names = (item if item.isprintable() and len(item) <= _LONGEST_NAME else shown(item) for item in items[:_SHOWN])
    return ", ".join(names) + (f" and {rest} more" if rest > 0 else "")


def printable(text: str) -> str:
    """The text with all that is no printable character as its escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _scaled(value: float | int, step: int, units: tuple[str, ...]) -> str:
    power = min(int(math.log(max(value, 1), step)), len(units) - 1)
    return f"{value / step**power:.2f} {units[power]}".rstrip()
