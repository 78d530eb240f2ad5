"""What docs/ and examples/ show is run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def printed() -> dict[int, str]:
    """What examples/own_jit.py prints on one device and on four."""
    outputs = {}
    for devices in (1, 4):
        environment = dict(os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
        run = subprocess.run(
            [sys.executable, "examples/own_jit.py"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        outputs[devices] = run.stdout
    return outputs


def test_own_jit_answers_a_batch(printed: dict[int, str]) -> None:
    assert len(re.findall(r"\d+", printed[1])) == 8 * 8


def test_own_jit_answers_the_same_on_four_devices(printed: dict[int, str]) -> None:
    assert printed[4] == printed[1]


def test_own_jit_has_at_most_40_lines() -> None:
    assert len((ROOT / "examples" / "own_jit.py").read_text().splitlines()) <= 40


def test_the_documents_show_the_example_of_a_method_as_it_is() -> None:
    code = (ROOT / "examples" / "own_method.py").read_text()
    assert f"```python\n{code}```" in (ROOT / "docs" / "methods.md").read_text()
    assert len(code.splitlines()) <= 20
