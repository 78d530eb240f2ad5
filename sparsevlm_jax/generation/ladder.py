"""v1 stage by stage: how many tokens stay is known only when a stage has run, so the next one is cut to that.

Each stage is a program of its own, compiled for a few lengths. Rows are packed, so a shorter one means leaving off the
end of the arrays. The tokens are those of the one program with masks (`stages.prefill`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.models import fits
from sparsevlm_jax.models.stages import Cache, Params, Prompt, decoder_of, last_logits, run_stage, start
from sparsevlm_jax.ops.attention import padded_length
from sparsevlm_jax.parallel.arrays import fetch
from sparsevlm_jax.pruning.budgets import stage_by_rank
from sparsevlm_jax.pruning.plan import Plan, StagePlan
from sparsevlm_jax.pruning.positions import next_positions
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.pruning.tokens import Tokens

LENGTH_BUCKETS = (0, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


def prefill_stage_by_stage(
    params: Params,
    prompt: Prompt,
    config: ModelConfig,
    plan: Plan,
    *,
    max_new_tokens: int,
    call: Callable[..., Any] = lambda program, *args, **static: program(*args, **static),
) -> tuple[Float[Array, "b vocab"], Cache, Plan]:
    """`stages.prefill` for a v1 plan, each stage only as long as the batch's rows need.

    It waits for every stage to know the next one's length, so it cannot be traced.

    Args:
      call: runs a jitted program on its arguments; a caller with a clock puts it here.

    Returns:
      Logits of the next token, the cache, and the plan as it was run, which `decode_step` takes.

    Raises:
      ValueError: as `stages.prefill` does, and where it would make the logits of a row NaN.
    """
    fits.require_prompt(params, prompt, config, plan, max_new_tokens)
    text = plan.stages[0].text_tokens(prompt.visual.shape[1])
    tokens, fitting = call(_start, prompt, plan=plan, axes=config.text.rope.position_axes)
    if not fetch(fitting).all():
        raise ValueError(f"a row has more visual tokens than the plan's {plan.visual_tokens}, or too many others")
    stages, keys, values, lengths, positions = [], [], [], [], []
    visual = plan.visual_tokens
    for planned in plan.stages:
        if planned.keep is None:
            stage = StagePlan(planned.start, planned.stop, visual, standing=visual)
        else:
            stage = stage_by_rank(plan.sparsity, planned.start, planned.stop - 1, visual, text)
        stages.append(stage)
        lengths.append(tokens.lengths)
        positions.append(next_positions(tokens.lengths, prompt.lengths, prompt.next_positions, plan.sparsity))
        tokens, cached = call(
            _run_stage, params, tokens, config=config, sparsity=plan.sparsity, stage=stage, room=max_new_tokens
        )
        keys += [key for key, _ in cached]
        values += [value for _, value in cached]
        visual = length_bucket(int(np.max(np.sum(fetch(tokens.visual), axis=1))), stage.standing)
        tokens = _cut(tokens, min(padded_length(text + visual), tokens.visual.shape[1]))
    cache = Cache(tuple(keys), tuple(values), jnp.stack(lengths), jnp.stack(positions))
    return call(_finish, params, tokens, config=config), cache, replace(plan, stages=tuple(stages))


def length_bucket(needed: int, most: int) -> int:
    """The smallest stage length for `needed` visual tokens; never more than `most`."""
    return min(next((size for size in LENGTH_BUCKETS if size >= needed), most), most)


def _cut(tokens: Tokens, length: int) -> Tokens:
    """Leaves off the end of every row, where there is only padding."""
    return jax.tree.map(lambda a: a if a.ndim == 1 else a[:, :length], tokens)


@partial(jax.jit, static_argnames=("plan", "axes"))
def _start(prompt: Prompt, *, plan: Plan, axes: int) -> tuple[Tokens, Bool[Array, "b"]]:
    return start(prompt, plan, axes), fits.holds(prompt, plan)


@partial(jax.jit, static_argnames=("config", "sparsity", "stage", "room"))
def _run_stage(
    params: Params, tokens: Tokens, *, config: ModelConfig, sparsity: Sparsity, stage: StagePlan, room: int
) -> tuple[Tokens, list[tuple[Array, Array]]]:
    decoder = decoder_of(params, config)
    return run_stage(decoder, tokens, stage, config, sparsity, room)[:2]


@partial(jax.jit, static_argnames=("config",))
def _finish(params: Params, tokens: Tokens, *, config: ModelConfig) -> Array:
    return last_logits(decoder_of(params, config), tokens)
