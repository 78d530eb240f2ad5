"""Answers by the workers of a Ray cluster: actors of Ray Data, each with one model and its compiled programs.

A row of Ray's is a batch, cut as in one process, so that the answers are the same. A worker that dies is replaced and
its batches are computed again; what it had delivered is in the file of answers, which this process alone writes.

Ray is imported here and nowhere else in the package.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import jax

from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.evaluate import record
from sparsevlm_jax.evaluate.engines import place_of
from sparsevlm_jax.generation.batches import Batcher, Numbered, Row
from sparsevlm_jax.text import shortlist

AHEAD = 2  # batches that a worker has: one on its device, one that it prepares
CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
# Of a node that is started here: its processes may need longer than Ray allows on a busy machine, its workers are no
# background jobs, and nothing of the use is reported.
NODE = {"RAY_raylet_start_wait_time_s": "300", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
HELPERS = 2  # CPUs that Ray Data's own actors ask for, beside one for each worker


@dataclass(frozen=True)
class Recipe:
    """What a worker makes its `Batcher` of. It travels as a pickle.

    Attributes:
      load: makes the model.
      settings: what `Batcher` takes beside it.
      folder: where the names of files start that do not start at the root.
      cache: jax's settings of where compiled programs are kept.
    """

    load: Callable[[], Model]
    settings: dict[str, Any]
    folder: str
    cache: dict[str, Any]

    @classmethod
    def here(cls, load: Callable[[], Model], settings: dict[str, Any]) -> Recipe:
        """One that works with files and compiled programs as this process does."""
        return cls(load, settings, os.getcwd(), {name: getattr(jax.config, name) for name in CACHE})

    def batcher(self) -> Batcher:
        """Loads the model.

        Raises:
          UserError: the folder is not there, or the model cannot be loaded.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise UserError(f"{self.folder}: not a folder of {os.uname().nodename}: {error.strerror}") from None
        for name, value in self.cache.items():
            jax.config.update(name, value)
        return Batcher(self.load(), **self.settings)


class Worker:
    """An actor: a model, and what it answers.

    Two threads of Ray's call it: one prepares a batch while the other's is on the device.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._host, self._device = Lock(), Lock()

    @cached_property
    def _batcher(self) -> Batcher:
        # Here and not at its birth, where an error would be Ray's own.
        return self._recipe.batcher()

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return record.settings_of(self._batcher)

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings that its answers depend on, and where it runs."""
        return self._settings, place_of(self._batcher)

    def cut(self, rows: Iterable[Row], done: Collection[int]) -> list[bytes]:
        """What `Batcher.cut` has, pickled."""
        return [pickle.dumps(batch) for batch in self._batcher.cut(rows, done)]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answers a row of Ray's: a pickled batch."""
        with self._host:
            batcher, settings = self._batcher, json.dumps(self._settings)
            prepared = batcher.prepare(pickle.loads(batch["rows"]))
        with self._device:
            return {"settings": settings, "answered": pickle.dumps(batcher.run(prepared))}


class RayEngine:
    """Workers of a cluster, from `connected`."""

    def __init__(self, ray: Any, recipe: Recipe, workers: int | None) -> None:
        self._ray, self._recipe = ray, recipe
        has_gpus = int(ray.cluster_resources().get("GPU", 0))
        self._each = {"num_gpus": 1} if has_gpus else {"num_cpus": 1}
        self.workers = workers or has_gpus or 1
        # It loads the model to say what it is and how questions are cut, and makes room for the others.
        first = ray.remote(max_restarts=-1, max_task_retries=-1, **self._each)(Worker)
        self._first = first.remote(recipe)

    @cached_property
    def _described(self) -> tuple[dict[str, Any], dict[str, Any]]:
        with _as_user_errors():
            return self._ray.get(self._first.describe.remote())

    def settings(self) -> dict[str, Any]:
        return self._described[0]

    def place(self) -> dict[str, Any]:
        return {**self._described[1], "engine": "ray", "workers": self.workers}

    def answers(self, rows: Iterable[Row], done: Collection[int]) -> Iterator[Numbered]:
        """Batches as workers get ready.

        Raises:
          UserError: workers that have other weights or packages than the first one.
        """
        with _as_user_errors():
            batches = self._ray.get(self._first.cut.remote(list(rows), set(done)))
        self._ray.kill(self._first)
        if not batches:
            return
        settings = self.settings()
        asked = [{"rows": batch} for batch in batches]
        with _as_user_errors():
            for answered in self._mapped(asked):
                other = shortlist(sorted(record.differences(settings, json.loads(answered["settings"]))))
                if other:
                    raise UserError(f"a worker is another than the first one ({other}): give all of them the same")
                yield [(number, answer) for number, answer in pickle.loads(answered["answered"]) if number not in done]

    def _mapped(self, asked: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        from ray import data  # pyright: ignore[reportMissingImports]

        logging.getLogger("ray.data").setLevel(logging.ERROR)  # the import has set it
        data.DataContext.get_current().enable_progress_bars = False
        pool = data.ActorPoolStrategy(
            size=self.workers,
            max_tasks_in_flight_per_actor=AHEAD,
            max_concurrent_calls_per_actor=AHEAD,
            enable_true_multi_threading=True,
        )
        # A block for each batch: what a worker has done is delivered at once.
        source = data.from_items(asked, override_num_blocks=len(asked))
        mapped = source.map(Worker, fn_constructor_args=(self._recipe,), compute=pool, **self._each)
        return iter(mapped.iter_rows())


@contextmanager
def connected(recipe: Recipe, workers: int | None = None, address: str | None = None) -> Iterator[RayEngine]:
    """An engine on a cluster, or on one that lives on this machine for as long.

    Args:
      workers: how many; by default one for each GPU of the cluster, and one where there is none.
      address: of a cluster, HOST:PORT of its head, or "auto" on one of its machines. By default RAY_ADDRESS.

    Raises:
      UserError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError('this engine needs Ray: pip install "sparsevlm_jax[ray]"') from None
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if address is None:
        for name, value in NODE.items():
            os.environ.setdefault(name, value)
        cpus = max(os.cpu_count() or 1, (workers or 1) + HELPERS)
        options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"Ray at {address or 'this machine'}: {' '.join(str(error).split())}") from None
    try:
        yield RayEngine(ray, recipe, workers)
    finally:
        ray.shutdown()


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """A worker's UserError as what it was there; Ray wraps it several times."""
    try:
        yield
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None and type(inner) is not UserError:
            inner = getattr(inner, "cause", None) or inner.__cause__
        if inner is None:
            raise
        raise inner from None
