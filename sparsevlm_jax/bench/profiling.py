"""A profiler's trace of one answer, and where its time went by the code's own named scopes.

The trace itself (for TensorBoard's or xprof's viewer) carries XLA's instruction names; the compiled program says which
named scope each instruction came from.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from sparsevlm_jax.aot.scopes import phase_of
from sparsevlm_jax.bench.jax_side import NEEDED_TO_ANSWER, JaxRunner

CONTAINERS = ("while", "conditional", "call")  # instructions whose time is that of others
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


def profile(runner: JaxRunner, folder: Path, new_tokens: int) -> dict[str, dict[str, float]]:
    """Traces an answer into `folder`.

    Returns:
      Program -> phase -> seconds, summed over the device's threads or streams.
    """
    runner.generate((1, new_tokens))
    with jax.profiler.trace(str(folder)):
        runner.generate((1, new_tokens))
    traces = sorted(folder.glob("**/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    scopes = {name: phases_of(runner.program(name).as_text()) for name in NEEDED_TO_ANSWER}
    return seconds_by_phase(ProfileData.from_file(str(traces[-1])), scopes)


def phases_of(program: str) -> dict[str, str]:
    """Phase of every instruction of a compiled program, by its name."""
    return {name: phase_of(scope) for name, scope in _INSTRUCTION.findall(program)}


def seconds_by_phase(trace: Any, scopes: dict[str, dict[str, str]]) -> dict[str, dict[str, float]]:
    """Sums the trace's events: one for each instruction that ran."""
    found: dict[str, dict[str, float]] = {name: defaultdict(float) for name in scopes}
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                program = str(stats.get("hlo_module", "")).removeprefix("jit_").split("(")[0].split(".")[0]
                instruction = str(stats.get("hlo_op", ""))
                if instruction in scopes.get(program, {}) and not instruction.startswith(CONTAINERS):
                    found[program][scopes[program][instruction]] += event.duration_ns * 1e-9
    return {name: dict(phases) for name, phases in found.items()}
