"""The default run: what it leaves out is listed, and no test of it may take long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import selection


def test_a_line_leaves_out_all_parameters_but_those_that_stay() -> None:
    (line,) = selection.read("tests/test_a.py::test_one[*] but v1; two words  # why\n\n# nothing\n")
    ids = ["test_one[v1]", "test_one[two words]", "test_one[v2]", "test_other[v2]"]
    assert [line.leaves_out(f"tests/test_a.py::{name}") for name in ids] == [False, False, True, False]
    assert line.names("tests/test_a.py::test_one[v1]")


def test_brackets_and_dots_of_an_id_are_themselves() -> None:
    (line,) = selection.read("tests/test_a.py::test_one[v1.5]")
    assert line.leaves_out("tests/test_a.py::test_one[v1.5]")
    assert not line.names("tests/test_a.py::test_one[v105]")
    assert not line.names("tests/test_a.py::test_onev1.5")


def test_a_line_that_names_no_test_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selection, "LIST", tmp_path / "slow.txt")
    selection.LIST.write_text("tests/test_a.py::test_gone\n")
    selection.mark([], whole_suite=False)
    with pytest.raises(
        pytest.UsageError, match=r"slow\.txt names tests that are not there: tests/test_a\.py::test_gone"
    ):
        selection.mark([], whole_suite=True)


def test_a_test_over_its_cpu_limit_fails_the_run() -> None:
    own = f"{Path(__file__).relative_to(selection.LIST.parent.parent)}::test_brackets_and_dots_of_an_id_are_themselves"
    command = [sys.executable, "-m", "pytest", own, "-p", "no:cacheprovider"]
    runs = [
        subprocess.run(
            [*command, f"--cpu-limit={limit}"], capture_output=True, text=True, cwd=selection.LIST.parent.parent
        )
        for limit in (-1, 60)
    ]
    assert [run.returncode for run in runs] == [pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.OK]
    assert "over -1 CPU seconds" in runs[0].stdout and own in runs[0].stdout
