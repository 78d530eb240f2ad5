"""The machine: its device, its memory, its name."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsevlm_jax.bench.shapes import Cell, Side
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.parameters import abstract_params, tree_bytes

RESERVE = 0.9  # of the free memory; the rest is for what nobody counted


def find_device(wanted: str) -> str:
    """The device to run on, "cpu" or "gpu": the one that is wanted; with "auto" a GPU where the driver shows one.

    Raises:
      UserError: another word.
    """
    if wanted not in ("auto", "cpu", "gpu"):
        raise UserError(f'device="{wanted}": expected auto, cpu or gpu')
    if wanted != "auto":
        return wanted
    try:
        return "gpu" if free_bytes("gpu") else "cpu"
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return "cpu"


def free_bytes(device: str) -> int:
    """Memory that is free: the GPU's, or the host's."""
    if device == "gpu":
        query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]) * 2**20
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def worker_bytes(cell: Cell) -> int:
    """About what a worker takes: weights, written-out attention of a layer, activations, libraries."""
    text = cell.config.text
    weights = tree_bytes(abstract_params(cell.config, cell.dtype))
    attention = 3 * 4 * cell.batch * text.num_attention_heads * cell.length**2
    activations = 8 * 4 * cell.batch * cell.length * text.intermediate_size
    return round(1.05 * weights) + attention + activations + 2**30


def shares_a_process(side: Side, device: str) -> bool:
    """Whether a side lives with others of a sitting in one process, on one copy of the weights.

    On a GPU the JAX sides do: drawing 7B weights anew for each would take longer than timing them.
    """
    return device == "gpu" and side.engine == "jax"


def seat(cell: Cell, sides: Sequence[Side], device: str, at_once: int | None) -> list[list[Side]]:
    """Sides in sittings that memory holds, or of at most `at_once` processes; the first side is in each of them."""
    if not sides:
        return []
    most = at_once or int(free_bytes(device) * RESERVE / worker_bytes(cell))
    sittings = [[sides[0]]]
    for side in sides[1:]:
        if len(sittings[-1]) > 1 and processes([*sittings[-1], side], device) > most:
            sittings.append([sides[0]])
        sittings[-1].append(side)
    return sittings


def processes(sides: Sequence[Side], device: str) -> int:
    """How many processes the sides live in."""
    sharing = [shares_a_process(side, device) for side in sides]
    return sharing.count(False) + any(sharing)


def environment(device: str) -> dict[str, Any]:
    """Machine and day; versions are in the workers' own reports."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": device,
        "processor": names[0] if names else platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }
