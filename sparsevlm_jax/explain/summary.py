"""What an explanation says in words and numbers; the page and the figure lay it out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from sparsevlm_jax.explain.provenance import ABSENT, DROPPED, KEPT
from sparsevlm_jax.explain.trace_run import Explanation, Pruning, Stage, first_difference
from sparsevlm_jax.explain.views import BASE, CANVAS, View
from sparsevlm_jax.explain.words import pieces
from sparsevlm_jax.generation.api import require_processor
from sparsevlm_jax.generation.request import Generation
from sparsevlm_jax.models import cost
from sparsevlm_jax.pruning.budgets import cache_bytes, paper_flops
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.text import count, in_bytes, in_si

_xla_flops = cache(cost.xla_flops)  # counted from shapes, which many questions share
END = "end of the answer"


class ComparedAnswer(NamedTuple):
    """An answer, and where it parts from the other: `same`, then `differs` (empty where it does not), then `rest`."""

    text: str
    same: str
    differs: str
    rest: str


class Saving(NamedTuple):
    """One quantity, pruned and dense, and how much less that is."""

    name: str
    pruned: str
    dense: str
    change: str


class FrameCounts(NamedTuple):
    """What stands of a frame's visual tokens on entering each stage: kept as they were, and merged."""

    name: str
    kept: list[int]
    merged: list[int]


class StageCost(NamedTuple):
    """What a stage's layers take in and cost; multiply-adds by the paper's formula, keys and values in 16 bit."""

    layers: str
    patches: int  # visual tokens as they were: one patch, the class token, or a newline
    merged: int
    text: int
    multiply_adds: str
    cache: str


def stage_name(stage: Stage) -> str:
    """Which layers the stage is, counted from 0."""
    start, stop = stage.plan.start, stage.plan.stop
    if start == stop:
        return "Before the first layer" if start == 0 else "Behind the last layer"
    return f"Layer {start}" if stop == start + 1 else f"Layers {start} to {stop - 1}"


def entering(stage: Stage) -> str:
    """What enters, as a sentence."""
    merged = merged_tokens(stage)
    parts = f": {stage.visual - merged} as they were and {merged} merged" if merged else ""
    return f"{count(stage.visual, 'visual token')}{parts}"


def merged_tokens(stage: Stage) -> int:
    """Merged tokens that enter."""
    return len(set(stage.outcomes[stage.outcomes > 0].tolist()))


def shown(explanation: Explanation) -> str:
    """What the question is about."""
    kinds = ["image"] * (explanation.images > 0) + ["video"] * (explanation.videos > 0)
    return f"the {' and '.join(kinds)}"


def source_name(view: View) -> str:
    """Which image or video a view is of."""
    return f"{'Video' if view.is_frame else 'Image'} {view.image + 1}"


def view_name(view: View, explanation: Explanation) -> str:
    """What a view is called beside others; empty where it is the only one."""
    several = explanation.images + explanation.videos > 1
    name = ", ".join([source_name(view)] * several + [view.name] * bool(view.name))
    return name[:1].upper() + name[1:]


def fates_of(view: View, stage: Stage) -> str:
    """What stands in a view on entering a stage, in numbers."""
    outcomes = view.of(stage.outcomes, ABSENT)
    patches = outcomes[:, : view.shape[1]]
    told = f"{np.sum(patches == KEPT)} patches kept, {np.sum(patches > 0)} merged, {np.sum(patches == DROPPED)} dropped"
    if view.newlines:
        told += f"; {np.sum(outcomes[:, -1] != DROPPED)} of {len(outcomes)} newlines left"
    if view.class_token != ABSENT:
        fate = int(stage.outcomes[view.class_token])
        told += f"; class token {'merged' if fate > 0 else {KEPT: 'kept', DROPPED: 'dropped'}[fate]}"
    return told


def frames_left(explanation: Explanation) -> list[FrameCounts]:
    """What each frame still has at every stage."""
    found = []
    for view in explanation.views:
        if view.is_frame:
            own = [stage.outcomes[view.numbers] for stage in explanation.stages]
            kept, merged = ([int(np.sum(fits(o))) for o in own] for fits in (lambda o: o == KEPT, lambda o: o > 0))
            found.append(FrameCounts(view_name(view, explanation), kept, merged))
    return found


def outcome(pruning: Pruning) -> str:
    """What a pruning layer did, as a sentence."""
    merged = f", {pruning.recycled} merged into {pruning.merged}" if pruning.merged else ""
    return f"{pruning.kept} kept{merged}, {pruning.dropped} dropped"


def scored_by(explanation: Explanation) -> str:
    """How the method scores, in its own words."""
    return METHODS[explanation.pruned.plan.sparsity.method].in_short


def answers(explanation: Explanation) -> tuple[ComparedAnswer, ComparedAnswer]:
    """The dense and the pruned answer."""
    dense, pruned = explanation.dense, explanation.pruned
    at = first_difference(dense.tokens[0], pruned.tokens[0])
    return _answer(explanation, dense, at), _answer(explanation, pruned, at)


def verdict(explanation: Explanation) -> str:
    """Whether the two answers are the same, and where they part."""
    at = first_difference(explanation.dense.tokens[0], explanation.pruned.tokens[0])
    if at is None:
        return "Same answer, token for token."
    dense, pruned = (f"“{answer.differs.strip()}”" for answer in answers(explanation))
    return f"They part at token {at + 1}: {dense} dense, {pruned} pruned."


def savings(explanation: Explanation) -> list[Saving]:
    """Tokens, multiply-adds and cache, over the whole decoder, pruned against dense."""
    config, words = explanation.model.config, explanation.text_tokens
    pruned, dense = explanation.pruned.plan, explanation.dense.plan
    visual = [stage.visual for stage in explanation.stages]
    whole = explanation.dense.visual_tokens[0]
    lengths, most = ([words + n for n in layers] for layers in (pruned.entering(visual), dense.entering(whole)))
    entered, flops, held = (
        (pruned.entering_tokens(visual), whole[0]),
        tuple(paper_flops(config.text, n) for n in (lengths, most)),
        tuple(cache_bytes(config.text, n, 2) for n in (lengths, most)),
    )
    return [
        _saving("Visual tokens entering a layer, on average", entered, lambda n: f"{n:.1f}".removesuffix(".0")),
        _saving("Multiply-adds, by the paper's formula", flops, in_si),
        _saving("Keys and values, 16 bit", held, in_bytes),
    ]


def program_saving(explanation: Explanation) -> Saving:
    """FLOPs of the programs, by XLA's count. Both are traced and lowered for it, which takes seconds."""
    config, plans = explanation.model.config, (explanation.pruned.plan, explanation.dense.plan)
    counts = tuple(_xla_flops(config, plan, explanation.text_tokens) for plan in plans)
    return _saving("FLOPs of the program, by XLA", counts, in_si)


def stage_costs(explanation: Explanation) -> list[StageCost]:
    """Costs of every stage that has layers."""
    text, words = explanation.model.config.text, explanation.text_tokens
    found = []
    for stage in explanation.stages:
        lengths = [words + stage.visual] * (stage.plan.stop - stage.plan.start)
        if lengths:
            merged = merged_tokens(stage)
            flops, held = in_si(paper_flops(text, lengths)), in_bytes(cache_bytes(text, lengths, 2))
            found.append(StageCost(stage_name(stage), stage.visual - merged, merged, words, flops, held))
    return found


def notes(explanation: Explanation) -> list[str]:
    """What a reader has to know about this run to read it rightly."""
    plan = explanation.pruned.plan
    method = METHODS[plan.sparsity.method]
    found = []
    if plan.grid is not None:
        found.append(
            f"{method.name} drops no token: every image enters as {plan.grid} × {plan.grid} larger cells, and all of "
            "them go through every layer."
        )
    elif len(plan.stages) == 1:
        found.append(
            "Nothing is pruned here: every patch goes through every layer. No word has to rate; the marks on them show "
            "which would."
        )
    elif not method.guided:
        found.append(
            f"{method.name} does not ask the question's words: the marks on them show who would rate under SparseVLM. "
            f"It ranks patches so: {scored_by(explanation)}."
        )
    if method.counts_are_bounds:
        found.append(
            f"{method.name} decides from the image and the question how many tokens stay. The counts are those of "
            "this run; XLA counts the program, which is made for the most that could stay."
        )
    if explanation.newlines:
        found.append(_two_views(explanation))
    if explanation.videos:
        found.append(_frames(explanation))
    if plan.visual_tokens != explanation.stages[0].visual:
        found.append(
            "Programs are made for sizes that many images share: XLA counts one whose visual tokens are padded from "
            f"{explanation.stages[0].visual} to {plan.visual_tokens}."
        )
    absent = sum(int(np.sum(view.tokens == ABSENT)) for view in explanation.views)
    if absent:
        found.append(
            f"{count(absent, 'patch')} of the image, left blank here, has no visual token: this checkpoint drops the "
            "first one of its tower."
        )
    if explanation.class_tokens:
        found.append(
            f"The tower's class token is a visual token too, {explanation.class_tokens} in all: it is counted, "
            "but it is no patch and has no place in the image. It is drawn apart: the small square above, in which "
            "all of the image stands."
        )
    return found


def _two_views(explanation: Explanation) -> str:
    base, canvas = (next(view for view in explanation.views if view.name == name) for name in (BASE, CANVAS))
    sides = [" by ".join(map(str, view.shape)) for view in (base, canvas)]
    every = "Every image" if explanation.views[-1].image else "The image"
    shown = f": {sides[0]} and {sides[1]} patches" if every == "The image" else ""
    return (
        f"{every} is shown to the model twice{shown}. The base is all of it, pressed into one square; the canvas is "
        "the same in its own shape, cut into tiles without their padding. Each row of the canvas is closed by a "
        f"newline token, {explanation.newlines} in all: drawn apart at the right, pruned like any patch."
    )


def _frames(explanation: Explanation) -> str:
    view = next(view for view in explanation.views if view.is_frame)
    frames = sum(view.is_frame for view in explanation.views)
    subject = "The video is" if explanation.videos == 1 else "The videos are"
    if explanation.pruned.plan.sparsity.per_frame:
        shared = "Frames take turns, each giving its best token that is left"
    else:
        shared = "Their tokens are one pool: a frame may keep many of them, and another none"
    return (
        f"{subject} shown to the model as {frames} frames of {' by '.join(map(str, view.shape))} patches, one after "
        f"the other. {shared}."
    )


def _answer(explanation: Explanation, generation: Generation, at: int | None) -> ComparedAnswer:
    processor, tokens = require_processor(explanation.model), generation.tokens[0]
    text = processor.decode(tokens)
    if at is None:
        return ComparedAnswer(text, text, "", "")
    parts = pieces(tokens, processor)
    same, differs, rest = "".join(parts[:at]), "".join(parts[at : at + 1]) or END, "".join(parts[at + 1 :])
    return ComparedAnswer(text, same.lstrip(), differs if at else differs.lstrip(), rest)


def _saving(name: str, values: tuple[float | int, ...], show: Callable[[float | int], str]) -> Saving:
    pruned, dense = values
    change = "the same" if pruned == dense else f"{abs(1 - pruned / dense):.0%} {'more' if pruned > dense else 'less'}"
    return Saving(name, show(pruned), show(dense), change)
