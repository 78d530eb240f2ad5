"""Chat templates: Jinja out of a checkpoint, rendered as transformers does, within bounds.

The sandbox keeps a template from reaching Python. It does not keep it from looping for hours or from asking for
terabytes, so this one counts: every block that runs is a step, every value that is made is charged by its size, and
what can grow out of small arguments (a width, a repetition) is estimated before it is done. A template that goes too
far ends with an error. It is one long file because its parts hold only together: what one leaves uncounted, another
must not let through.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sparsevlm_jax import bounds

# Filters that no chat template needs: slow out of proportion to their text, or different at every call.
_LEFT_OUT = ("filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
# In a format: a width of five digits, or one that is an argument.
_WIDTH = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{")


class TooMuch(jinja2.TemplateError):
    """A template asks for more than `bounds` allow."""


def render(source: str, **variables: Any) -> str:
    """The text that a template makes of messages and whatever else it is given: plain lists, dicts, strings, numbers.

    Raises:
      TooMuch: it runs too long or makes too much.
      Exception: whatever else Jinja or a template's operations raise.
    """
    with _metered() as meter:
        meter.check(variables)
        pieces = []
        for piece in _compiled(source).generate(**variables):
            meter.write(piece)
            pieces.append(piece)
        return "".join(pieces)


class _Meter:
    """What one rendering has used up."""

    def __init__(self) -> None:
        self.steps, self.made, self.written = 0, 0, 0
        self.end = time.thread_time() + bounds.TEMPLATE_SECONDS  # of work: a busy machine refuses nothing

    def step(self) -> None:
        """One more block, call or filter."""
        self.steps += 1
        if self.steps > bounds.TEMPLATE_STEPS or time.thread_time() > self.end:
            raise TooMuch(f"it runs for more than {bounds.TEMPLATE_STEPS:,} steps or {bounds.TEMPLATE_SECONDS} s")

    def check(self, value: Any) -> int:
        """The size of a value, which must not be too large."""
        return _extent(value)[0]

    def charge(self, value: Any) -> Any:
        """A value that was made, once its size is on the bill."""
        self._bill(_extent(value)[0])
        return value

    def allow(self, size: int) -> None:
        """Before something of that size is made."""
        if size > bounds.TEMPLATE_VALUE:
            raise TooMuch(f"it makes a value of more than {bounds.TEMPLATE_VALUE:,} characters or items")
        self._bill(0)

    def show(self, value: Any) -> Any:
        """A value that is about to become text."""
        size = _extent(value)[0]
        self._bill(size if isinstance(value, str) else 10 * size)  # escapes and brackets
        return value

    def write(self, piece: str) -> None:
        self.written += len(piece)
        if self.written > bounds.TEMPLATE_VALUE:
            raise TooMuch(f"it writes more than {bounds.TEMPLATE_VALUE:,} characters")

    def _bill(self, size: int) -> None:
        self.made += size
        if self.made > bounds.TEMPLATE_TOTAL:
            raise TooMuch(f"it makes more than {bounds.TEMPLATE_TOTAL:,} characters or items in all")


_METER: ContextVar[_Meter] = ContextVar("meter")


@contextmanager
def _metered() -> Iterator[_Meter]:
    meter = _Meter()
    token = _METER.set(meter)
    try:
        yield meter
    finally:
        _METER.reset(token)


def _extent(value: Any) -> tuple[int, int]:
    """Characters and items of a value as it would be printed (what stands in it twice counts twice), and its depth.

    Raises:
      TooMuch: more than a template may hold in one value, or a namespace inside a value, which might hold itself.
    """
    size, depth, level = 0, 0, [value]
    while level:
        inner: list[Any] = []
        depth += 1
        for item in level:
            size += len(item) if isinstance(item, str | bytes) else 1
            if isinstance(item, dict):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                inner += item
            elif isinstance(item, Namespace) and depth > 1:
                raise TooMuch("it puts a namespace into a value")
            elif isinstance(item, int) and item.bit_length() > bounds.TEMPLATE_BITS:
                raise TooMuch(f"it makes an integer of more than {bounds.TEMPLATE_BITS} bits")
            if size + len(inner) > bounds.TEMPLATE_VALUE:
                raise TooMuch(f"it makes a value of more than {bounds.TEMPLATE_VALUE:,} characters or items")
        level = inner
    return size, depth


class _Generator(CodeGenerator):
    """Jinja's code, with a step at the head of every block and a size for every value that is made."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802 (Jinja's names)
        self._wrap("environment.charge", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._wrap("environment.charge", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._wrap("environment.charge", super().visit_Tuple, node, frame)
        else:  # names that are assigned to
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.join_parts(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._wrap("environment.charge", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _wrap(self, function: str, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write(f"{function}(")
        visit(node, frame)
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, metered."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            optimized=False,  # nothing is computed before it is metered
            finalize=lambda value: _METER.get().show(value),
        )
        self.concat = _concat  # pyright: ignore[reportAttributeAccessIssue]
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(name, run) for name, run in self.filters.items() if name not in _LEFT_OUT}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def step(self) -> None:
        _METER.get().step()

    def charge(self, value: Any) -> Any:
        return _METER.get().charge(value)

    def join_parts(self, context: Any, parts: Sequence[Any]) -> str:
        """The operator `~`."""
        meter = _METER.get()
        meter.allow(sum(_extent(part)[0] for part in parts))
        for part in parts:
            meter.show(part)
        return (markup_join if context.eval_ctx.autoescape else str_join)(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        meter.step()
        meter.allow(_size_of_operation(operator, left, right))
        return meter.charge(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805 (as in Jinja)
        meter = _METER.get()
        meter.step()
        receiver = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(receiver, str):
            args = _checked(__obj.__name__, (receiver, *args), kwargs)[1:]
        elif not isinstance(__obj, Macro):  # whose caller is one of its arguments
            meter.check((args, kwargs))
        return meter.charge(super().call(__context, __obj, *args, **kwargs))


class _GenerationTag(Extension):
    """`{% generation %}` marks what the model has said; the text is that of the block."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` as a function, with no way to its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace`, whose values are metered and have no private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805 (a value may be called self)
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace holds no private names such as {name!r}")
        _METER.get().check((value,))
        super().__setitem__(name, value)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > bounds.TEMPLATE_SOURCE:
        raise TooMuch(f"it has more than {bounds.TEMPLATE_SOURCE:,} characters")
    return _Environment().from_string(source)


def _concat(pieces: Iterable[str]) -> str:
    """What a macro or a block has written."""
    pieces = list(pieces)
    _METER.get().allow(sum(map(len, pieces)))
    return _METER.get().charge("".join(pieces))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter as Jinja has it, metered. Some are given the environment or a context before their value."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.step()
        return meter.charge(function(*args[:first], *_checked(name, args[first:], kwargs), **kwargs))

    return run


def _checked(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a filter, or of a string's method after the string, if the result has a bearable size."""
    if name == "join":  # an iterator cannot be looked at without using it up
        at = 1 if isinstance(args[0], str) and len(args) > 1 and not isinstance(args[1], str) else 0
        args = (*args[:at], list(args[at]), *args[at + 1 :])
    size, depth = _extent((args, kwargs))
    given = [*args, *kwargs.values()]
    numbers = [abs(value) for value in given if isinstance(value, int) and not isinstance(value, bool)]
    texts = [len(value) for value in given[1:] if isinstance(value, str)]
    _METER.get().allow(_size_of_result(name, size, depth, given, max(numbers, default=0), max(texts, default=0)))
    return tuple(args)


def _size_of_result(name: str, size: int, depth: int, given: Sequence[Any], number: int, text: int) -> int:
    """An upper bound for what can be larger than its arguments, 0 for everything else.

    Args:
      size, depth: of all arguments together.
      given: the arguments.
      number, text: the largest integer and the length of the longest string behind the first argument.
    """
    if name in ("center", "ljust", "rjust", "zfill", "batch", "slice"):
        return size + number
    if name in ("expandtabs", "indent"):
        lines = str(given[0]).count("\t" if name == "expandtabs" else "\n") + 1
        return size + lines * max(number, text, 8)
    if name == "tojson":
        return size * (1 + depth * max(number, text)) if number or text else size
    if name == "join":
        items = next((value for value in given if isinstance(value, list)), [])
        return size + len(items) * max((len(value) for value in given if isinstance(value, str)), default=0)
    if name == "replace":
        old, new = (str(value) for value in (*given[1:], "", "")[:2])
        return size + str(given[0]).count(old) * len(new)
    if name == "translate":
        return size * size if size > 1_000 else 0
    if name in ("format", "format_map"):
        return _size_of_format(str(given[0]), size, number)
    if name == "round":
        return 0 if number <= 300 else bounds.TEMPLATE_VALUE + 1
    if name == "sum":
        return bounds.TEMPLATE_VALUE + 1 if any(isinstance(v, list | tuple) for v in given[1:]) else 0
    return 0


def _size_of_format(text: str, size: int, number: int) -> int:
    """Widths stand in the text, or among the arguments where the text says so."""
    if _WIDTH.search(text):
        return bounds.TEMPLATE_VALUE + 1
    fields = text.count("%") + text.count("{")
    return len(text) + fields * (size + 10_000 if re.search(r"\d{3}", text) else size)


def _size_of_operation(operator: str, left: Any, right: Any) -> int:
    if operator == "%" and isinstance(left, str):
        return _size_of_format(left, _extent((left, right))[0], 0)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        too_large = left.bit_length() * abs(right) > bounds.TEMPLATE_BITS and abs(left) > 1
        return bounds.TEMPLATE_VALUE + 1 if too_large else 1
    if operator == "*":
        for times, value in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, str | bytes | list | tuple):
                return max(times, 0) * _extent(value)[0]
    return _extent(left)[0] + _extent(right)[0] if operator == "+" else 0


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if separators is not None and _extent(separators)[0] > 20:
        raise TooMuch("tojson with long separators")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if _WIDTH.search(format) or len(format) > 1_000:
        raise TooMuch("strftime_now with a long format")
    return datetime.now().strftime(format)
