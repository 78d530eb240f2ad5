"""Both programs of an answer compiled for an accelerator: what they take of its memory, launch, and cost at least."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from sparsevlm_jax.aot.devices import Device, chips
from sparsevlm_jax.aot.hlo import Program, parse
from sparsevlm_jax.aot.programs import Lowered, Prompts, lowered
from sparsevlm_jax.aot.roofline import COLLECTIVES, Kernel, exchanged, kernels
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.parallel.mesh import ONE, MeshShape, make_mesh
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.text import in_bytes

# There is nothing to time kernels on. XLA writes the kernels of products itself then, with fixed tiles; where these do
# not go with a product's shape it says so, and cuBLAS, which a device often prefers, takes all products.
_NO_TIMING = {"xla_gpu_autotune_level": 0}
_OPTIONS = {"cuda": (_NO_TIMING, {**_NO_TIMING, "xla_gpu_enable_triton_gemm": False}), "tpu": ({},)}
_NO_TILES = "Couldn't find output tile sizes"
_TRIES = 3  # compilations that look for the largest batch, besides the two that its search begins with
_SECOND, _MOST = 8, 1024  # batches: the second that is looked at, and the largest


@dataclass(frozen=True)
class Deployment:
    """What programs are compiled for: a device or several, and what weights and activations are held in there.

    Attributes:
      quantize: as for `load`.
    """

    device: Device
    mesh: MeshShape = ONE
    dtype: str = "bfloat16"
    quantize: str | None = None


class TooLargeError(UserError):
    """The compiler itself refuses what its device has no memory for."""


@dataclass(frozen=True)
class Compiled:
    """One program.

    Attributes:
      seconds: that compiling took here.
      arguments, output, shared, temporaries: bytes; `shared` are those of outputs that take the place of arguments.
      text: the optimised program, as XLA prints it.
      only_loop: of the kernels only those in the loop count, for one turn: a step of decoding.
    """

    seconds: float
    arguments: int
    output: int
    shared: int
    temporaries: int
    text: str
    only_loop: bool

    @property
    def memory(self) -> int:
        """Bytes that a device has to have while it runs."""
        return self.arguments + self.output - self.shared + self.temporaries

    @cached_property
    def program(self) -> Program:
        return parse(self.text)

    @cached_property
    def kernels(self) -> list[Kernel]:
        return [kernel for kernel in kernels(self.program) if kernel.looped or not self.only_loop]

    def launches(self) -> dict[str, int]:
        """Kernels by phase."""
        return _by_phase(self.kernels, lambda kernel: kernel.times)

    def seconds_by_phase(self, device: Device) -> dict[str, float]:
        """What each takes at least: a prediction."""
        return _by_phase(self.kernels, lambda kernel: kernel.seconds(device))

    @property
    def collectives(self) -> dict[str, tuple[int, int]]:
        """By kind how many arrays are exchanged, and the bytes of the results on each device."""
        total: dict[str, tuple[int, int]] = {}
        for kernel in self.kernels:
            kind = next((kind for kind in COLLECTIVES if kernel.instruction.opcode.startswith(kind)), None)
            if kind is not None:
                number, size = total.get(kind, (0, 0))
                arrays = exchanged(kernel.instruction)
                total[kind] = number + kernel.times * len(arrays), size + kernel.times * sum(s.bytes for s in arrays)
        return total


@dataclass(frozen=True)
class CompiledAnswer:
    """Prefill with the first token, and the decoding loop, compiled; `programs` is what was lowered."""

    programs: Lowered
    prefill: Compiled
    decode: Compiled

    @property
    def memory(self) -> int:
        return max(self.prefill.memory, self.decode.memory)


def compile_for(config: ModelConfig, sparsity: Sparsity, prompts: Prompts, deployment: Deployment) -> CompiledAnswer:
    """Compiles what `generate` would run for such a batch there.

    Raises:
      UserError: the compiler is not there, the budget cannot be met, or the mesh divides model or batch unevenly.
      TooLargeError: the compiler says that the device's memory does not hold it.
    """
    device, mesh = deployment.device, deployment.mesh
    found = chips(device, mesh.devices)
    where = found[0] if mesh == ONE else make_mesh(mesh, found)
    programs = lowered(config, sparsity, prompts, deployment.dtype, where, device.platform, deployment.quantize)
    if programs.parameters + programs.cache > device.memory:
        raise _too_large(device)
    prefill, decode = (
        _compiled(program, device, only_loop)
        for program, only_loop in ((programs.start, False), (programs.decode, True))
    )
    return CompiledAnswer(programs, prefill, decode)


def largest_batch(
    config: ModelConfig,
    sparsity: Sparsity,
    prompts: Prompts,
    deployment: Deployment,
    known: Sequence[CompiledAnswer],
) -> int:
    """The largest batch of such prompts that the devices' memory holds, found by compiling a few.

    Args:
      prompts: their own batch does not matter.
      known: what has been compiled before, at least one.
    """
    rows, limit = deployment.mesh.data, deployment.device.memory

    def memory(batch: int) -> int | None:
        try:
            return compile_for(config, sparsity, replace(prompts, batch=rows * batch), deployment).memory
        except TooLargeError:
            return None

    first = known[0].programs
    bound = (limit - first.parameters) // (first.cache // (first.batch // rows))
    found = {answer.programs.batch // rows: answer.memory for answer in known}
    return rows * search(memory, limit, max(2, min(_SECOND, bound // 2)), found)


def search(memory: Callable[[int], int | None], limit: int, second: int, known: Mapping[int, int]) -> int:
    """The largest batch whose memory is within the limit, where memory grows about linearly.

    Two batches, 1 and `second`, say where it would be; that is looked at, and looked for again on the line through
    what was found, a few times.

    Args:
      memory: bytes of a batch; None where they are more than can be.
      known: bytes of batches that need not be looked at.

    Returns:
      A batch that was looked at and fits, 1024 at most; 0 where not even one row does.
    """
    found: dict[int, int | None] = dict(known)
    for batch in (1, second):
        if len(found) < 2 and batch not in found and None not in found.values():
            found[batch] = memory(batch)
    for _ in range(_TRIES):
        guess = _guess(found, limit)
        if guess in found:
            break
        found[guess] = memory(guess)
    return max((batch for batch, taken in found.items() if taken is not None and taken <= limit), default=0)


def _guess(found: Mapping[int, int | None], limit: int) -> int:
    """The next batch to look at: where a line through two that are known meets the limit; one that is known, where no
    other can be better."""
    fits = sorted((batch, taken) for batch, taken in found.items() if taken is not None and taken <= limit)
    high = min(set(found) - {batch for batch, _ in fits}, default=None)
    if not fits:
        return 1
    low, taken = fits[-1]
    above = None if high is None else found[high]
    if high is not None and above is None:
        return (low + high) // 2
    before = fits[-2] if len(fits) > 1 else (0, 0)
    batch, other = before if high is None or above is None else (high, above)
    guess = low + int((limit - taken) / max((other - taken) / (batch - low), 1))
    return min(guess, _MOST) if high is None else min(guess, high - 1)


def _compiled(program: Any, device: Device, only_loop: bool) -> Compiled:
    made, seconds = _compile(program, device)
    taken = made.memory_analysis()
    return Compiled(
        seconds,
        taken.argument_size_in_bytes,
        taken.output_size_in_bytes,
        taken.alias_size_in_bytes,
        taken.temp_size_in_bytes,
        made.as_text(),
        only_loop,
    )


def _compile(program: Any, device: Device) -> tuple[Any, float]:
    """The executable, and the seconds of the attempt that succeeded."""
    *attempts, last = _OPTIONS[device.platform]
    for options in attempts:
        try:
            return _timed(program, device, options)
        except jax.errors.JaxRuntimeError as error:
            if _NO_TILES not in str(error):
                raise
    return _timed(program, device, last)


def _timed(program: Any, device: Device, options: dict[str, Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    try:
        with _uncached():
            made = program.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_large(device) from error
    return made, time.perf_counter() - began


def _too_large(device: Device) -> TooLargeError:
    return TooLargeError(f"{device.name}: its memory, {in_bytes(device.memory)}, does not hold the programs")


@contextmanager
def _uncached() -> Iterator[None]:
    """Without programs that an earlier process kept: they would take no time."""
    settings: Any = jax.config
    before = settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _by_phase(found: Sequence[Kernel], value: Callable[[Kernel], Any]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for kernel in found:
        total[kernel.phase] += value(kernel)
    return dict(total)
