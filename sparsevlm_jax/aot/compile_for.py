"""Both programs of an answer compiled for an accelerator: what they take of its memory, launch, and cost at least."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from sparsevlm_jax.aot.devices import Device, chips
from sparsevlm_jax.aot.hlo import Program, parse
from sparsevlm_jax.aot.programs import Programs, Prompts, lowered
from sparsevlm_jax.aot.roofline import COLLECTIVES, Kernel, kernels
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.pruning.settings import Sparsity

# There is nothing to time kernels on.
_OPTIONS = {"cuda": {"xla_gpu_autotune_level": 0}, "tpu": {}}
_TRIES = 3  # compilations that look for the largest batch, besides the two that its search begins with
_SECOND = 8  # batch


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

    def collectives(self) -> tuple[int, int]:
        """How many there are, and the bytes of their results."""
        found = [kernel for kernel in self.kernels if kernel.instruction.opcode.startswith(COLLECTIVES)]
        return sum(kernel.times for kernel in found), sum(kernel.times * kernel.instruction.bytes for kernel in found)


@dataclass(frozen=True)
class Answer:
    """Prefill with the first token, and the decoding loop, compiled; `programs` is what was lowered."""

    programs: Programs
    prefill: Compiled
    decode: Compiled

    @property
    def memory(self) -> int:
        return max(self.prefill.memory, self.decode.memory)


def compile_for(config: ModelConfig, sparsity: Sparsity, prompts: Prompts, dtype: str, device: Device) -> Answer:
    """Compiles what `generate` would run for such a batch on such a device.

    Raises:
      UserError: the compiler is not there, or the budget cannot be met.
      TooLargeError: the compiler says that the device's memory does not hold it.
    """
    programs = lowered(config, sparsity, prompts, dtype, chips(device)[0], device.platform)
    prefill, decode = (
        _compiled(program, device, only_loop)
        for program, only_loop in ((programs.start, False), (programs.decode, True))
    )
    return Answer(programs, prefill, decode)


def largest_batch(
    config: ModelConfig, sparsity: Sparsity, prompts: Prompts, dtype: str, device: Device, known: Sequence[Answer] = ()
) -> int:
    """The largest batch of such prompts that the device's memory holds, found by compiling a few.

    Args:
      prompts: their own batch does not matter.
      known: has been compiled before, for other batches.
    """
    found = {_batch(answer): answer.memory for answer in known}

    def memory(batch: int) -> int | None:
        if batch not in found:
            try:
                found[batch] = compile_for(config, sparsity, replace(prompts, batch=batch), dtype, device).memory
            except TooLargeError:
                return None
        return found[batch]

    if known:
        first = known[0].programs
        bound = (device.memory - first.parameters) // (first.cache // _batch(known[0]))
    else:
        bound = 2 * _SECOND
    return search(memory, device.memory, max(2, min(_SECOND, bound // 2)))


def search(memory: Callable[[int], int | None], limit: int, second: int) -> int:
    """The largest batch whose memory is within the limit, where memory grows about linearly.

    Two batches, 1 and `second`, say where it would be; that is looked at, and looked for again on the line through
    what was found.

    Args:
      memory: bytes of a batch; None where they are more than can be.

    Returns:
      A batch that was looked at and fits; 0 where not even one row does.
    """
    fits: dict[int, int] = {}
    high: int | None = None  # the smallest that does not

    def look(batch: int) -> None:
        nonlocal high
        taken = memory(batch)
        if taken is None or taken > limit:
            high = batch if high is None else min(high, batch)
        else:
            fits[batch] = taken

    look(1)
    if not fits:
        return 0
    look(second)
    for _ in range(_TRIES):
        low, guess = max(fits), _guess(fits, limit)
        guess = (low + high) // 2 if high is not None and not low < guess < high else guess
        if guess <= low:
            break
        look(guess)
    return max(fits)


def _guess(fits: dict[int, int], limit: int) -> int:
    """Where the line through the two largest batches meets the limit; 2 where there is but one."""
    if len(fits) == 1:
        return 2
    small, large = sorted(fits)[-2:]
    each = max((fits[large] - fits[small]) / (large - small), 1)
    return large + int((limit - fits[large]) / each)


def _batch(answer: Answer) -> int:
    return answer.programs.start.out_info.tokens.shape[0]


def _compiled(program: Any, device: Device, only_loop: bool) -> Compiled:
    began = time.perf_counter()
    with _uncached():
        try:
            made = program.compile(compiler_options=_OPTIONS[device.platform])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise TooLargeError(f"--compile-for {device.name}: more than its memory holds") from error
    seconds = time.perf_counter() - began
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
