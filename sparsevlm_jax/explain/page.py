"""An explanation as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
from typing import Any

import jax
import jinja2
import numpy as np
from PIL import Image

from sparsevlm_jax import __version__
from sparsevlm_jax.explain import summary
from sparsevlm_jax.explain.drawing import CIVIDIS, TINTS, draw_pruning, draw_stage, draw_view, png
from sparsevlm_jax.explain.trace_run import Explanation, Pruning, Stage
from sparsevlm_jax.explain.views import View, in_rows
from sparsevlm_jax.pruning.methods import METHODS

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("sparsevlm_jax.explain", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(explanation: Explanation) -> str:
    """The page, as text."""
    sparsity = explanation.pruned.plan.sparsity
    dense, pruned = summary.answers(explanation)
    return _TEMPLATES.get_template("page.html.jinja").render(
        question=explanation.question,
        model=explanation.model.name,
        method=sparsity.method,
        views=[_view(explanation, view) for view in explanation.views],
        shown=summary.shown(explanation),
        frames=summary.frames_left(explanation),
        class_tokens=explanation.class_tokens,
        newlines=explanation.newlines,
        answers={"All patches (dense)": dense}
        | ({f"Pruned by {sparsity.method}": pruned} if METHODS[sparsity.method].reduces else {}),
        verdict=summary.verdict(explanation),
        savings=[*summary.savings(explanation), summary.program_saving(explanation)],
        notes=summary.notes(explanation),
        words=explanation.words,
        strongest=max((word.relevance for word in explanation.words.after), default=1.0),
        scored_by=summary.scored_by(explanation),
        stages=[_stage(explanation, stage) for stage in explanation.stages],
        merges=any(stage.pruning and stage.pruning.merged for stage in explanation.stages),
        costs=summary.stage_costs(explanation),
        tints=[_css(colour) for colour in TINTS[:3]],
        color_map=", ".join(map(_css, CIVIDIS)),
        version=__version__,
        device=jax.devices()[0].device_kind,
    )


def _view(explanation: Explanation, view: View) -> dict[str, str]:
    """What the template shows of what the model saw."""
    cells = "patches" if explanation.pruned.plan.grid is None else "cells"
    (rows, columns), source = view.shape, summary.source_name(view)
    of_its_kind = explanation.videos if view.is_frame else explanation.images
    also = f", {view.name}" if view.name else ""
    whole = ("The image" if of_its_kind == 1 else source) + also
    size = f"{rows} × {columns} {cells}" + (", a newline behind each row" if view.newlines else "")
    return {
        "image": _inline(draw_view(view)),
        "alt": f"{source} of {of_its_kind}{also}, as the model saw it",
        "caption": summary.view_name(view, explanation) if view.is_frame else f"{whole}, as the model saw it: {size}",
    }


def _stage(explanation: Explanation, stage: Stage) -> dict[str, Any]:
    """What the template shows of a stage, a figure per view."""
    name = summary.stage_name(stage)
    figures = []
    for drawing, view in zip(draw_stage(explanation, stage), explanation.views, strict=True):
        counts = summary.fates_of(view, stage)
        caption = summary.view_name(view, explanation)
        alt = f"{name}: {caption}{', ' if caption else ''}{counts}"
        figures.append({"image": _inline(drawing), "alt": alt, "caption": caption and f"{caption}: {counts}"})
    return {
        "name": name,
        "entering": summary.entering(stage),
        "visual": stage.visual,
        "share": stage.visual / explanation.stages[0].visual,
        "figures": in_rows(explanation.views, figures),
        "pruning": None if stage.pruning is None else _pruning(explanation, stage.pruning, name),
    }


def _pruning(explanation: Explanation, pruning: Pruning, name: str) -> dict[str, Any]:
    drawings, low, high = draw_pruning(explanation, pruning)
    maps = []
    for drawing, view in zip(drawings, explanation.views, strict=True):
        caption = summary.view_name(view, explanation)
        of = f" in {caption[0].lower()}{caption[1:]}" if caption else ""
        alt = f"Scores at the end of {name.lower()}{of}: {_highest(view, pruning)}; outlined patches stay"
        maps.append({"image": _inline(drawing), "alt": alt, "caption": caption})
    return {
        "maps": in_rows(explanation.views, maps),
        "low": f"{low:.2g}",
        "high": f"{high:.2g}",
        "outcome": summary.outcome(pruning),
    }


def _highest(view: View, pruning: Pruning) -> str:
    """Where the best score of a view is."""
    scores = np.nan_to_num(view.of(pruning.scores, np.nan), nan=-np.inf)
    if not np.isfinite(scores).any():
        return "none of them is left"
    row, column = np.unravel_index(np.argmax(scores), scores.shape)
    if column == view.shape[1]:
        return f"the highest is the newline of row {row + 1}"
    return f"the highest in row {row + 1}, column {column + 1}"


def _inline(image: Image.Image) -> str:
    """An image as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def _css(colour: tuple[int, int, int]) -> str:
    return "rgb({}, {}, {})".format(*colour)
