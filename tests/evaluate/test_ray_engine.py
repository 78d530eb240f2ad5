"""The engine of Ray without Ray: what it asks of a cluster, and what becomes of what its workers deliver."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsevlm_jax import Model, UserError
from sparsevlm_jax.cli import main
from sparsevlm_jax.evaluate import ray_engine
from sparsevlm_jax.evaluate.ray_engine import RayEngine, Recipe, Worker
from sparsevlm_jax.evaluate.run import Job, run
from tests import hf
from tests.evaluate import sets
from tests.evaluate.sets import BATCH, NEW, SPARSITY, write_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return sets.speaking(hf.tiny_llava(tmp_path_factory.mktemp("ray") / "model", layers=2))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    images = sets.write_images(tmp_path / "images")
    return Job(write_lines(tmp_path / "q.jsonl", sets.questions()), images, tmp_path / "a.jsonl")


class Cluster:
    """As much of Ray as the engine asks of it; actors live in this process."""

    def __init__(self, gpus: int = 0) -> None:
        self.gpus, self.asked, self.killed = gpus, {}, 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, "GPU": float(self.gpus)} if self.gpus else {"CPU": 8.0}

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.asked = options
        return lambda actor: SimpleNamespace(remote=lambda *args: _Handle(actor(*args)))

    def get(self, value: Any) -> Any:
        return value

    def kill(self, _: Any) -> None:
        self.killed += 1


class _Handle:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


def recipe(model: Model) -> Recipe:
    return Recipe.here(lambda: model, {"sparsity": SPARSITY, "batch_size": BATCH, "max_new_tokens": NEW})


def engine(
    model: Model, monkeypatch: pytest.MonkeyPatch, worker: Callable[[], Worker], cluster: Any = None
) -> RayEngine:
    """One whose batches come back last first, and each of them twice."""

    def mapped(_: RayEngine, asked: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        own = worker()
        return (own(batch) for batch in reversed(asked) for _ in range(2))

    monkeypatch.setattr(RayEngine, "_mapped", mapped)
    return RayEngine(cluster or Cluster(), recipe(model), None)


def test_whatever_order_workers_deliver_in_the_answers_are_those_of_one_process(
    model: Model, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.answer(model, replace(job, answers=job.answers.with_name("one.jsonl")))
    cluster = Cluster()
    made = engine(model, monkeypatch, lambda: Worker(recipe(model)), cluster)
    summary = run(made, replace(job, limit=5), job.read())
    assert (summary["answered"], summary["engine"], summary["workers"], cluster.killed) == (5, "ray", 1, 1)
    assert run(made, job, job.read())["answered"] == 4
    assert job.answers.read_bytes() == job.answers.with_name("one.jsonl").read_bytes()
    with pytest.raises(UserError, match="suffix was None, now"):
        run(made, replace(job, suffix="Say it."), job.read())


def test_a_worker_with_other_weights_than_the_first_is_refused(
    model: Model, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    projector = model.params["multi_modal_projector"]
    moved = {**projector, "linear_1": {**projector["linear_1"], "bias": projector["linear_1"]["bias"] + 1}}
    other = replace(model, params={**model.params, "multi_modal_projector": moved})
    made = engine(model, monkeypatch, lambda: Worker(recipe(other)))
    with pytest.raises(UserError, match="a worker is another than the first one .model.weights was"):
        run(made, job, job.read())
    assert not job.answers.read_bytes()


def test_a_worker_gets_a_gpu_where_there_are_some(model: Model) -> None:
    cluster = Cluster(gpus=3)
    assert RayEngine(cluster, recipe(model), None).workers == 3 and cluster.asked["num_gpus"] == 1
    assert RayEngine(cluster, recipe(model), 2).workers == 2
    assert RayEngine(cpus := Cluster(), recipe(model), None).workers == 1 and cpus.asked["num_cpus"] == 1


def test_a_folder_that_a_worker_does_not_have_is_named(model: Model) -> None:
    with pytest.raises(UserError, match="/nowhere: not a folder of .*: No such file"):
        replace(recipe(model), folder="/nowhere").batcher()


def test_a_workers_error_is_what_it_was_there() -> None:
    outer = RuntimeError("Ray's")
    outer.cause = OSError("Ray's own")  # type: ignore[attr-defined]
    outer.cause.__cause__ = UserError("keep 0: at least 1")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="^keep 0: at least 1$"), ray_engine._as_user_errors():
        raise outer
    with pytest.raises(KeyError), ray_engine._as_user_errors():
        raise KeyError("a bug")


def test_the_command_says_what_is_missing_and_what_does_not_go_together(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    options = ["answer", "--questions", job.questions, "--images", job.images, "--answers", job.answers]
    for more, message in (
        (("--engine", "ray"), 'needs Ray: pip install "sparsevlm_jax[ray]"'),
        (("--workers", 2), "--workers and --address go with --engine ray"),
        (("--engine", "spark"), "--engine spark: expected local or ray"),
    ):
        with pytest.raises(SystemExit) as stop:
            main.main([*map(str, [*options, *more])])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not job.answers.exists()
