"""The tables of the report, as rows of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsevlm_jax.bench.agreement import Verdict, shown
from sparsevlm_jax.bench.metrics import Figures

MISSING = "–"


class Table(NamedTuple):
    """A titled table; `note` says how to read it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """A table of Markdown without its title."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(result: Mapping[str, Any], found: Sequence[Figures]) -> list[Table]:
    """Everything about a cell."""
    wanted = [speed(found), stages(found), memory(found), counts(found), agreement(result)]
    return [table for table in wanted if table.rows]


def speed(found: Sequence[Figures]) -> Table:
    """Prefill and end to end, always side by side."""
    marks = sorted({mark for f in found for mark in f.end_to_end})
    columns: dict[str, Callable[[Figures], str]] = {
        "side": lambda f: f.side.name,
        "tokens entering": lambda f: f"{f.entering:.1f}",
        "prefill": lambda f: _time(f.prefill),
        "× dense JAX": lambda f: _times(f.prefill_speedup),
        "of ideal": lambda f: _times(f.over_ideal),
    }
    for mark in marks:
        columns[f"end to end, {mark} new"] = lambda f, mark=mark: _time(f.end_to_end.get(mark))
        columns[f"× dense JAX, {mark} new"] = lambda f, mark=mark: _times(f.end_to_end_speedup.get(mark))
    note = (
        "Median (5th to 95th percentile). × dense JAX: times as fast, median of the ratios within a round. "
        "Of ideal: prefill over dense JAX prefill times the share of FLOPs by the paper's formula; 1 is ideal. "
        "End to end: from pixels."
    )
    return _table("Prefill and end to end", columns, found, note)


def stages(found: Sequence[Figures]) -> Table:
    columns: dict[str, Callable[[Figures], str]] = {
        "side": lambda f: f.side.name,
        "preprocessing": lambda f: _seconds(f.preprocess),
        "tower + projector": lambda f: _time(f.tower),
        "products alone": lambda f: _time(f.products),
        "prefill / products": lambda f: _times(f.over_products),
        "first token": lambda f: _time(f.first_token),
        "per later token": lambda f: _time(f.per_token),
        "tokens/s": lambda f: MISSING if f.tokens_per_s is None else f"{f.tokens_per_s:.1f}",
        "pruning overhead": lambda f: (
            MISSING if f.overhead is None else f"{_seconds(f.overhead[0])} ({f.overhead[1]:.1%})"
        ),
        "compile cold / warm": lambda f: MISSING if not f.compile else " / ".join(map(_seconds, f.compile)),
    }
    note = (
        "Preprocessing is the same on all sides and measured once. Products: the matrix products of the decoder's "
        "layers and nothing else: a floor of the prefill. First token: from pixels. Pruning overhead: the "
        "prefill minus the same stages with given indices. Compile: what an answer needs, without and with the "
        "compiler's files of an earlier run."
    )
    return _table("Stages", columns, found, note)


def memory(found: Sequence[Figures]) -> Table:
    columns: dict[str, Callable[[Figures], str]] = {
        "side": lambda f: f.side.name,
        "program": lambda f: _mib(f.peak_bytes.get("program")),
        "device": lambda f: _mib(f.peak_bytes.get("device")),
        "process": lambda f: _mib(f.peak_bytes.get("process")),
        "its rise": lambda f: _mib(f.peak_bytes.get("rise")),
        "keys and values": lambda f: _mib(f.cache_bytes),
    }
    note = (
        "Peaks, weights included. Program: XLA's account of prefill and first token. Device: the framework's own count "
        "on an accelerator. Process: resident memory while timed, its libraries and compiled programs included; its "
        "rise: above what it held before. Keys and values: as held; JAX and torch.compile hold room for the new tokens "
        "too."
    )
    return _table("Memory, MiB", columns, found, note)


def counts(found: Sequence[Figures]) -> Table:
    columns: dict[str, Callable[[Figures], str]] = {
        "side": lambda f: f.side.name,
        "share of dense FLOPs": lambda f: f"{f.flops_share:.3f}",
        "XLA's count": lambda f: MISSING if f.xla_flops is None else f"{f.xla_flops / 1e9:.1f} G",
        "achieved in prefill": lambda f: f"{f.flops_per_s / 1e9:.1f} GFLOP/s",
        "of matmul peak": lambda f: _percent(f.of_matmul_peak),
        "of bandwidth in decoding": lambda f: _percent(f.of_bandwidth),
    }
    note = (
        "Share and achieved: the paper's formula, two FLOPs per multiply-add. Peaks are those measured on this machine "
        "(products in this dtype, reading in float32), the best of all sides; more than 100 % of the bandwidth are "
        "weights that stay in a cache."
    )
    return _table("FLOPs and bandwidth", columns, found, note)


def agreement(result: Mapping[str, Any]) -> Table:
    """Every side, those without figures too."""
    rows = []
    for name, report in result["sides"].items():
        verdict = Verdict(**report["verdict"])
        drift = report.get("drift")
        rows.append(
            [
                name,
                verdict.status + ("" if shown(verdict) else ": no figures"),
                verdict.detail or MISSING,
                MISSING if drift is None else f"{drift['kl']:.2e}",
                MISSING if drift is None else f"{drift['top1']:.1%}",
                MISSING if drift is None or not drift["overlap"] else ", ".join(f"{o:.1%}" for o in drift["overlap"]),
            ]
        )
    head = ["side", "in float32", "", "KL, nats", "same top-1", "same selection"]
    note = (
        "In float32: same selections and same tokens as the side named, or nothing is said about its speed; alone: no "
        "other side runs this method. KL, top-1 and selection: the 16-bit run against the side's own float32 run, "
        "along the same tokens."
    )
    return Table("Agreement", head, rows, note)


def phases(side: str, found: Mapping[str, Mapping[str, float]]) -> Table:
    """Milliseconds and shares by phase of a profile, a column for each program."""
    totals = {program: sum(seconds.values()) or 1.0 for program, seconds in found.items()}
    names = dict.fromkeys(phase for seconds in found.values() for phase in seconds)
    rows = [
        [phase, *(f"{1e3 * found[p].get(phase, 0.0):.2f} ({found[p].get(phase, 0.0) / totals[p]:.1%})" for p in found)]
        for phase in names
    ]
    return Table(f"{side}: milliseconds, summed over the device's threads", ["phase", *found], rows)


def _table(title: str, columns: Mapping[str, Callable[[Figures], str]], found: Sequence[Figures], note: str) -> Table:
    return Table(title, list(columns), [[text(f) for text in columns.values()] for f in found], note)


def _time(t: Mapping[str, float] | None) -> str:
    """Median (5th to 95th percentile), in the unit of the median."""
    if t is None:
        return MISSING
    unit, scale = _unit(t["p50"])
    middle, low, high = (_number(t[key] * scale) for key in ("p50", "p5", "p95"))
    return f"{middle} {unit} ({low} to {high})"


def _seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    unit, scale = _unit(value)
    return f"{_number(value * scale)} {unit}"


def _unit(seconds: float) -> tuple[str, float]:
    return ("ms", 1e3) if seconds < 10 else ("s", 1.0)


def _number(value: float) -> str:
    """About three digits that mean something."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def _mib(value: int | None) -> str:
    return MISSING if not value else f"{value / 2**20:,.1f}"
