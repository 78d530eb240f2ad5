"""Compiled programs with a clock."""

from __future__ import annotations

import logging
import time
from typing import Any

import jax

LOG = logging.getLogger("sparsevlm_jax")  # "compiling" and "compiled", at level INFO, around every compilation


class Programs:
    """Compiled programs, each by what it was compiled for, and the seconds that compiling them took.

    What is compiled is kept, so that the next piece of an answer neither lowers nor looks for it again.
    """

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self._compiled: dict[Any, Any] = {}

    def timed(self, program: Any, *args: Any, **static: Any) -> tuple[Any, float]:
        """Runs a jitted program and returns its seconds; compiling comes before, on a clock of its own.

        The first argument, the parameters, is the same every time.
        """
        began = time.perf_counter()
        leaves, structure = jax.tree.flatten(args[1:])
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        key = (program, tuple(static.items()), structure, shapes)
        if key not in self._compiled:
            LOG.info("compiling %s", program.__name__)
            self._compiled[key] = program.lower(*args, **static).compile()
            LOG.info("compiled %s", program.__name__)
        compiled = time.perf_counter()
        self.compile_seconds += compiled - began
        out = jax.block_until_ready(self._compiled[key](*args))
        return out, time.perf_counter() - compiled
