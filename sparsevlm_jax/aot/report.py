"""What compiling for a device has shown, as plain numbers for JSON."""

from __future__ import annotations

from typing import Any

from sparsevlm_jax.aot.compile_for import Compiled, CompiledAnswer
from sparsevlm_jax.aot.devices import Device
from sparsevlm_jax.aot.scopes import PRUNING


def answer_report(answer: CompiledAnswer, device: Device) -> dict[str, Any]:
    """Bytes, seconds of compiling, kernels by phase, and the roofline's seconds, which are predictions."""
    programs = answer.programs
    return {
        "lengths": list(programs.lengths),
        "parameter_bytes": programs.parameters,
        "cache_bytes": programs.cache,
        "memory_bytes": answer.memory,
        "left_bytes": device.memory - answer.memory,
        "prefill": program_report(answer.prefill, device),
        "decode": program_report(answer.decode, device),
    }


def program_report(program: Compiled, device: Device) -> dict[str, Any]:
    exchanged = program.collectives
    predicted, kernels = program.seconds_by_phase(device), program.launches()
    return {
        "compile_seconds": round(program.seconds, 1),
        "argument_bytes": program.arguments,
        "output_bytes": program.output,
        "temporary_bytes": program.temporaries,
        "kernels": sum(kernels.values()),
        "kernels_by_phase": kernels,
        "collectives": sum(number for number, _ in exchanged.values()),
        "collective_bytes": sum(size for _, size in exchanged.values()),
        "collectives_by_kind": {kind: {"arrays": number, "bytes": size} for kind, (number, size) in exchanged.items()},
        "moved_bytes": sum(kernel.times * kernel.bytes for kernel in program.kernels),
        "flops": sum(kernel.times * kernel.flops for kernel in program.kernels),
        "predicted_seconds": sum(predicted.values()),
        "predicted_seconds_by_phase": predicted,
    }


def kernels_of_a_point(dense: dict[str, Any], pruned: dict[str, Any], points: int) -> tuple[float, float]:
    """Kernels that a pruning layer adds to a prefill: those in its own scopes, and all, rating left out of both.

    Args:
      dense, pruned: `program_report` of the prefills.
      points: pruning layers.
    """
    phases = pruned["kernels_by_phase"]
    own = sum(phases.get(phase, 0) for phase in PRUNING if phase != "rate")
    more = pruned["kernels"] - dense["kernels"] - phases.get("rate", 0)
    return own / points, more / points
