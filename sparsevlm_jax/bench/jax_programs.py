"""What the JAX side runs besides the package's own programs: drawn weights, recorded choices, and given ones.

Axis letters: b batch, l packed sequence length, i sequence length after pruning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from sparsevlm_jax.bench.hash_weights import draw_of, numbers, values
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.models.names import DECODER
from sparsevlm_jax.models.parameters import entries
from sparsevlm_jax.models.quantize import held_as
from sparsevlm_jax.models.stages import Cache, Params, Prompt, decoder_of, last_logits, prefill, run_stage, start
from sparsevlm_jax.ops.layers import apart, product
from sparsevlm_jax.parallel.rules import placement
from sparsevlm_jax.pruning.budgets import make_plan
from sparsevlm_jax.pruning.plan import Plan, StagePlan
from sparsevlm_jax.pruning.positions import after_cut, renumbers
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.pruning.sparsify import take


@lru_cache(maxsize=1)
def draw_params(config: ModelConfig, dtype: str, mesh: str = "", quantize: str = "") -> Params:
    """The hash's weights as a parameter tree, made on the device, or on the first of a mesh and from there one by one
    to all; sides of one process share them. Weights in eight bits are made of those in the dtype."""
    where = placement(mesh, config) if mesh else None
    tree = {}
    for name, entry in entries(config).items():
        draw = draw_of(name, entry.shape)
        drawn = _draw(
            jnp.int32(draw.seed),
            jnp.float32(draw.scale),
            shape=entry.shape,
            norm=draw.norm,
            dtype=dtype,
        )
        for path, leaf in held_as(entry.path, drawn, quantize).items():
            tree[path] = leaf if where is None else jax.device_put(leaf, where(path, leaf.shape))
    return traverse_util.unflatten_dict(tree)


@partial(jax.jit, static_argnames=("shape", "norm", "dtype"))
def _draw(seed: Array, scale: Array, *, shape: tuple[int, ...], norm: bool, dtype: str) -> Array:
    integers = numbers(jnp.arange(math.prod(shape), dtype=jnp.int32), seed)
    return values(integers, scale, norm, lambda x: x.astype(jnp.float32)).astype(dtype).reshape(shape)


@partial(jax.jit, static_argnames=("lengths",))
def products(params: Params, hidden: Float[Array, "b l d"], *, lengths: tuple[int, ...]) -> Float[Array, "b d"]:
    """The matrix products of the decoder's layers and nothing between them: what a prefill cannot be faster than.

    Args:
      hidden: what enters the first layer.
      lengths: tokens that enter each layer.
    """
    for number, length in enumerate(lengths):
        layer = params[DECODER][f"layers_{number}"]
        attention, mlp = layer["self_attn"], layer["mlp"]
        # Apart, so that products are not joined; all of them reach what is returned, so that none is left out.
        query, key, value, gate, up = apart(hidden[:, :length], 5)
        query, key, value = (
            _product(x, attention[name])
            for x, name in zip((query, key, value), ("q_proj", "k_proj", "v_proj"), strict=True)
        )
        gate, up = _product(gate, mlp["gate_proj"]), _product(up, mlp["up_proj"])
        made = _product(query, attention["o_proj"]), key, value, _product(gate, mlp["down_proj"]), up
        attended, key, value, hidden, up = jax.lax.optimization_barrier(made)
        hidden = hidden.at[:, 0].add(1e-6 * (attended[:, 0] + key[:, 0, :1] + value[:, 0, :1] + up[:, 0, :1]))
    return hidden[:, -1]


def _product(x: Array, linear: Params) -> Array:
    return product(x, linear["weight"], linear.get("scale"))


@partial(jax.jit, static_argnames=("config", "plan", "room"))
def recorded_prefill(
    params: Params, prompt: Prompt, *, config: ModelConfig, plan: Plan, room: int
) -> tuple[Float[Array, "b vocab"], Cache, list[tuple[Array, Array | None]]]:
    """The prefill, and per pruning layer: which visual tokens are kept [b, l], and the places of the clusters' centres
    [b, c]."""
    logits, cache, trace = prefill(params, prompt, config, plan, trace=True, max_new_tokens=room)
    assert trace is not None
    found = []
    for event in trace.events:
        selection, recycled = event.selection, event.recycled
        centers = None if recycled is None else take(selection.pool, recycled.centers)
        found.append((selection.kept, centers))
    return logits, cache, found


def survivors(kept: np.ndarray, centers: np.ndarray | None, visual: slice) -> np.ndarray:
    """Places [b, i] of the tokens that go on: prefix, kept ones, for every merged token its centre, text.

    All rows keep the same number of tokens, and their visual tokens stand in the same places.
    """
    rows, length = kept.shape
    image = np.stack([np.flatnonzero(row) for row in kept])
    merged = np.zeros((rows, 0), int) if centers is None else centers
    prefix, text = (
        np.broadcast_to(np.arange(*ends), (rows, ends[1] - ends[0]))
        for ends in ((0, visual.start), (visual.stop, length))
    )
    return np.concatenate([prefix, image, merged, text], axis=1).astype(np.int32)


@partial(jax.jit, static_argnames=("config", "plan", "room"))
def prefill_given(
    params: Params, prompt: Prompt, places: Sequence[Int[Array, "b _"]], *, config: ModelConfig, plan: Plan, room: int
) -> tuple[Float[Array, "b vocab"], list[tuple[Array, Array]]]:
    """The prefill's stages with every choice made beforehand: no rating, scoring, top-k or clustering.

    Args:
      places: per pruning layer [b, i], which tokens of its output go on; for a merged token, its cluster's centre.
      room: as `max_new_tokens` of `prefill`.

    Returns:
      Logits and caches. The logits are not those of `prefill`: tokens that it merges are not merged here.
    """

    decoder = decoder_of(params, config)
    tokens = start(prompt, make_plan(Sparsity.dense(), config, plan.visual_tokens), config.text.rope.position_axes)
    cached: list[tuple[Array, Array]] = []
    for stage, index in zip(plan.stages, [*places, None], strict=True):
        tokens, held, _, _ = run_stage(decoder, tokens, _unpruned(stage), config, plan.sparsity, room)
        cached += held
        if index is None:
            continue
        length = index.shape[1]
        positions = after_cut(
            tokens.positions, partial(take, index=index), index.shape, renumber=renumbers(plan.sparsity)
        )
        tokens = tokens._replace(
            hidden=take(tokens.hidden, index), positions=positions, lengths=jnp.full(len(index), length)
        )
    return last_logits(decoder, tokens), cached


def _unpruned(stage: StagePlan) -> StagePlan:
    return replace(stage, keep=None)
