"""Figures from raw samples: what a user asks, per side of a cell. Ratios are per round, then their median."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsevlm_jax.bench.shapes import SHAPES, Cell, Side
from sparsevlm_jax.bench.timing import summary
from sparsevlm_jax.pruning.budgets import make_plan, paper_flops
from sparsevlm_jax.pruning.plan import Plan

Samples = Mapping[str, Mapping[str, Sequence[float]]]  # side -> phase -> seconds, by round


@dataclass(frozen=True)
class Figures:
    """One side in one cell; None where a side has no such thing, or the run left it out.

    Times are in seconds, as `timing.summary` gives them.

    Attributes:
      entering: visual tokens entering a layer, mean over layers.
      flops_share: of dense, by the paper's formula.
      tower, prefill: vision tower and projector; the decoder, from embeddings to logits and caches.
      first_token: from pixels to the first new token.
      per_token: of every later token.
      end_to_end: from pixels, by number of new tokens.
      prefill_speedup, end_to_end_speedup: against the dense JAX side; the latter by number of new tokens.
      over_ideal: prefill divided by (dense prefill times `flops_share`); 1 is ideal.
      products, over_products: the decoder layers' matrix products alone, and the prefill divided by them.
      overhead: prefill minus the same stages with given indices: seconds, and share of the prefill.
      flops_per_s: the paper's multiply-adds, twice, per second of prefill.
      of_matmul_peak, of_bandwidth: shares of what the machine was measured to reach, in prefill and in decoding.
      peak_bytes: of the program by XLA's account, of the device, of the process, and of that its rise while timed.
    """

    side: Side
    status: str
    entering: float
    flops_share: float
    tower: dict[str, float] | None
    prefill: dict[str, float]
    first_token: dict[str, float] | None
    per_token: dict[str, float] | None
    tokens_per_s: float | None
    end_to_end: dict[int, dict[str, float]]
    prefill_speedup: float | None
    end_to_end_speedup: dict[int, float]
    over_ideal: float | None
    products: dict[str, float] | None
    over_products: float | None
    overhead: tuple[float, float] | None
    flops_per_s: float
    of_matmul_peak: float | None
    of_bandwidth: float | None
    peak_bytes: dict[str, int]
    cache_bytes: int | None
    xla_flops: float | None
    compile: tuple[float, float] | None
    preprocess: float | None
    drift: dict[str, Any] | None


def figures(result: Mapping[str, Any]) -> list[Figures]:
    """Of every side of a cell's result that has samples, in order."""
    found, seen = [], set()
    cell = Cell(**result["cell"])
    peaks = _peaks(result)
    for samples in result["sittings"]:
        for name in samples:
            if name not in seen and "prefill" in samples[name]:
                seen.add(name)
                found.append(_figures(cell, result["sides"][name], name, samples, peaks))
    return found


def plan_of(cell: Cell, side: Side) -> Plan:
    """The schedule that a side runs; v1's counts are the most that any prompt can ask for."""
    sparsity = side.sparsity(SHAPES[cell.shape], cell.visual_tokens)
    return make_plan(sparsity, cell.config, cell.visual_tokens, cell.text_tokens)


def layer_lengths(cell: Cell, plan: Plan) -> tuple[int, ...]:
    """Tokens of a prompt that enter each layer, text included."""
    return tuple(cell.text_tokens + visual for visual in plan.entering())


def multiply_adds(cell: Cell, side: Side) -> int:
    """Of a batch's prefill, by the paper's formula."""
    return cell.batch * paper_flops(cell.config.text, layer_lengths(cell, plan_of(cell, side)))


def _figures(cell: Cell, report: Mapping[str, Any], name: str, samples: Samples, peaks: Mapping[str, float]) -> Figures:
    side, phases = Side(**report["side"]), samples[name]
    # Where all of JAX runs on a mesh, dense does, too.
    dense = samples.get(Side("jax", "dense").name) or samples.get(Side("jax", "dense", mesh=side.mesh).name)
    marks = sorted(int(phase.split("_")[1]) for phase in phases if phase.startswith("tokens_"))
    per_token = _per_token(phases, marks)
    macs = multiply_adds(cell, side)
    share = macs / multiply_adds(cell, Side("jax", "dense"))
    prefill, token = statistics.median(phases["prefill"]), statistics.median(per_token) if per_token else None
    facts, memory, compiled = (report.get(key) or {} for key in ("facts", "memory", "compile"))
    read = facts.get("decoder_bytes", 0) + facts.get("cache_bytes", 0)
    speedup = None if dense is None else 1 / ratio(phases["prefill"], dense["prefill"])
    return Figures(
        side=side,
        status=report["verdict"]["status"],
        entering=plan_of(cell, side).entering_tokens(),
        flops_share=share,
        tower=_summary(phases.get("tower")),
        prefill=summary(phases["prefill"]),
        first_token=_summary(phases.get("tokens_1")),
        per_token=_summary(per_token),
        tokens_per_s=cell.batch / token if token else None,
        end_to_end={mark: summary(phases[f"tokens_{mark}"]) for mark in marks if mark > 1},
        prefill_speedup=speedup,
        end_to_end_speedup={}
        if dense is None
        else {mark: 1 / ratio(phases[f"tokens_{mark}"], dense[f"tokens_{mark}"]) for mark in marks if mark > 1},
        over_ideal=None if speedup is None else 1 / (speedup * share),
        products=_summary(phases.get("products")),
        over_products=ratio(phases["prefill"], phases["products"]) if "products" in phases else None,
        overhead=_overhead(phases),
        flops_per_s=2 * macs / prefill,
        of_matmul_peak=2 * macs / prefill / peaks["flops_per_s"] if peaks else None,
        of_bandwidth=read / token / peaks["bytes_per_s"] if peaks and read and token else None,
        peak_bytes=_peak_bytes(memory, compiled),
        cache_bytes=facts.get("cache_bytes"),
        xla_flops=facts.get("xla_flops"),
        compile=(compiled["cold_s"], compiled["warm_s"]) if compiled else None,
        preprocess=report.get("preprocess_s"),
        drift=report.get("drift"),
    )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round, so that drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=False))


def _summary(seconds: Sequence[float] | None) -> dict[str, float] | None:
    return summary(seconds) if seconds else None


def _per_token(phases: Mapping[str, Sequence[float]], marks: Sequence[int]) -> list[float]:
    """By round; none where no answer was timed."""
    if not marks:
        return []
    first, last = marks[0], marks[-1]
    pairs = zip(phases[f"tokens_{first}"], phases[f"tokens_{last}"], strict=True)
    return [(end - begin) / (last - first) for begin, end in pairs]


def _overhead(phases: Mapping[str, Sequence[float]]) -> tuple[float, float] | None:
    if "prefill_given" not in phases:
        return None
    pairs = list(zip(phases["prefill"], phases["prefill_given"], strict=True))
    return statistics.median(p - g for p, g in pairs), statistics.median((p - g) / p for p, g in pairs)


def _peaks(result: Mapping[str, Any]) -> dict[str, float]:
    """The best that any side measured on this machine."""
    measured = [report["peaks"] for report in result["sides"].values() if report.get("peaks")]
    return {key: max(m[key] for m in measured) for key in measured[0]} if measured else {}


def _peak_bytes(memory: Mapping[str, Any], compiled: Mapping[str, Any]) -> dict[str, int]:
    start = compiled.get("program_bytes", {}).get("start", {})
    found = {
        "program": start.get("peak"),
        "device": memory.get("device_peak"),
        "process": memory.get("resident_peak"),
        "rise": memory.get("rise"),
    }
    return {key: value for key, value in found.items() if value}
