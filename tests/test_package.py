"""The package as it is installed: what importing it costs, and how its command starts."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

from sparsevlm_jax.ops.rope import apply_rope
from sparsevlm_jax.rotary import plain_rope


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_importing_the_package_does_not_import(module: str) -> None:
    code = f"import sparsevlm_jax, sys; sys.exit({module!r} in sys.modules)"
    assert _python("-c", code).returncode == 0


def test_python_m_is_the_command() -> None:
    result = _python("-m", "sparsevlm_jax", "--help")
    assert result.returncode == 0, result.stderr
    assert "ask" in result.stdout
    assert "plan" in result.stdout


def test_annotated_shapes_are_checked_in_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        apply_rope(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 5, 1), int), plain_rope(4, 10000.0))  # 2 tokens, 5 positions


def test_the_wheel_has_one_top_level_name() -> None:
    """By its settings; .ci/run looks into the wheel that was built."""
    root = Path(__file__).parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["sparsevlm_jax"]}
    assert 'find_spec, ("torch", "convert", "benchmarks")' in (root / ".ci" / "run").read_text(encoding="utf-8")


def test_a_long_file_says_why_it_is_one() -> None:
    for file in (Path(__file__).parent.parent / "sparsevlm_jax").rglob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 350 or "one long file because" in " ".join(lines[:12]), file


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
