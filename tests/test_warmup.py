"""`sparsevlm warmup`, and what is said while a program is compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsevlm_jax.cli import main, waiting
from sparsevlm_jax.generation.programs import LOG
from sparsevlm_jax.generation.request import GenerationRequest
from tests.hf import tiny_llava

Programs = set[tuple[Any, ...]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("models") / "small", layers=2, hidden=32, ffn=48, image_size=84)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Programs]:
    """Runs a command; returns what it compiled, by all that decides about a program."""
    found: list[GenerationRequest] = []
    prefill = GenerationRequest.prefill

    def seen(self: GenerationRequest) -> Any:
        found.append(self)
        return prefill(self)

    monkeypatch.setattr(GenerationRequest, "prefill", seen)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def run(*arguments: object) -> Programs:
        found.clear()
        with pytest.raises(SystemExit) as stop:
            main.main([str(argument) for argument in arguments])
        assert stop.value.code == 0
        return {(program.__name__, *key) for request in found for program, *key in request._programs._compiled}

    return run


def test_ask_needs_what_warmup_has_compiled(programs: Callable[..., Programs], model: Path) -> None:
    options = ("--model", model, "--keep", 12, "--max-new-tokens", 6)
    warm = programs("warmup", *options, "--text", 180, "--text", 256)
    image = Path(__file__).parent.parent / "sparsevlm_jax" / "data" / "china.jpg"
    for question in ("what", "what is this? " * 5):
        asked = programs("ask", *options, "--image", image, "--question", question)
        assert {name for name, *_ in asked} == {"start", "decode"}
        assert asked <= warm
    assert len(warm) == 4


def test_a_prompt_is_never_shorter_than_its_template(
    programs: Callable[..., Programs], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count, said in (
        ("20", "--text 32: around an empty question a prompt has "),
        ("5000", "--text has 5000 tokens"),
    ):
        with pytest.raises(SystemExit) as stop:
            main.main(["warmup", "--model", str(model), "--text", count])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_a_long_compilation_is_named_once_and_a_short_one_never(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.05)

    def compilation(seconds: float) -> None:
        LOG.info("compiling start")
        time.sleep(seconds)
        LOG.info("compiled start")

    with waiting.compilation_notice():
        compilation(0.0)
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
    with waiting.compilation_notice():
        compilation(0.5)
        compilation(0.5)
    assert capsys.readouterr().err == f"sparsevlm: {waiting.TEXT}\n"
    assert not LOG.handlers and LOG.level == logging.NOTSET and LOG.propagate
