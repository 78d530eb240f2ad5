"""Says on stderr why nothing happens: compiling a program for the first time takes from seconds to a minute."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from sparsevlm_jax.cli.options import note
from sparsevlm_jax.generation.programs import LOG

PATIENCE = 2.0  # seconds; a program from the cache takes less
TEXT = "compiling for this model, plan and length of prompt; kept for later runs"


class _Notice(logging.Handler):
    """A line when a compilation has taken `PATIENCE` and goes on; once a run."""

    said = False
    timer: Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if record.getMessage().startswith("compiling") and not self.said:
            self.timer = Timer(PATIENCE, self._say)
            self.timer.daemon = True
            self.timer.start()

    def _say(self) -> None:
        self.said = True
        note(TEXT)

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().close()


@contextmanager
def compilation_notice() -> Iterator[None]:
    handler, level = _Notice(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False  # some libraries print whatever reaches the root
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = True
        handler.close()
