"""`sparsevlm demo`: three images, dense against pruned."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import sparsevlm_jax as sv
from sparsevlm_jax.cli import main, options
from sparsevlm_jax.cli.demo import in_characters, reply
from sparsevlm_jax.data import demo_model
from tests.explanations import GRID, QUESTION, image, image_size, model


class Sample(NamedTuple):
    """As `demo_model.samples` gives them."""

    image: Path
    questions: tuple[tuple[str, str], ...]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    found = [Sample(tmp_path / f"scene{n}.png", ((QUESTION, f"truth{n}"),)) for n in range(4)]
    for number, sample in enumerate(found):
        image(number).save(sample.image)
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, samples: list[Sample]):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(options, "load", lambda *_, **__: model())
    monkeypatch.setattr(demo_model, "samples", lambda: samples)

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["sparsevlm", "demo", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return int(stop.value.code or 0)

    return call


def test_three_images_are_walked_through(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "kept"
    assert run("-o", folder) == 0
    out = capsys.readouterr().out
    for number in range(3):
        assert f"scene{number}.png: {QUESTION}" in out and f"truth{number}" in out
        file = folder / f"{number + 1}-scene{number}.png"
        assert str(file) in out
        assert image_size(file)[0] > 900
    assert out.count("dense") == out.count("v1.5") == 3
    assert "scene3" not in out


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("-o", tmp_path / "file" / "kept") == 2
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)
    assert "--output" in printed.err


def test_the_reply_is_that_of_generate_with_the_tokens_of_the_plan(samples: list[Sample]) -> None:
    found = reply(model(), samples[0].image, QUESTION, sv.sparsity("v1.5"))
    said = sv.generate(model(), [samples[0].image], QUESTION, sparsity=sv.sparsity("v1.5"), max_new_tokens=8)
    assert found.answer == said
    assert found.visual_tokens[0] == GRID * GRID
    assert found.mean_tokens < GRID * GRID / 2
    assert found.prefill_seconds > 0


def test_a_image_in_characters_has_its_colours() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8], pixels[8:] = (250, 0, 0), (0, 0, 250)
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(in_characters(Image.fromarray(pixels), 4))
    lines = console.export_text(styles=True).splitlines()
    assert len([line for line in lines if "▀" in line]) == 8
    assert "38;2;250;0;0" in lines[0] and "48;2;0;0;250" in lines[7]
