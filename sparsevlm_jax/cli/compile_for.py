"""`sparsevlm plan --compile-for`: both programs of an answer compiled for a device that need not be here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from sparsevlm_jax.aot.compile_for import Deployment, TooLargeError, compile_for, largest_batch
from sparsevlm_jax.aot.devices import DEVICES, Device, require_compiler
from sparsevlm_jax.aot.programs import Prompts
from sparsevlm_jax.aot.report import answer_report, kernels_of_a_point
from sparsevlm_jax.aot.scopes import OTHER, PHASES
from sparsevlm_jax.cli.options import note
from sparsevlm_jax.config import DTYPES, ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.layout import ImageLayout
from sparsevlm_jax.models.quantize import check_quantize
from sparsevlm_jax.parallel.mesh import ONE, MeshShape
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.text import in_bytes

NEW_TOKENS = 128


@dataclass(frozen=True)
class CompileOptions:
    """For what to compile, if at all."""

    compile_for: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help=f"Also compile for one of {', '.join(DEVICES)}, which need not be here: memory, kernels, a roofline.",
        ),
    ] = None
    batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Prompts at a time, for --compile-for; default: 1.")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(metavar="D", help="float32, bfloat16 or float16, for --compile-for; default: bfloat16."),
    ] = None
    mesh: Annotated[
        str | None, typer.Option(metavar="tensor=N", help="Several such devices, for --compile-for; see ask --mesh.")
    ] = None

    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Hold the weights of the decoder's layers in eight bits.")
    ] = None

    @property
    def shape(self) -> MeshShape:
        return ONE if self.mesh is None else MeshShape.parse(self.mesh)

    def device(self) -> Device | None:
        """The device, its compiler ready; None if nothing is to be compiled.

        Raises:
          UserError: an unknown device or dtype, no compiler for it, or options that would have no effect.
        """
        for name, value in (("--batch", self.batch), ("--dtype", self.dtype), ("--mesh", self.mesh)):
            if value is not None and self.compile_for is None:
                raise UserError(f"{name} {value}: has an effect with --compile-for only")
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}")
        check_quantize(self.quantize)
        if self.compile_for is None:
            return None
        _ = self.shape
        if self.compile_for not in DEVICES:
            raise UserError(f"--compile-for {self.compile_for}: expected one of {', '.join(DEVICES)}")
        device = DEVICES[self.compile_for]
        try:
            require_compiler(device)
        except UserError as error:
            raise UserError(f"--compile-for {error}") from None
        return device

    def report(
        self,
        device: Device,
        config: ModelConfig,
        layouts: Sequence[ImageLayout],
        text_tokens: int,
        sides: dict[str, Sparsity],
    ) -> dict[str, Any]:
        """Of each side by name; see `aot.report.answer_report`."""
        deployment = Deployment(device, self.shape, self.dtype or "bfloat16", self.quantize)
        prompts = Prompts(self.batch or deployment.mesh.data, tuple(layouts), text_tokens, NEW_TOKENS)
        note(f"compiling for {device.name}: this takes minutes")
        return {
            "device": device.name,
            "mesh": str(deployment.mesh),
            "batch": prompts.batch,
            "dtype": deployment.dtype,
            "quantize": deployment.quantize,
            "new_tokens": NEW_TOKENS,
            "device_memory_bytes": device.memory,
            **{name: _side(name, config, sparsity, prompts, deployment) for name, sparsity in sides.items()},
        }


def print_report(report: dict[str, Any]) -> None:
    """Two tables: memory, and kernels with the roofline by phase."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    sides = {name: report[name] for name in ("dense", "pruned")}
    several = MeshShape.parse(report["mesh"]) != ONE
    held = " and ".join(filter(None, (report["quantize"], report["dtype"])))
    console.print(
        f"Compiled for {report['device']} ({in_bytes(report['device_memory_bytes'])}), batch {report['batch']}, "
        f"{held}, room for {report['new_tokens']} new tokens"
        + (f"; on each device of the mesh {report['mesh']}:" if several else ":")
    )
    if all("does_not_fit" in side for side in sides.values()):
        console.print(f"{sides['dense']['does_not_fit']}, dense or pruned; --mesh tensor=N shares them")
        return
    console.print(_memory_table(sides))
    if any("does_not_fit" in side for side in sides.values()):
        return
    for part, what in (("prefill", "tower, prefill, first token"), ("decode", "one step of decoding")):
        console.print(_phases_table(what, {name: side[part] for name, side in sides.items()}))
    points = len(sides["pruned"]["lengths"]) - 1
    if points:
        scopes, everything = kernels_of_a_point(sides["dense"]["prefill"], sides["pruned"]["prefill"], points)
        console.print(f"A pruning layer adds {scopes:.0f} kernels of its own, {everything:.0f} in all.")
    console.print(
        "Times are predictions, not measured: for each kernel the larger of bytes / bandwidth and FLOPs / peak."
    )


def _side(
    name: str, config: ModelConfig, sparsity: Sparsity, prompts: Prompts, deployment: Deployment
) -> dict[str, Any]:
    note(f"  {name}: batch {prompts.batch}")
    try:
        with _quiet():
            answer = compile_for(config, sparsity, prompts, deployment)
    except TooLargeError as error:
        return {"does_not_fit": str(error)}
    note(f"  {name}: the largest batch that fits")
    with _quiet():
        largest = largest_batch(config, sparsity, prompts, deployment, [answer])
    return answer_report(answer, deployment.device) | {"largest_batch": largest}


def _memory_table(sides: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    rows = {
        "parameters": lambda side: in_bytes(side["parameter_bytes"]),
        "keys and values": lambda side: in_bytes(side["cache_bytes"]),
        "temporaries of the prefill": lambda side: in_bytes(side["prefill"]["temporary_bytes"]),
        "temporaries of decoding": lambda side: in_bytes(side["decode"]["temporary_bytes"]),
        "left of the device's memory": lambda side: _left(side["left_bytes"]),
        "largest batch that fits": lambda side: str(side["largest_batch"]),
        "compiling, prefill and decoding": lambda side: " and ".join(
            f"{side[part]['compile_seconds']} s" for part in ("prefill", "decode")
        ),
        "exchanged in the prefill": lambda side: _collectives(side["prefill"]),
        "exchanged in a step of decoding": lambda side: _collectives(side["decode"]),
    }
    table = Table("", *sides)
    for name, cell in rows.items():
        table.add_row(name, *("does not fit" if "does_not_fit" in side else cell(side) for side in sides.values()))
    return table


def _left(number: int) -> str:
    return in_bytes(number) if number >= 0 else f"none: {in_bytes(-number)} too few"


def _collectives(part: dict[str, Any]) -> str:
    kinds = part["collectives_by_kind"].items()
    return "; ".join(f"{each['arrays']} {kind}, {in_bytes(each['bytes'])}" for kind, each in kinds) or "none"


def _phases_table(what: str, sides: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(what, *(f"{name}: kernels, time at least" for name in sides))
    for phase in (*PHASES, OTHER):
        counts = [
            (s["kernels_by_phase"].get(phase, 0), s["predicted_seconds_by_phase"].get(phase, 0)) for s in sides.values()
        ]
        if any(number for number, _ in counts):
            table.add_row(
                phase, *(f"{number}, {1000 * seconds:.3f} ms" if number else "-" for number, seconds in counts)
            )
    totals = [(side["kernels"], side["predicted_seconds"]) for side in sides.values()]
    table.add_row("all", *(f"{number}, {1000 * seconds:.2f} ms" for number, seconds in totals))
    return table


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the compilers write to the process's stderr about devices and services that they miss."""
    if sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
