"""A bar on stderr: how much is done, how fast, and how long the rest will take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(verb: str, total: int, done: int = 0, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields what to call with a number of further things that are done; nothing shows where stderr is no terminal.

    Args:
      done: things that were there before; the rate does not count them.
    """
    if not show or sys.stderr is None or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    class Rate(ProgressColumn):
        def render(self, task):  # noqa: ANN001, ANN202 (rich's own)
            from rich.text import Text

            return Text("" if task.speed is None else f"{task.speed:.2f}/s")

    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
