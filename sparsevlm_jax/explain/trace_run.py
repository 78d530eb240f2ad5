"""Runs a question dense and pruned, and records what was kept, merged and dropped on the way.

Axis letters: o original visual tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.explain.provenance import Origins, chosen, origins, outcomes, scores
from sparsevlm_jax.explain.views import View, as_seen, views_of
from sparsevlm_jax.explain.words import Words, read_words
from sparsevlm_jax.generation.api import generate_ids, require_finite, require_processor
from sparsevlm_jax.generation.request import Generation, GenerationRequest
from sparsevlm_jax.inputs.images import ImageLike
from sparsevlm_jax.inputs.video import SAMPLING, Sampling, VideoLike
from sparsevlm_jax.models.embedding import TowerImages, embed
from sparsevlm_jax.models.stages import Cache, Params, Trace, prefill
from sparsevlm_jax.parallel.arrays import on_mesh_of
from sparsevlm_jax.pruning.plan import Plan, StagePlan
from sparsevlm_jax.pruning.prune import PruningStep
from sparsevlm_jax.pruning.settings import Sparsity


class Pruning(NamedTuple):
    """What one pruning layer did, to each original visual token and in numbers of tokens."""

    scores: Float[np.ndarray, "o"]  # of the token that it is part of; nan where it no longer stands
    chosen: Bool[np.ndarray, "o"]  # in a token that stays as it is
    kept: int
    recycled: int  # tokens that were merged, into
    merged: int  # so many
    dropped: int


class Stage(NamedTuple):
    """Decoder layers that share one sequence of tokens, and the pruning behind them (None behind the last)."""

    plan: StagePlan
    visual: int  # visual tokens that enter
    outcomes: Int[np.ndarray, "o"]  # of every original visual token on entering: see `provenance`
    pruning: Pruning | None


@dataclass(frozen=True)
class Explanation:
    """One question about images and videos, answered by one model dense and pruned.

    Attributes:
      views: images and frames as the model saw them: cropped, padded or laid out, and shrunk where the method does
        that.
      text_tokens: all tokens of the prompt that are not visual.
      class_tokens: visual tokens that are no patch (the tower's class token, where the checkpoint keeps it).
    """

    model: Model
    question: str
    views: list[View]
    words: Words
    stages: list[Stage]
    dense: Generation
    pruned: Generation
    text_tokens: int
    class_tokens: int

    @property
    def images(self) -> int:
        return len({view.image for view in self.views if not view.is_frame})

    @property
    def videos(self) -> int:
        return len({view.image for view in self.views if view.is_frame})

    @property
    def newlines(self) -> int:
        """Newline tokens, which close the rows of canvases."""
        return sum(view.shape[0] for view in self.views if view.newlines)


def explain(
    model: Model,
    images: Sequence[ImageLike],
    question: str,
    sparsity: Sparsity,
    *,
    max_new_tokens: int = 128,
    aspect: str | None = None,
    videos: Sequence[VideoLike] = (),
    sampling: Sampling = SAMPLING,
) -> Explanation:
    """Answers a question greedily, dense and pruned, and records the pruned prefill.

    Raises:
      UserError: neither image nor video, or whatever `generate` refuses.
    """
    require_shown(images, videos)
    processor, config = require_processor(model), model.config
    inputs = processor([list(images)], [question], aspect, [list(videos)], sampling)
    settings: Any = {"max_new_tokens": max_new_tokens, "end_tokens": model.generation.eos_token_ids}
    run = GenerationRequest(model.params, config, inputs.ids, inputs.images, sparsity=sparsity, **settings)
    pruned, trace = _run_traced(run, max_new_tokens)
    dense = generate_ids(model.params, config, inputs.ids, inputs.images, sparsity=Sparsity.dense(), **settings)
    for generation in (pruned, dense):
        require_finite(generation, model.params)
    packed = pruned.packed
    frames = inputs.pixel_values[:0] if inputs.frames is None else inputs.frames
    tiles, frames = (
        as_seen(pixels, processor.image_processor, run.plan, config) for pixels in (inputs.pixel_values, frames)
    )
    stages, length = _stages(trace, run.plan), int(packed.lengths[0])
    prompt = processor.prompt(question, len(images), len(videos))
    return Explanation(
        model=model,
        question=question,
        views=views_of(inputs.layouts, tiles, frames, run.plan, config),
        words=read_words(packed.input_ids[0, :length], trace.tokens, question, prompt, processor),
        stages=stages,
        dense=dense,
        pruned=pruned,
        text_tokens=length - stages[0].visual,
        class_tokens=sum(int(np.sum(layout.places[:, 1] < 0)) for layout in inputs.layouts),
    )


def require_shown(images: Sequence[ImageLike], videos: Sequence[VideoLike]) -> None:
    """Refuses text alone.

    Raises:
      UserError: there is neither image nor video.
    """
    if not images and not videos:
        raise UserError("explain shows what becomes of an image's patches: give at least one `image` or `video`")


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, None where they are the same."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None if shared == len(a) == len(b) else shared


@partial(jax.jit, static_argnames=("config", "plan", "room"))
def _prefill_traced(
    params: Params,
    ids: Array,
    lengths: Array,
    images: TowerImages | None,
    seed: Array | None,
    *,
    config: ModelConfig,
    plan: Plan,
    room: int,
) -> tuple[Array, Cache, Trace]:
    prompt = embed(params, ids, lengths, images, config, plan)
    logits, cache, trace = prefill(params, prompt, config, plan, trace=True, max_new_tokens=room, seed=seed)
    assert trace is not None
    return logits, cache, trace


def _run_traced(run: GenerationRequest, max_new_tokens: int) -> tuple[Generation, Trace]:
    """Answers on the very cache of the prefill that is recorded."""
    arrays = jnp.asarray(run.packed.input_ids), jnp.asarray(run.packed.lengths), run.images, run.seed
    with on_mesh_of(run.params):
        logits, cache, trace = _prefill_traced(run.params, *arrays, config=run.config, plan=run.plan, room=run.room)
    return run.result(run.decode(run.resume(logits, cache), max_new_tokens)), trace


def _stages(trace: Trace, plan: Plan) -> list[Stage]:
    def pruning(event: PruningStep, standing: Origins) -> Pruning:
        before, selection = int(event.before.visual.sum()), event.selection
        kept, recycled = int(selection.kept_count[0]), int(selection.pool_count[0])
        return Pruning(
            scores=scores(event, standing),
            chosen=chosen(event, standing),
            kept=kept,
            recycled=recycled,
            merged=int(selection.cluster_count[0]),
            dropped=before - kept - recycled,
        )

    entering = [trace.tokens, *(event.after for event in trace.events)]
    found = origins(trace.tokens, trace.events)
    told = outcomes(trace.events, found)
    prunings = [*(pruning(*both) for both in zip(trace.events, found, strict=False)), None]
    return [
        Stage(stage, int(tokens.visual.sum()), outcome, done)
        for stage, tokens, outcome, done in zip(plan.stages, entering, told, prunings, strict=True)
    ]
