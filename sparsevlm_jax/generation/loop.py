"""The compiled part of answering: prefill with the first token, and the loop that decodes the others.

The step limit is traced: streaming drives the same compiled loop a few steps at a time.

Axis letters: b batch, l packed sequence length, g room for new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.inputs.packing import TiledImages
from sparsevlm_jax.models.embedding import embed
from sparsevlm_jax.models.stages import Cache, ImageFeatures, Params, decode_step, prefill
from sparsevlm_jax.parallel.arrays import shapes_on
from sparsevlm_jax.parallel.inside import whole
from sparsevlm_jax.pruning.plan import Plan


@dataclass(frozen=True)
class LoopConfig:
    """Static settings of the loop: room for new tokens, whether it samples, and the ids that end an answer."""

    room: int
    greedy: bool
    end_tokens: tuple[int, ...]


class SamplingParams(NamedTuple):
    """Traced settings of sampling: temperature, and the probability mass that top-p keeps."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


class DecodeState(NamedTuple):
    """Where decoding stands. `tokens` holds what was chosen so far; the last one has not been decoded yet."""

    cache: Cache
    tokens: Int[Array, "b g"]
    counts: Int[Array, "b"]  # tokens chosen in each row, its end token included
    done: Bool[Array, "b"]
    finite: Bool[Array, "b"]  # whether all logits were numbers that a token of the row was chosen by
    steps: Int[Array, ""]  # tokens chosen in the rows that are not done
    keys: Array  # a PRNG key per row


def shapes_of_state(state: Any, everywhere: Sharding, by_head: Sharding) -> DecodeState:
    """Shapes of a state whose keys and values lie by head, and all else everywhere."""
    keys, values = shapes_on((state.cache.keys, state.cache.values), by_head)
    shapes: DecodeState = shapes_on(state, everywhere)
    return shapes._replace(cache=shapes.cache._replace(keys=keys, values=values))


@partial(jax.jit, static_argnames=("config", "plan", "decoding"))
def start(
    params: Params,
    input_ids: Int[Array, "b l"],
    lengths: Int[Array, "b"],
    images: Float[Array, "m 3 height width"] | TiledImages | ImageFeatures | None,
    keys: Array,
    sampler: SamplingParams,
    seed: Array | None = None,
    *,
    config: ModelConfig,
    plan: Plan,
    decoding: LoopConfig,
) -> DecodeState:
    """Prefill and the first token. `seed` is of methods that draw random numbers."""
    prompt = embed(params, input_ids, lengths, images, config, plan)
    logits, cache, _ = prefill(params, prompt, config, plan, max_new_tokens=decoding.room, seed=seed)
    return first_token(logits, cache, keys, sampler, decoding=decoding)


@partial(jax.jit, static_argnames=("config", "stops", "decoding"), donate_argnames=("state",))
def decode(
    params: Params,
    state: DecodeState,
    limit: Int[Array, ""],
    sampler: SamplingParams,
    *,
    config: ModelConfig,
    stops: tuple[int, ...],
    decoding: LoopConfig,
) -> DecodeState:
    """Decodes until every row has ended or `limit` tokens are chosen; `limit` is traced, at most `decoding.room`.

    Of the plan it takes the `stops` alone: another budget with equal cache lengths is the same program.
    """

    def go_on(state: DecodeState) -> Array:
        return (state.steps < limit) & ~jnp.all(state.done)

    def step(state: DecodeState) -> DecodeState:
        token = jax.lax.dynamic_index_in_dim(state.tokens, state.steps - 1, axis=1, keepdims=False)
        logits, cache = decode_step(params, token, state.cache, config, stops)
        return _choose(state._replace(cache=cache), logits, sampler, decoding)

    return jax.lax.while_loop(go_on, step, state)


def sample(logits: Float[Array, "b vocab"], keys: Array, sampler: SamplingParams) -> Int[Array, "b"]:
    """Draws a token per row from the tempered distribution, cut to the smallest set of mass `top_p` or more."""
    # The largest logit becomes 0 first: no temperature overflows it.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampler.temperature
    ranked = jnp.sort(logits, axis=-1, descending=True)
    mass_before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
    kept = jnp.sum(mass_before < sampler.top_p, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(ranked, jnp.maximum(kept - 1, 0), axis=-1)
    return jax.vmap(jax.random.categorical)(keys, jnp.where(logits >= threshold, logits, -jnp.inf))


@partial(jax.jit, static_argnames=("decoding",), donate_argnames=("cache",))
def first_token(
    logits: Array, cache: Cache, keys: Array, sampler: SamplingParams, *, decoding: LoopConfig
) -> DecodeState:
    batch = logits.shape[0]
    empty = DecodeState(
        cache=cache,
        tokens=jnp.zeros((batch, decoding.room), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        finite=jnp.ones(batch, bool),
        steps=jnp.int32(0),
        keys=keys,
    )
    return _choose(empty, logits, sampler, decoding)


def _choose(
    state: DecodeState, logits: Float[Array, "b vocab"], sampler: SamplingParams, decoding: LoopConfig
) -> DecodeState:
    """Chooses the next token of every row; rows that are done repeat an end token that is not counted.

    On a mesh all that says of rows what was chosen is whole on every device, so that every process can read it.
    """
    if decoding.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.steps)
        token = sample(logits, keys, sampler).astype(jnp.int32)
    token = whole(token)
    ends = jnp.zeros_like(state.done)
    for end in decoding.end_tokens:
        ends |= token == end
    return state._replace(
        tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.steps, axis=1),
        counts=state.counts + (~state.done).astype(jnp.int32),
        finite=state.finite & (state.done | whole(jnp.all(jnp.isfinite(logits), axis=-1))),
        done=state.done | ends,
        steps=state.steps + 1,
    )
