"""Clocks, samples and memory of one process."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparsevlm_jax.process import memory


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, which has to wait for the device itself, and its seconds."""
    began = time.perf_counter()
    result = run()
    return result, time.perf_counter() - began


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 5th and 95th percentile (linear between samples) and number of samples."""
    if len(samples) < 2:
        return {"p50": samples[0], "p5": samples[0], "p95": samples[0], "n": len(samples)}
    cuts = statistics.quantiles(samples, n=20, method="inclusive")
    return {"p50": statistics.median(samples), "p5": cuts[0], "p95": cuts[-1], "n": len(samples)}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forget_peak_memory() -> int:
    """Gives freed memory back and lets the kernel's peak of resident memory begin anew (on Linux).

    Returns:
      Resident bytes now.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return memory()["VmRSS"]


def peak_resident_bytes() -> int:
    """Peak of resident memory since `forget_peak_memory`; 0 where the kernel does not say."""
    return memory()["VmHWM"]
