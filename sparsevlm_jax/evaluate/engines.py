"""What answers the questions of a job: this process; `ray_engine.py` has workers on a cluster."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax

from sparsevlm_jax.evaluate import record
from sparsevlm_jax.generation.batches import Batcher, Numbered, Row


@runtime_checkable
class Engine(Protocol):
    """Answers questions, batch by batch."""

    def settings(self) -> dict[str, Any]:
        """Everything that an answer depends on, as JSON has it."""
        ...

    def answers(self, rows: Iterable[Row], done: Collection[int]) -> Iterator[Numbered]:
        """Numbers of rows and their answers, in batches that are those of `Batcher.answers`, in any order."""
        ...

    def place(self) -> dict[str, Any]:
        """Where it runs and how many rows at a time, for the record."""
        ...


@dataclass(frozen=True)
class Local:
    """This process and its devices."""

    batcher: Batcher

    def settings(self) -> dict[str, Any]:
        return record.settings_of(self.batcher)

    def answers(self, rows: Iterable[Row], done: Collection[int]) -> Iterator[Numbered]:
        return self.batcher.answers(rows, done)

    def place(self) -> dict[str, Any]:
        return place_of(self.batcher)


def place_of(batcher: Batcher) -> dict[str, Any]:
    """The batch size, and the device of this process."""
    return {
        "batch_size": batcher.batch_size,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }
