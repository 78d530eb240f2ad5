"""The package as it is installed: what importing it costs, and how its command starts."""

from __future__ import annotations

import subprocess
import sys

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


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
