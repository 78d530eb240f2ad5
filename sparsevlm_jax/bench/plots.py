"""Images of a cell's figures, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsevlm_jax.bench.metrics import Figures

STAGES = ("vision tower + projector", "prefill", "decoding")
COLOURS = {"jax": "#1f6f8b", "torch": "#c8553d", "ideal": "#e0a458"}
STAGE_COLOURS = ("#b8c4bb", "#1f6f8b", "#e0a458")


def plots(found: Sequence[Figures]) -> dict[str, str]:
    """Title -> SVG. Nothing where there is nothing to compare."""
    drawn: dict[str, Callable[[Axes, Sequence[Figures]], None]] = {
        "Prefill against visual tokens kept": _latency,
        "Peak memory": _memory,
        "Prefill speed-up against the ideal": _speedup,
    }
    if all(f.tower and f.end_to_end for f in found):
        drawn["Where the time of an answer goes"] = _stages
    return {title: _svg(title, draw, found) for title, draw in drawn.items() if found}


def _latency(axes: Axes, found: Sequence[Figures]) -> None:
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"](range(20)))  # more sides than the usual ten colours
    groups: dict[str, list[Figures]] = {}
    for f in found:
        groups.setdefault(f"{f.side.engine}:{f.side.method}", []).append(f)
    for name, members in groups.items():
        members.sort(key=lambda f: f.entering)
        middle = [1e3 * f.prefill["p50"] for f in members]
        spread = [[1e3 * abs(f.prefill[edge] - f.prefill["p50"]) for f in members] for edge in ("p5", "p95")]
        marker = "o" if name.startswith("jax") else "s"
        axes.errorbar([f.entering for f in members], middle, spread, marker=marker, capsize=2, label=name)
    axes.set(xlabel="visual tokens entering a layer, mean", ylabel="prefill, ms", ylim=(0, None))
    legend(axes)


def _stages(axes: Axes, found: Sequence[Figures]) -> None:
    mark = max(found[0].end_to_end)
    names = [f.side.name for f in found]
    left = [0.0] * len(found)
    # The prefill's bar is what the first token takes beyond the tower: the embedding and the head are in it.
    for stage, colour in zip(range(3), STAGE_COLOURS, strict=True):
        seconds = [_parts(f, mark)[stage] for f in found]
        axes.barh(names, seconds, left=left, color=colour, label=STAGES[stage])
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.set(xlabel=f"seconds until {mark} new tokens")
    axes.invert_yaxis()
    legend(axes)


def _parts(f: Figures, mark: int) -> tuple[float, float, float]:
    assert f.tower and f.first_token
    tower, first, last = f.tower["p50"], f.first_token["p50"], f.end_to_end[mark]["p50"]
    return tower, max(first - tower, 0.0), max(last - first, 0.0)


def _memory(axes: Axes, found: Sequence[Figures]) -> None:
    kinds = [kind for kind in ("program", "device", "process") if any(kind in f.peak_bytes for f in found)]
    height = 0.8 / max(1, len(kinds))
    for number, kind in enumerate(kinds):
        rows = [i + number * height for i, f in enumerate(found)]
        axes.barh(rows, [f.peak_bytes.get(kind, 0) / 2**30 for f in found], height=height, label=kind)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(found))], [f.side.name for f in found])
    axes.set(xlabel="GiB")
    axes.invert_yaxis()
    legend(axes, "peak of the")


def _speedup(axes: Axes, found: Sequence[Figures]) -> None:
    shown = [f for f in found if f.prefill_speedup is not None]
    names = [f.side.name for f in shown]
    colours = [COLOURS["jax" if f.side.engine == "jax" else "torch"] for f in shown]
    axes.barh(names, [f.prefill_speedup or 0 for f in shown], color=colours, label="measured")
    ideal = [1 / f.flops_share for f in shown]
    axes.plot(ideal, names, "|", color=COLOURS["ideal"], markersize=18, markeredgewidth=2.5, label="ideal")
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.margins(x=0.06)
    axes.set(xlabel="times as fast as dense JAX")
    axes.invert_yaxis()
    legend(axes)


def legend(axes: Axes, title: str | None = None) -> None:
    """Beside the bars, never on them."""
    axes.legend(fontsize=8, title=title, title_fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _svg(title: str, draw: Callable[[Axes, Sequence[Figures]], None], found: Sequence[Figures]) -> str:
    # The same figures give the same file: no date, no random ids.
    style: Any = {"svg.hashsalt": "sparsevlm", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, max(3.0, 0.4 * len(found) + 1.2)), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, found)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
