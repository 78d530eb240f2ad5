"""How long a compiled program takes at least: for each kernel the larger of bytes over bandwidth and FLOPs over peak.

A prediction from shapes. It knows no launch, no cache between kernels and no matrix unit that waits; what a device
takes beyond it is what these cost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

from sparsevlm_jax.aot.devices import Device
from sparsevlm_jax.aot.hlo import Computation, Instruction, Program, Shape
from sparsevlm_jax.aot.scopes import OTHER, phase_of

# They name, nest or wait; the work is in others.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "domain"),
}
_NESTING = ("while", "conditional", "call")
_FREE_TARGETS = {"ConcatBitcast", "AssumeGatherIndicesInBound", "AllocateBuffer", "Sharding"}
_RENAMING = ("bitcast", "copy-done", "slice-done", "async-done", "get-tuple-element")
_PARTIAL = ("slice", "dynamic-slice", "gather")
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> which operand is what it writes
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@dataclass(frozen=True)
class Kernel:
    """Something that a device is told to run.

    Attributes:
      times: how often, in loops of a known number of turns.
      looped: whether it stands in a loop whose number of turns only data can tell; it is counted for one turn.
      bytes, flops: of one time; bytes from and to the device's memory, FLOPs of products, two per multiply-add.
      exact: whether its products are of float32.
    """

    instruction: Instruction
    phase: str
    times: int
    looped: bool
    bytes: int
    flops: int
    exact: bool

    def seconds(self, device: Device) -> float:
        """At least, all times together."""
        peak = device.peak_float32 if self.exact else device.peak
        return self.times * max(self.bytes / device.bandwidth, self.flops / peak)


def exchanged(instruction: Instruction) -> tuple[Shape, ...]:
    """The arrays that a collective gives a device; one that starts returns what it takes, too."""
    if not instruction.opcode.endswith("-start") or instruction.opcode.startswith("all-reduce"):
        return instruction.shapes
    both = [shape for shape in instruction.shapes if shape.dims]
    return tuple(both[len(both) // 2 :])


def kernels(program: Program) -> list[Kernel]:
    """All that a run of the program launches, in order; of branches, each."""
    return list(_launched(program, program.computations[program.entry], 1, False))


def _launched(program: Program, within: Computation, times: int, looped: bool) -> Iterator[Kernel]:
    fetched: set[str] = set()
    for instruction in within.instructions:
        if instruction.opcode in _NESTING:
            trips = _TRIPS.search(instruction.rest)
            turns, unknown = int(trips[1]) if trips else 1, instruction.opcode == "while" and not trips
            for name in instruction.called:
                yield from _launched(program, program.computations[name], times * turns, looped or unknown)
        elif _is_kernel(instruction):
            flops, exact = _flops(program, within, instruction)
            size = _bytes(program, within, instruction, fetched)
            yield Kernel(instruction, _phase(program, within, instruction), times, looped, size, flops, exact)


def _is_kernel(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or instruction.target in _FREE_TARGETS:
        return False
    # What is fetched ahead into fast memory counts with the kernel that takes it.
    return not (opcode in ("copy-start", "slice-start") and _fast(instruction))


def _fast(instruction: Instruction) -> bool:
    """Whether a transfer ends in fast memory: its result is a tuple of both ends, and of a semaphore."""
    places = [shape.space for shape in instruction.shapes if shape.dims]
    return (places[0] if instruction.opcode == "copy-start" else places[-1]) != 0


def _phase(program: Program, within: Computation, instruction: Instruction) -> str:
    """By what costs: a product within, else the instruction's own scope, else what is summed within.

    A fusion has the scope of its last instruction, which may only add what a product made to something else. What has
    no scope at all, such as a product that XLA has split into several sums, belongs to what takes it.
    """
    inner = [each for each in _within(program, instruction) if each.opcode not in _FREE]
    products = [each for each in inner if each.opcode in ("dot", "convolution")]
    sums = [each for each in inner if each.opcode == "reduce"]
    scopes = [each.scope for each in (*products, instruction, *sums, *reversed(inner)) if "/" in each.scope]
    if scopes:
        return next((phase for phase in map(phase_of, scopes) if phase != OTHER), OTHER)
    users = [user for user in within.users[instruction.name] if user.opcode != "tuple"]
    return _phase(program, within, users[0]) if users else OTHER


def _within(program: Program, instruction: Instruction) -> Iterator[Instruction]:
    """What a fusion is made of."""
    if instruction.opcode == "fusion":
        for each in program.computations[instruction.called[0]].instructions:
            yield each
            yield from _within(program, each)


def _bytes(program: Program, within: Computation, instruction: Instruction, fetched: set[str]) -> int:
    """Read from and written to the device's memory.

    Args:
      fetched: values in fast memory whose transfer has been counted.
    """
    fused = program.computations[instruction.called[0]] if instruction.opcode == "fusion" else None
    read = 0
    for number, operand in enumerate(instruction.operands):
        shapes = within.by_name[operand].shapes
        if any(shape.space for shape in shapes):
            if operand in fetched or not _fetched_ahead(within, operand):
                continue
            fetched.add(operand)
        size = sum(shape.bytes for shape in shapes)
        read += size if fused is None else _read(program, fused, fused.parameters[number].name, size)
    if fused is None and instruction.opcode in (*_PARTIAL, *_IN_PLACE):
        return _sparse_bytes(within, instruction)
    # A transfer returns its source, too, and a library's kernel its workspace.
    first = instruction.opcode == "custom-call" or instruction.opcode.endswith("-start")
    slow = instruction.shapes[:1] if first else instruction.shapes
    if fused is not None and not any(shape.space for shape in slow):
        return read + _written(program, fused, fused.root)
    return read + sum(shape.bytes for shape in slow if not shape.space)


def _sparse_bytes(within: Computation, instruction: Instruction) -> int:
    """Of an instruction that touches a part of its first operand."""
    if instruction.opcode in _PARTIAL:
        return 2 * instruction.bytes
    return 2 * within.shape(instruction.operands[_IN_PLACE[instruction.opcode]]).bytes


def _fetched_ahead(within: Computation, name: str) -> bool:
    """Whether a value in fast memory was brought there from the device's memory."""
    made = within.by_name[name]
    if made.opcode in ("copy-done", "slice-done"):
        return True
    renamed = made.opcode in _RENAMING or made.target == "ConcatBitcast"
    return renamed and any(_fetched_ahead(within, operand) for operand in made.operands)


def _read(program: Program, fused: Computation, name: str, size: int) -> int:
    """Bytes that a fusion reads of an operand of so many: the parts, where it only takes parts."""
    if fused.root.name == name:
        return size
    total = 0
    for user in fused.users[name]:
        if user.opcode in _PARTIAL and user.operands[0] == name and name not in user.operands[1:]:
            total += user.bytes
        elif user.opcode in _IN_PLACE and user.operands[0] == name and name not in user.operands[1:]:
            continue
        elif user.opcode == "bitcast":
            total += _read(program, fused, user.name, size)
        elif user.opcode == "fusion":
            inner = program.computations[user.called[0]]
            numbers = [number for number, operand in enumerate(user.operands) if operand == name]
            total += sum(_read(program, inner, inner.parameters[number].name, size) for number in numbers)
        else:
            return size
    return min(total, size)


def _written(program: Program, fused: Computation, made: Instruction) -> int:
    """Bytes that a fusion writes: the part, where it updates one in place."""
    if made.opcode in _IN_PLACE:
        return fused.shape(made.operands[_IN_PLACE[made.opcode]]).bytes
    if made.opcode == "fusion":
        inner = program.computations[made.called[0]]
        return _written(program, inner, inner.root)
    if made.opcode in ("bitcast", "tuple"):
        return sum(_written(program, fused, fused.by_name[operand]) for operand in made.operands)
    return made.bytes


def _flops(program: Program, within: Computation, instruction: Instruction) -> tuple[int, bool]:
    """Of the products in an instruction and in what it calls, and whether any is of float32."""
    if instruction.opcode == "fusion":
        inner = program.computations[instruction.called[0]]
        found = [_flops(program, inner, each) for each in inner.instructions]
        return sum(flops for flops, _ in found), any(exact for _, exact in found)
    count = _product(within, instruction)
    if not count:
        return 0, False
    return count, any(within.shape(operand).dtype == "f32" for operand in instruction.operands[:2])


def _product(within: Computation, instruction: Instruction) -> int:
    target = instruction.target
    if instruction.opcode == "dot":
        return _dot(within, instruction, instruction.dimensions("lhs_contracting_dims"))
    if instruction.opcode == "convolution" or target.startswith("__cudnn$conv"):
        return _convolution(within, instruction)
    if target.startswith(("__cublas$gemm", "__cublas$lt$matmul")):
        contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', instruction.rest)
        return _dot(within, instruction, tuple(int(n) for n in re.findall(r"\d+", contracted[1]))) if contracted else 0
    if target.startswith("__cudnn$fmha"):
        return _attention(within, instruction)
    return 0


def _dot(within: Computation, instruction: Instruction, contracted: Sequence[int]) -> int:
    lhs = within.shape(instruction.operands[0])
    return 2 * instruction.shapes[0].elements * prod(lhs.dims[number] for number in contracted)


def _attention(within: Computation, instruction: Instruction) -> int:
    """Of cuDNN's kernel on query and key [b, l, n, h]: two products; a causal one leaves out half."""
    (batch, length, heads, head_dim), key = (within.shape(name).dims for name in instruction.operands[:2])
    products = 2 * 2 * batch * heads * length * key[1] * head_dim
    return products // 2 if "CAUSAL" in instruction.rest else products


def _convolution(within: Computation, instruction: Instruction) -> int:
    """Every place of the result sums over the window, as far as it lies on the input, and the input's features."""
    labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    lhs, rhs = (within.shape(name).dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    window = dict(part.split("=") for part in instruction.attribute("window").split())
    pairs = 1
    for number, axis in enumerate(sorted(set(labels[2]) - {"b", "f"})):
        size, result = lhs[labels[0].index(axis)], out[labels[2].index(axis)]
        pairs *= _touching(
            size,
            rhs[labels[1].index(axis)],
            result,
            _of_axis(window, "stride", number, 1),
            _of_axis(window, "pad", number, 0),
            _of_axis(window, "lhs_dilate", number, 1),
            _of_axis(window, "rhs_dilate", number, 1),
        )
    batch, features = (out[labels[2].index(label)] for label in "bf")
    return 2 * batch * features * rhs[labels[1].index("i")] * pairs


def _of_axis(window: dict[str, str], name: str, number: int, default: int) -> int:
    """Of padding, that in front."""
    return int(window[name].split("x")[number].split("_")[0]) if name in window else default


@cache
def _touching(size: int, window: int, result: int, stride: int, pad: int, spread: int, gap: int) -> int:
    """Pairs of a place of the result and a place of the window between which an element of the input lies."""
    at = np.arange(result)[:, None] * stride + np.arange(window)[None, :] * gap - pad
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))
