"""Compiled programs with a clock."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import jax

LOG = logging.getLogger("sparsevlm_jax")  # "compiling" and "compiled", at level INFO, around every compilation


class Programs:
    """Compiled programs, each by what it was compiled for, and the seconds that compiling them took.

    What is compiled is kept, so that the next piece of an answer neither lowers nor looks for it again. Threads share
    it; each has seconds of its own, and one that needs what another is compiling waits.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Any] = {}
        self._compiling, self._own = threading.Lock(), threading.local()

    @property
    def compile_seconds(self) -> float:
        """What compiling for this thread has taken."""
        return getattr(self._own, "seconds", 0.0)

    def timed(self, program: Any, *args: Any, **static: Any) -> tuple[Any, float]:
        """Runs a jitted program and returns its seconds; compiling comes before, on a clock of its own.

        The first argument, the parameters, is the same every time.
        """
        leaves, structure = jax.tree.flatten(args[1:])
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        key = (program, tuple(static.items()), structure, shapes)
        with self._compiling:
            began = time.perf_counter()
            if key not in self._compiled:
                LOG.info("compiling")
                self._compiled[key] = program.lower(*args, **static).compile()
                LOG.info("compiled")
                self._own.seconds = self.compile_seconds + time.perf_counter() - began
        began = time.perf_counter()
        out = jax.block_until_ready(self._compiled[key](*args))
        return out, time.perf_counter() - began
