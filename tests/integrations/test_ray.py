"""`answer --engine ray` on real clusters of this machine, their processes killed in the middle."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.answering import write_questions
from tests.evaluate.sets import lines, write_lines

QUESTIONS, BATCH, NEW, PATIENCE = 60, 4, 16, 400
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: make test-integrations")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out questions of the embedded model with their images."""
    made = tmp_path_factory.mktemp("ray")
    rows = lines(write_questions(made, QUESTIONS))
    rows[5]["image"] = "missing.png"
    write_lines(made / "q.jsonl", rows)
    return made


def command(folder: Path, answers: str, *more: object) -> list[str]:
    options = ["answer", "--questions", "q.jsonl", "--images", ".", "--answers", answers, "--batch-size", BATCH]
    return [sys.executable, "-m", "sparsevlm_jax", *map(str, [*options, "--max-new-tokens", NEW, *more])]


def start(folder: Path, answers: str, *more: object) -> subprocess.Popen[str]:
    """The command in a session of its own, in the folder of the questions."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        command(folder, answers, *more),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and stderr."""
    try:
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, said


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> bytes:
    """The answers of one process that nothing disturbs."""
    code, said = finish(start(folder, "one.jsonl"))
    assert code == 1 and "60 answers, 60 of them now" in said and "1 question without an answer" in said
    return (folder / "one.jsonl").read_bytes()


def wait_for(found: Callable[[], Any], process: subprocess.Popen[Any]) -> Any:
    ends = time.monotonic() + PATIENCE
    while not (value := found()):
        assert process.poll() is None and time.monotonic() < ends, process.communicate()
        time.sleep(0.05)
    return value


def written(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def actors(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of Ray Data's workers."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "ray::" in (name := "".join(child.cmdline()[:1])) and "Map" in name]


def test_a_worker_that_is_killed_in_the_middle_loses_and_doubles_nothing(folder: Path, undisturbed: bytes) -> None:
    process, answers = start(folder, "two.jsonl", "--engine", "ray", "--workers", 2), folder / "two.jsonl"
    wait_for(lambda: written(answers) > 1 + BATCH, process)
    victim, before = wait_for(lambda: actors(process), process)[0], written(answers)
    victim.send_signal(signal.SIGKILL)
    code, said = finish(process)
    assert before < QUESTIONS and code == 1, said
    assert "60 answers, 60 of them now" in said
    assert answers.read_bytes() == undisturbed


def test_the_process_that_writes_is_killed_and_the_same_command_goes_on(folder: Path, undisturbed: bytes) -> None:
    more, answers = ("--engine", "ray", "--workers", 1), folder / "killed.jsonl"
    process = start(folder, "killed.jsonl", *more)
    wait_for(lambda: written(answers) > 1 + BATCH, process)
    process.kill()
    process.communicate()
    before = written(answers)
    assert BATCH < before < QUESTIONS
    assert finish(start(folder, "killed.jsonl"))[0] == 1  # with either engine
    assert answers.read_bytes() == undisturbed
    code, said = finish(start(folder, "killed.jsonl", *more, "--keep", 50))
    assert code == 2 and "was begun with other settings" in said
    code, said = finish(start(folder, "killed.jsonl", *more))
    assert code == 1 and "60 answers, 0 of them now" in said


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster that is there before the command, and after it; both know its token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path / "log", "w")  # noqa: SIM115 (closed below)
    options = ["start", "--head", "--block", f"--port={port}", "--num-cpus=4", "--include-dashboard=false"]
    environment = {**os.environ, "RAY_raylet_start_wait_time_s": "300", "PYTHONPATH": str(Path(__file__).parents[2])}
    ray = Path(sys.executable).with_name("ray")
    process = subprocess.Popen([ray, *options], env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: "Ray runtime started" in (tmp_path / "log").read_text(), process)
        yield f"127.0.0.1:{port}"
        assert process.poll() is None
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()
        log.close()


def test_workers_of_a_cluster_answer_by_its_address(folder: Path, undisturbed: bytes, cluster: str) -> None:
    code, said = finish(start(folder, "far.jsonl", "--engine", "ray", "--workers", 2, "--address", cluster))
    assert code == 1, said
    assert (folder / "far.jsonl").read_bytes() == undisturbed
    code, said = finish(
        start(folder, "model.jsonl", "--engine", "ray", "--model", "no-such-folder/x", "--address", cluster)
    )
    assert code == 2 and "Traceback" not in said and "no-such-folder" in said
    assert not (folder / "model.jsonl").exists()
