"""What the README and examples/ show is run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsevlm_jax as sv

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


def test_the_new_method_of_the_readme_prunes() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [b for b in blocks if "METHODS[" in b]
    assert len(block.splitlines()) <= 20
    before = dict(sv.METHODS)
    try:
        exec(block, {})
        config = sv.tiny()
        params = sv.init_params(config, jax.random.key(0), jnp.dtype(jnp.float32))
        plan = sv.make_plan(sv.sparsity("norm", keep_at=((1, 5),)), config, visual_tokens=16)
        embeddings = jax.random.normal(jax.random.key(1), (1, 24, config.text.hidden_size))
        visual = (jnp.arange(24) >= 4)[None] & (jnp.arange(24) < 20)[None]
        prompt = sv.Prompt(embeddings, visual, jnp.array([24]))
        _, _, trace = sv.prefill(params, prompt, config, plan, trace=True)
        assert trace is not None
        event = trace.events[0]
        norms = np.linalg.norm(np.asarray(event.before.hidden[0]), axis=-1)[4:20]
        np.testing.assert_array_equal(np.flatnonzero(event.selection.kept[0]) - 4, np.sort(np.argsort(-norms)[:5]))
    finally:
        sv.METHODS.clear()
        sv.METHODS.update(before)
