"""A compiled program read from its text, as XLA prints what its backends run: shapes, operands, scopes. No JAX here.

Of the language only what the printer of a scheduled module writes: one instruction a line, operands by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([^\]]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Shape(NamedTuple):
    """An array. `space` says where: 0 is the device's memory, others are its own kinds, such as a TPU's VMEM."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    dynamic: bool = False

    @property
    def elements(self) -> int:
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.elements * _bits(self.dtype) // 8)


@dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      shapes: of its result; several of a tuple.
      operands: names, in order.
      rest: what stands behind the operands.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    @cached_property
    def scope(self) -> str:
        """Where in the code it comes from, such as jit(start)/layers_0/mlp; empty where XLA made it itself."""
        found = _SCOPE.search(self.rest)
        return found[1] if found else ""

    @cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        branches = _BRANCHES.search(self.rest)
        named = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return (*_CALLED.findall(self.rest), *named)

    @cached_property
    def target(self) -> str:
        """Of a custom call."""
        found = _TARGET.search(self.rest)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, name: str) -> str:
        """The text of an attribute such as window={size=3}, without its braces; empty where it is not there."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^,\s]+))", self.rest)
        return (found[1] or found[2] or "") if found else ""

    def dimensions(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of numbers."""
        return tuple(int(number) for number in re.findall(r"\d+", self.attribute(name)))


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of every value, the instructions that take it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(each.inside): each for each in self.instructions if each.opcode == "parameter"}

    @property
    def root(self) -> Instruction:
        return next((each for each in self.instructions if each.root), self.instructions[-1])

    def shape(self, name: str) -> Shape:
        """Of a value that is one array."""
        return self.by_name[name].shapes[0]


@dataclass(frozen=True)
class Program:
    """All computations of a module; `entry` is where it begins."""

    computations: dict[str, Computation]
    entry: str

    def instructions(self) -> Iterator[Instruction]:
        """All of them, those within fusions too."""
        for computation in self.computations.values():
            yield from computation.instructions


def parse(text: str) -> Program:
    """Reads a module.

    Raises:
      ValueError: the text holds no entry computation.
    """
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}") and name is not None:
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif name is not None:
            lines += _instruction(line)
    if entry is None:
        raise ValueError("the text is no HLO module: it has no entry computation")
    return Program(computations, entry)


def shapes_in(text: str) -> tuple[Shape, ...]:
    """The arrays of a printed shape, be it one or a tuple."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.strip().removeprefix("<=")) for size in dims.split(",") if size.strip())
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0, "<=" in dims))
    return tuple(found)


def _instruction(line: str) -> list[Instruction]:
    found = _INSTRUCTION.match(line)
    if found is None:
        return []
    root, name, text = found.groups()
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, call = text[:end], text[end:].lstrip()
    opcode, _, _ = call.partition("(")
    close = _closing(call, len(opcode))
    inside = call[len(opcode) + 1 : close]
    operands = tuple(_NAME.findall(inside))
    return [Instruction(name, opcode, shapes_in(shape), operands, inside, call[close + 1 :], root is not None)]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _bits(dtype: str) -> int:
    """f32, s8, f8e4m3fn, ...: the first number is the width."""
    if dtype in _BITS:
        return _BITS[dtype]
    width = re.match(r"[a-z]+(\d+)", dtype)
    return int(width[1]) if width else 0
