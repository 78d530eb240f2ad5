"""Workers that are alive together and take turns, so that a machine whose speed drifts slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from sparsevlm_jax.bench.machine import shares_a_process
from sparsevlm_jax.bench.shapes import Cell, Side
from sparsevlm_jax.bench.worker import Process, Worker, WorkerError

GATE_TOKENS = 16

Log = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a cell is run.

    Attributes:
      marks: new tokens after which the clock is read, ascending, 1 first; the last is the output's length.
      warm_ups, rounds: turns of every side that do not count, and that do.
      phases: which are timed; none for all of them.
      at_once: processes alive together; None for as many as memory holds.
      gate_rows: rows of a 16-bit batch that are compared with float32.
    """

    device: str
    marks: tuple[int, ...] = (1, 16, 128)
    warm_ups: int = 2
    rounds: int = 7
    phases: tuple[str, ...] = ()
    at_once: int | None = None
    gate_rows: int = 2

    @property
    def gate_tokens(self) -> int:
        """New tokens that are compared among the sides: no more than caches have room for."""
        return min(GATE_TOKENS, self.marks[-1])


class Sitting:
    """One run of some sides in a cell. A side that fails drops out with its reason; the others go on.

    Attributes:
      samples: seconds by side and phase, in the order of the rounds.
      reports: what each worker says of itself: compilation, memory, counts, peaks; of a failed one, why.
      answers: in float32, what every side answers, for the comparison among them.
    """

    def __init__(self, cell: Cell, settings: Settings, log: Log) -> None:
        self.cell, self.settings, self.log = cell, settings, log
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.answers: dict[Side, Any] = {}
        self._workers: list[Worker] = []
        self._shared: Process | None = None

    def run(self, sides: Sequence[Side], after_round: Callable[[], None] = lambda: None) -> None:
        """Starts workers, takes all turns, and asks for reports.

        Args:
          after_round: called when `samples` has another round.
        """
        with ExitStack() as stack:
            self._start(sides, stack)
            self._prepare()
            for worker in list(self._workers):
                self._warm_up(worker)
            for number in range(self.settings.rounds):
                self.log(f"  round {number + 1} of {self.settings.rounds}")
                self._round(number)
                after_round()
            self._report()

    def _start(self, sides: Sequence[Side], stack: ExitStack) -> None:
        """Starts workers, all at once: they draw their weights."""
        self.log(f"  starting {', '.join(side.name for side in sides)}")
        self.reports |= {side.name: {} for side in sides}
        room, device = self.settings.marks[-1], self.settings.device
        for worker in [Worker(self.cell, side, room, device, self._process_of(side, stack)) for side in sides]:
            try:
                self._workers.append(stack.enter_context(worker))
            except WorkerError as error:
                self._fail(worker.side, error)

    def _prepare(self) -> None:
        """Has workers compile what is timed by itself, all at once on a CPU. A GPU's compiler times its candidates:
        nothing may run beside it."""
        alone = [[worker] for worker in self._workers]
        for group in [list(self._workers)] if self.settings.device == "cpu" else alone:
            for worker in group:
                worker.post("prepare", phases=self.settings.phases)
            for worker in group:
                self._received(worker)

    def _process_of(self, side: Side, stack: ExitStack) -> Process | None:
        """The process that the side shares with others of this sitting; None for one of its own."""
        if not shares_a_process(side, self.settings.device):
            return None
        if self._shared is None:
            self._shared = stack.enter_context(Process(self.settings.device))
        return self._shared

    def _warm_up(self, worker: Worker) -> None:
        """Compiles, takes the turns that do not count, and answers for the comparison.

        In that order: of a process's first run PyTorch's cosines were 1.5e-4 off at times, at angles in the thousands.
        """
        self.log(f"  {worker.side.name}: compiling")
        self.reports[worker.side.name]["compile"] = self._ask(worker, "compile")
        for _ in range(self.settings.warm_ups):
            self._turn(worker)
        if self.cell.dtype == "float32":
            answer = self._ask(worker, "answer", new_tokens=self.settings.gate_tokens)
            self.answers |= {} if answer is None else {worker.side: answer}
        self._ask(worker, "settle")

    def _round(self, number: int) -> None:
        """A turn of every worker; who begins changes."""
        shift = number % max(1, len(self._workers))
        for worker in (*self._workers[shift:], *self._workers[:shift]):
            for phase, seconds in self._turn(worker).items():
                self.samples.setdefault(worker.side.name, {}).setdefault(phase, []).append(seconds)

    def _turn(self, worker: Worker) -> dict[str, float]:
        return self._ask(worker, "turn", marks=self.settings.marks, phases=self.settings.phases) or {}

    def _report(self) -> None:
        """What workers say of themselves. What is timed is asked of one after the other, counts of all at once."""
        for worker in list(self._workers):
            self.reports[worker.side.name] |= self._ask(worker, "report") or {}
        for worker in self._workers:
            worker.post("facts")
        for worker in list(self._workers):
            self.reports[worker.side.name]["facts"] = self._counted(worker)
        if self._workers:  # every side takes the same images by the same processor
            seconds = self._ask(self._workers[-1], "preprocess")
            for worker in self._workers:
                self.reports[worker.side.name]["preprocess_s"] = seconds

    def _ask(self, worker: Worker, what: str, **arguments: Any) -> Any:
        """The worker's answer; None where it fails or has failed before."""
        if worker not in self._workers:
            return None
        worker.post(what, **arguments)
        return self._received(worker)

    def _received(self, worker: Worker) -> Any:
        """The answer to what was posted; None where the worker failed, which drops out then."""
        try:
            return worker.receive()
        except WorkerError as error:
            self._workers.remove(worker)
            worker.close()
            self._fail(worker.side, error)
            return None

    def _counted(self, worker: Worker) -> dict[str, Any]:
        """The worker's counts. A side that cannot count keeps what was timed: that is over, and took minutes."""
        try:
            return worker.receive()
        except WorkerError as error:
            self.log(f"  {worker.side.name}: not counted: {error}")
            return {}

    def _fail(self, side: Side, error: WorkerError) -> None:
        self.log(f"  {side.name} failed: {error}")
        self.answers[side] = str(error)
