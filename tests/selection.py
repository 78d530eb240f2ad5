"""Which tests `make test` leaves to `make test-all`: those that tests/slow.txt names, and those marked slow themselves.

A line is a test's id, `*` for anything, and behind "but" the parameters of those that stay: each kind keeps one of its
own in the default run. A line that names no test is an error, so that the list cannot grow old.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

LIST = Path(__file__).parent / "slow.txt"


class Line(NamedTuple):
    text: str
    pattern: re.Pattern[str]
    stay: frozenset[str]

    def names(self, nodeid: str) -> bool:
        return self.pattern.fullmatch(nodeid) is not None

    def leaves_out(self, nodeid: str) -> bool:
        return self.names(nodeid) and nodeid.partition("[")[2].removesuffix("]") not in self.stay


def read(text: str) -> list[Line]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = []
    for line in filter(None, lines):
        pattern, _, stay = line.partition(" but ")
        wanted = re.compile(re.escape(pattern.strip()).replace(r"\*", ".*"))
        found.append(Line(line, wanted, frozenset(name.strip() for name in stay.split(";") if name)))
    return found


def mark(items: list[pytest.Item], whole_suite: bool) -> None:
    """Marks what the list names.

    Raises:
      pytest.UsageError: lines that name no test, where all tests are collected.
    """
    lines = read(LIST.read_text(encoding="utf-8"))
    ids = [item.nodeid for item in items]
    for item in items:
        if any(line.leaves_out(item.nodeid) for line in lines):
            item.add_marker(pytest.mark.slow)
    stale = [line.text for line in lines if not any(map(line.names, ids))]
    if whole_suite and stale:
        raise pytest.UsageError(f"{LIST.name} names tests that are not there: {'; '.join(stale)}")
