"""Runs a question dense and pruned, and records what was kept, merged and dropped on the way.

Axis letters: m pictures, g patches per side of a picture, S pixels per side, o original visual tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.explain.provenance import Origins, chosen, fates, origins, scores
from sparsevlm_jax.explain.words import Words, read_words
from sparsevlm_jax.generation.api import generate_ids, require_finite, require_processor
from sparsevlm_jax.generation.request import Generation, Run
from sparsevlm_jax.inputs.images import ImageLike
from sparsevlm_jax.models.embedding import embed
from sparsevlm_jax.models.stages import Cache, Params, Trace, prefill
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan, StagePlan
from sparsevlm_jax.pruning.prune import Event
from sparsevlm_jax.pruning.settings import Sparsity


class Pruning(NamedTuple):
    """What one pruning layer did, patch by patch and in numbers of tokens."""

    scores: Float[np.ndarray, "m g g"]  # of the token that each patch is part of; nan where it no longer stands
    chosen: Bool[np.ndarray, "m g g"]  # in a token that stays as it is
    kept: int
    recycled: int  # tokens that were merged, into
    merged: int  # so many
    dropped: int


class Stage(NamedTuple):
    """Decoder layers that share one sequence of tokens, and the pruning behind them (None behind the last)."""

    plan: StagePlan
    visual: int  # visual tokens that enter
    fates: Int[np.ndarray, "m g g"]  # of every patch on entering: see `provenance`
    pruning: Pruning | None


@dataclass(frozen=True)
class Explanation:
    """One question about pictures, answered by one model dense and pruned.

    Attributes:
      pictures: as the model saw them: cropped or padded, and shrunk where the method does that.
      text_tokens: all tokens of the prompt that are not visual.
      class_tokens: visual tokens that are no patch (the tower's class token, where the checkpoint keeps it).
    """

    model: Model
    question: str
    pictures: UInt8[np.ndarray, "m S S 3"]
    words: Words
    stages: list[Stage]
    dense: Generation
    pruned: Generation
    text_tokens: int
    class_tokens: int


def explain(
    model: Model,
    images: Sequence[ImageLike],
    question: str,
    sparsity: Sparsity,
    *,
    max_new_tokens: int = 128,
    aspect: str | None = None,
) -> Explanation:
    """Answers a question greedily, dense and pruned, and records the pruned prefill.

    Raises:
      UserError: no picture, or whatever `generate` refuses.
    """
    require_picture(images)
    processor, config = require_processor(model), model.config
    if config.tile_tokens < config.vision.grid**2:
        raise UserError("explain draws all patches of an image: this model has no token of the first one")
    inputs = processor([list(images)], [question], aspect)
    settings: Any = {"max_new_tokens": max_new_tokens, "end_tokens": model.generation.eos_token_ids}
    run = Run(model.params, config, inputs.ids, inputs.images, sparsity=sparsity, **settings)
    pruned, trace = _run_traced(run, max_new_tokens)
    dense = generate_ids(model.params, config, inputs.ids, inputs.images, sparsity=Sparsity.dense(), **settings)
    for generation in (pruned, dense):
        require_finite(generation, model.params)
    packed = pruned.packed
    length = int(packed.lengths[0])
    return Explanation(
        model=model,
        question=question,
        pictures=as_seen(inputs.pixel_values, processor.image_processor, run.plan, config),
        words=read_words(packed.input_ids[0, :length], trace.tokens, question, len(images), processor),
        stages=_stages(trace, run.plan, len(images), run.plan.grid or config.vision.grid),
        dense=dense,
        pruned=pruned,
        text_tokens=length - packed.visual,
        class_tokens=sum(int(np.sum(layout.places[:, 1] < 0)) for layout in inputs.layouts),
    )


def require_picture(images: Sequence[ImageLike]) -> None:
    """Refuses text alone.

    Raises:
      UserError: there is no picture.
    """
    if not images:
        raise UserError("explain shows what becomes of a picture's patches: give at least one `image`")


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, None where they are the same."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None if shared == len(a) == len(b) else shared


@partial(jax.jit, static_argnames=("config", "plan", "room"))
def _prefill_traced(
    params: Params,
    ids: Array,
    lengths: Array,
    pixels: Array,
    seed: Array | None,
    *,
    config: ModelConfig,
    plan: Plan,
    room: int,
) -> tuple[Array, Cache, Trace]:
    prompt = embed(params, ids, lengths, pixels, config, plan)
    logits, cache, trace = prefill(params, prompt, config, plan, trace=True, max_new_tokens=room, seed=seed)
    assert trace is not None
    return logits, cache, trace


def _run_traced(run: Run, max_new_tokens: int) -> tuple[Generation, Trace]:
    """Answers on the very cache of the prefill that is recorded."""
    arrays = jnp.asarray(run.packed.input_ids), jnp.asarray(run.packed.lengths), run.images, run.seed
    logits, cache, trace = _prefill_traced(run.params, *arrays, config=run.config, plan=run.plan, room=run.room)
    return run.result(run.decode(run.resume(logits, cache), max_new_tokens)), trace


def _stages(trace: Trace, plan: Plan, pictures: int, grid: int) -> list[Stage]:
    def by_patch(values: Shaped[np.ndarray, "o"]) -> Shaped[np.ndarray, "m g g"]:
        # Where the class token is a visual token too, it stands before its picture's patches.
        return values.reshape(pictures, -1)[:, -grid * grid :].reshape(pictures, grid, grid)

    def pruning(event: Event, standing: Origins) -> Pruning:
        before, selection = int(event.before.visual.sum()), event.selection
        kept, recycled = int(selection.kept_count[0]), int(selection.pool_count[0])
        return Pruning(
            scores=by_patch(scores(event, standing)),
            chosen=by_patch(chosen(event, standing)),
            kept=kept,
            recycled=recycled,
            merged=int(selection.cluster_count[0]),
            dropped=before - kept - recycled,
        )

    entering = [trace.tokens, *(event.after for event in trace.events)]
    found = origins(trace.tokens, trace.events)
    told = fates(trace.events, found)
    prunings = [*(pruning(*both) for both in zip(trace.events, found, strict=False)), None]
    return [
        Stage(stage, int(tokens.visual.sum()), by_patch(fate), done)
        for stage, tokens, fate, done in zip(plan.stages, entering, told, prunings, strict=True)
    ]


def as_seen(
    pixels: Float[np.ndarray, "m 3 S S"], image_processor: Any, plan: Plan, config: ModelConfig
) -> UInt8[np.ndarray, "m s s 3"]:
    """The processor's last steps undone, from what the tower takes back to colours."""
    shrink = METHODS[plan.sparsity.method].shrink_images
    if plan.grid is not None and shrink is not None:
        pixels = np.asarray(shrink(jnp.asarray(pixels), plan.grid * config.vision.patch_size))
    if getattr(image_processor, "do_normalize", False):
        mean, std = (np.asarray(x)[:, None, None] for x in (image_processor.image_mean, image_processor.image_std))
        pixels = pixels * std + mean
    if getattr(image_processor, "do_rescale", False):
        pixels = pixels / image_processor.rescale_factor
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
