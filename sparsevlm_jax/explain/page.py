"""An explanation as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
from typing import Any

import jax
import jinja2
import numpy as np
from PIL import Image

from sparsevlm_jax import __version__
from sparsevlm_jax.explain import account
from sparsevlm_jax.explain.drawing import CIVIDIS, TINTS, draw_scores, draw_stage, enlarge, png, score_range
from sparsevlm_jax.explain.record import Explanation, Pruning, Stage
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
    dense, pruned = account.answers(explanation)
    grid = explanation.stages[0].fates.shape[-1]
    return _TEMPLATES.get_template("page.html.jinja").render(
        question=explanation.question,
        model=explanation.model.name,
        method=sparsity.method,
        pictures=[_inline(enlarge(picture, grid)) for picture in explanation.pictures],
        grid=grid,
        cells="patches" if explanation.pruned.plan.grid is None else "cells",
        answers={"All patches (dense)": dense}
        | ({f"Pruned by {sparsity.method}": pruned} if METHODS[sparsity.method].reduces else {}),
        verdict=account.verdict(explanation),
        savings=[*account.savings(explanation), account.program_saving(explanation)],
        notes=account.notes(explanation),
        words=explanation.words,
        strongest=max((word.relevance for word in explanation.words.after), default=1.0),
        scored_by=account.scored_by(explanation),
        stages=[_stage(explanation, stage) for stage in explanation.stages],
        merges=any(stage.pruning and stage.pruning.merged for stage in explanation.stages),
        costs=account.stage_costs(explanation),
        tints=[_css(colour) for colour in TINTS[:3]],
        color_map=", ".join(map(_css, CIVIDIS)),
        version=__version__,
        device=jax.devices()[0].device_kind,
    )


def _stage(explanation: Explanation, stage: Stage) -> dict[str, Any]:
    """What the template shows of a stage, a figure per picture of the prompt."""
    name = account.stage_name(stage)
    figures = []
    for drawing, fates in zip(draw_stage(explanation, stage), stage.fates, strict=True):
        counts = f"{np.sum(fates == 0)} patches kept, {np.sum(fates > 0)} merged, {np.sum(fates < 0)} dropped"
        figures.append({"image": _inline(drawing), "alt": f"{name}: {counts}"})
    return {
        "name": name,
        "entering": account.entering(stage),
        "visual": stage.visual,
        "share": stage.visual / explanation.stages[0].visual,
        "figures": figures,
        "pruning": None if stage.pruning is None else _pruning(stage.pruning, name),
    }


def _pruning(pruning: Pruning, name: str) -> dict[str, Any]:
    low, high = score_range(pruning.scores)
    maps = []
    for scores, chosen in zip(pruning.scores, pruning.chosen, strict=True):
        row, column = np.unravel_index(np.argmax(np.nan_to_num(scores, nan=-np.inf)), scores.shape)
        best = f"the highest in row {row + 1}, column {column + 1}"
        alt = f"Scores at the end of {name.lower()}: {best}; outlined patches stay"
        maps.append({"image": _inline(draw_scores(scores, chosen, low, high)), "alt": alt})
    return {"maps": maps, "low": f"{low:.2g}", "high": f"{high:.2g}", "outcome": account.outcome(pruning)}


def _inline(image: Image.Image) -> str:
    """A picture as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def _css(colour: tuple[int, int, int]) -> str:
    return "rgb({}, {}, {})".format(*colour)
