"""The log of a training run: a JSON line per LOG_EVERY steps, a progress bar, and curves drawn from the lines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.objective import Losses
from training.stages import Stage

LOG_EVERY = 25  # steps


class Log:
    """Appends means of LOG_EVERY steps to a file. After a stop, lines of steps that will be done again are removed."""

    def __init__(self, file: Path, done: int, total: int) -> None:
        """
        Args:
          done: steps that are not done again.
          total: steps of the whole run.
        """
        self._file = file
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        lines = [line for line in lines if line["step"] <= done]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._since = time.perf_counter() - (lines[-1]["seconds"] if lines else 0.0)
        self._recent: list[Losses] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Log:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def add(self, step: int, stage: Stage, losses: Losses) -> None:
        """Takes the losses of a step, counted from 1."""
        self._recent.append(losses)
        if step % LOG_EVERY:
            return
        means = {name: float(np.mean([getattr(losses, name) for losses in self._recent])) for name in Losses._fields}
        self._recent.clear()
        line = {"step": step, "stage": stage.name, "seconds": round(time.perf_counter() - self._since, 1), **means}
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        shown = f"{stage.name}: alignment {means['alignment']:.2f}"
        if stage.questions:
            shown += f", answers {means['accuracy']:.3f} right"
        self._progress.update(self._task, completed=step, description=shown)


def draw_curves(log: Path, image: Path) -> None:
    """Draws losses and accuracies against the step."""
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    answering = [line for line in lines if line["accuracy"] or line["answer"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axes, rows, names in (
        (left, lines, ("alignment", "presence")),
        (right, answering, ("answer", "accuracy", "blind_accuracy")),
    ):
        for name, style in zip(names, ("-", "--", ":"), strict=False):
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], style, label=name.replace("_", " "))
        axes.set_xlabel("step")
        axes.legend()
    left.set_yscale("log")
    figure.savefig(image, dpi=120)
    plt.close(figure)
