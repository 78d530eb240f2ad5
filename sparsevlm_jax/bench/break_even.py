"""From how many visual tokens on does a method pay, end to end? By batch size, against dense on the same side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsevlm_jax.bench.metrics import ratio
from sparsevlm_jax.bench.shapes import Cell, Side
from sparsevlm_jax.bench.tables import Table

VISUAL_TOKENS = (64, 144, 256, 576, 1152, 2304)  # squares, then images of 576
BUDGET = "33%"
DENSE = Side("jax", "dense")


def break_even_sides(methods: Sequence[str]) -> list[str]:
    """Dense and every method at a third of the visual tokens."""
    return [DENSE.name, *(f"jax:{method}@{BUDGET}" for method in methods)]


def break_even_table(results: Sequence[Mapping[str, Any]]) -> Table | None:
    """For every method and batch size, the smallest number of visual tokens from which it pays.

    It pays where the median of the end-to-end ratios within a round is below 1, and stays so for all larger numbers
    that were tried. None where there are no results.
    """
    ratios: dict[tuple[str, ...], dict[int, float]] = {}
    for result in results:
        cell = Cell(**result["cell"])
        for name, value in _end_to_end(result["sittings"]).items():
            key = (cell.shape, Side(**result["sides"][name]["side"]).method, str(cell.batch), cell.dtype)
            ratios.setdefault(key, {})[cell.visual_tokens] = value
    if not ratios:
        return None
    rows = [
        [*key, _first(found), ", ".join(f"{n}: {1 / r:.2f}" for n, r in sorted(found.items()))]
        for key, found in sorted(ratios.items())
    ]
    head = ["shape", "method", "batch", "dtype", "pays from", "times as fast as dense, by visual tokens"]
    note = f"End to end, from pixels to the last new token, against dense JAX; {BUDGET} of the visual tokens are kept."
    return Table("Break-even", head, rows, note)


def first_that_pays(ratios: Mapping[int, float]) -> int | None:
    """The smallest number of tokens from which all ratios to dense are below 1."""
    found = None
    for tokens, value in sorted(ratios.items(), reverse=True):
        if value >= 1:
            break
        found = tokens
    return found


def _first(ratios: Mapping[int, float]) -> str:
    found = first_that_pays(ratios)
    return f"{found} visual tokens" if found else "not up to " + str(max(ratios))


def _end_to_end(sittings: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, float]:
    """Ratio of every other side's longest answer to dense."""
    found = {}
    for samples in sittings:
        dense = samples.get(DENSE.name, {})
        longest = max(dense, key=lambda phase: int(phase.removeprefix("tokens_")), default="")
        found |= {name: ratio(phases[longest], dense[longest]) for name, phases in samples.items() if dense}
    found.pop(DENSE.name, None)
    return found
