"""What docs/ and examples/ show is run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sparsevlm_jax as sv
from sparsevlm_jax.data import demo_model
from tests.hf import tiny_llava

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


def test_the_pure_functions_answer_about_tiles_as_the_documents_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = (ROOT / "docs" / "api.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "row_counts" in block)
    canvases = {"image_grid_pinpoints": [[56, 112], [112, 56]]}
    model = sv.load(tiny_llava(tmp_path / "model", layers=3, family="llava_next", top=canvases))
    for name, size in (("wide", (60, 130, 3)), ("tall", (70, 50, 3))):
        pixels = np.random.default_rng(0).integers(0, 255, size, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sv, "load", lambda _: model)
    names: dict[str, Any] = {}
    exec(code, names)  # what the repository itself shows
    ids, images = names["inputs"].ids, names["inputs"].images
    wanted = sv.generate_ids(
        model.params, model.config, ids, images, sparsity=sv.Sparsity.v15(), max_new_tokens=1, end_tokens=()
    )
    assert [[token] for token in names["tokens"].tolist()] == wanted.tokens
    assert wanted.visual_tokens[0] != wanted.visual_tokens[1]


def test_the_documents_show_the_example_of_a_method_as_it_is() -> None:
    code = (ROOT / "examples" / "own_method.py").read_text()
    assert f"```python\n{code}```" in (ROOT / "docs" / "methods.md").read_text()
    assert len(code.splitlines()) <= 20


def test_the_embedded_model_answers_about_a_clip(tmp_path: Path) -> None:
    """By the family of videos, with real weights: all three questions about the scene right."""
    run = subprocess.run([sys.executable, "examples/video.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    clip, told = tmp_path / "clip.mkv", demo_model.samples()[0].questions
    assert clip.stat().st_size < 300_000
    assert run.stdout.startswith(f"sparsevlm ask --model {tmp_path / 'model'} --video {clip} --frames 4 --question '")
    model = sv.load(tmp_path / "model", dtype="float32")
    assert model.config.model_type == "video_llava"
    found = sv.generate(model, None, [each.question for each in told], videos=clip, frames=4, max_new_tokens=4)
    assert found == [each.answer for each in told]
