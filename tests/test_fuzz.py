"""Damaged inputs end in an answer or in one clear error, in two seconds and a gigabyte more than sound ones."""

from __future__ import annotations

import time

import pytest

from tests import fuzz


def bad(results: list[tuple[tuple[str, int, int], str, str]]) -> list[tuple[tuple[str, int, int], str, str]]:
    return [result for result in results if result[1] not in ("answer", "UserError")]


def test_damaged_inputs_are_answered_or_refused(tmp_path):
    results = list(fuzz.run(tmp_path, fuzz.cases(seed=0, count=70)))
    assert len(results) == 70 and not bad(results)
    assert {outcome for _, outcome, _ in results} == {"answer", "UserError"}


@pytest.mark.exhaustive
def test_twenty_minutes_of_damaged_inputs_are_answered_or_refused(tmp_path):
    end, seed = time.monotonic() + 20 * 60, 1
    while time.monotonic() < end:
        assert not bad(list(fuzz.run(tmp_path, fuzz.cases(seed, count=140))))
        seed += 1
