"""A decoder run stage by stage: it drops visual tokens while it runs. What every family shares, from the prompt on.

`prefill` and `decode_step` are pure functions of arrays; `Llama` declares the parameters that they look up.

Axis letters: b batch, l packed sequence length, s cache length, n heads, k key-value heads, h head dim, d width,
a position axes, i first layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from sparsevlm_jax.config import ModelConfig, TextConfig
from sparsevlm_jax.models import fits
from sparsevlm_jax.models.decoder import DecoderLayer, Llama
from sparsevlm_jax.models.names import DECODER
from sparsevlm_jax.ops.attention import attend
from sparsevlm_jax.ops.rope import Rotation, rotation, rotation_of_all
from sparsevlm_jax.parallel.inside import BY_HEAD, keep, whole
from sparsevlm_jax.pruning.methods import METHODS, PruningContext
from sparsevlm_jax.pruning.plan import Plan, StagePlan
from sparsevlm_jax.pruning.positions import next_positions, on_all_axes, prompt_positions
from sparsevlm_jax.pruning.prune import PruningStep, counts_ahead, prune
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.pruning.sparsify import choose_raters, positions_where
from sparsevlm_jax.pruning.tokens import Tokens

Params = dict[str, Any]


class Prompt(NamedTuple):
    """Input embeddings of a batch, packed: the first `lengths` tokens of a row are valid, in order."""

    embeddings: Float[Array, "b l d"]
    visual: Bool[Array, "b l"]  # False in the padding
    lengths: Int[Array, "b"]
    saliency: Float[Array, "b l"] | None = None  # for methods that rate by the tower's attention
    positions: Int[Array, "b l a"] | None = None  # rotary positions; None for 0, 1, 2, ... on all axes
    next_positions: Int[Array, "b"] | None = None  # that of the first new token; None for `lengths`
    add: Float[Array, "b l i d"] | None = None  # what the first i decoder layers each add to their output (deepstack)
    frame: Int[Array, "b l"] | None = None  # a number for each frame and image, where visual; for `Sparsity.per_frame`


class ImageFeatures(NamedTuple):
    """Projected visual tokens of images, one image behind the other, which several questions can share."""

    tokens: Float[Array, "n d"]
    saliency: Float[Array, "n"]  # how much the vision tower looks at each, float32
    rows: Int[Array, "r"] | None = None  # see `inputs.packing.ImagePacking`; None where rows are whole images
    frame: Int[Array, "n"] | None = None  # see `inputs.packing.ImagePacking`
    grid: Int[Array, ""] | None = None  # patches per side that images were shrunk to; None where they were not


class Cache(NamedTuple):
    """Keys and values per layer, each as long as its stage, with room for new tokens behind.

    A layer holds what entered it. `lengths` and `positions` have a row per stage: how many tokens the stage's
    layers hold, and the rotary position of the next token there.
    """

    keys: tuple[Float[Array, "b _s k h"], ...]
    values: tuple[Float[Array, "b _s k h"], ...]
    lengths: Int[Array, "stages b"]
    positions: Int[Array, "stages b"]


class Trace(NamedTuple):
    """A recorded prefill. `hidden` is the decoder's output sequence before the final norm."""

    tokens: Tokens
    events: tuple[PruningStep, ...]
    last_hidden: Float[Array, "layers b d"]  # last valid token after every layer, after pruning
    hidden: Float[Array, "b l d"]


def prefill(
    params: Params,
    prompt: Prompt,
    config: ModelConfig,
    plan: Plan,
    trace: bool = False,
    *,
    max_new_tokens: int,
    jitter: Sequence[Array] | None = None,
    seed: Integer[Array, ""] | int | None = None,
) -> tuple[Float[Array, "b vocab"], Cache, Trace | None]:
    """Runs the prompt through the decoder, pruning visual tokens as the plan says.

    Pure and traceable: `config`, `plan`, `trace` and `max_new_tokens` are static, everything else may be traced,
    vmapped or sharded.

    Args:
      params: the parameter tree; its dtype is the dtype of the computation.
      prompt: packed embeddings. At most `plan.visual_tokens` visual tokens in a row, and at most l minus that of the
        others: rows with fewer are fine.
      config: the model.
      plan: the schedule, from `make_plan`.
      trace: also return what every pruning layer did.
      max_new_tokens: room in the cache for that many calls of `decode_step`.
      jitter: an array [b, length of the stage] per pruning layer: noise of each token, which times `sparsity.jitter`
        is added to its clustering density (it replays recorded runs; the default is none).
      seed: of a method that draws random numbers, instead of the one that its plan holds: traced, so that another seed
        compiles nothing.

    Returns:
      Logits of the next token (float32), the cache, and the trace or None. Logits are NaN in a row that holds more
      visual tokens than the plan, or more others than l minus that.

    Raises:
      ValueError: parameters, prompt, config and plan that do not belong together.
    """
    fits.require_prompt(params, prompt, config, plan, max_new_tokens)
    decoder = decoder_of(params, config)
    first = tokens = start(prompt, plan, config.text.rope.position_axes)
    seed = plan.sparsity.seed if seed is None else seed
    keys, values, lengths, positions, events, last_hidden = [], [], [], [], [], []
    for index, stage in enumerate(plan.stages):
        lengths.append(tokens.lengths)
        positions.append(next_positions(tokens.lengths, prompt.lengths, prompt.next_positions, plan.sparsity))
        noise = jitter[index] if jitter is not None and index < len(jitter) else None
        tokens, cached, event, lasts = run_stage(
            decoder, tokens, stage, config, plan.sparsity, max_new_tokens, noise, trace, seed
        )
        keys += [key for key, _ in cached]
        values += [value for _, value in cached]
        events += [event] if event is not None else []
        last_hidden += lasts
    logits = fits.or_nan(last_logits(decoder, tokens), fits.holds(prompt, plan))
    cache = Cache(tuple(keys), tuple(values), whole(jnp.stack(lengths)), whole(jnp.stack(positions)))
    if not trace:
        return logits, cache, None
    return logits, cache, Trace(first, tuple(events), jnp.stack(last_hidden), tokens.hidden)


def decode_step(
    params: Params, token: Int[Array, "b"], cache: Cache, config: ModelConfig, plan: Plan | tuple[int, ...]
) -> tuple[Float[Array, "b vocab"], Cache]:
    """Runs one new token per row through the decoder.

    In v1 and v1.5 a token's rotary position in each layer is that layer's own cache length; where positions are kept
    (v2.0) it is the same in all layers, counted from the full prompt.

    Args:
      token: ids, always looked up in the embedding table, the image marker's id included.
      cache: from `prefill` or the last `decode_step`; donate it.
      plan: that of the prefill, or just its `stops`, which are all that is looked at: as a static argument they let
        plans with equal cache lengths share a program.

    Returns:
      Logits of the next token (float32), NaN in a row whose cache had no room left, and the cache, one longer.

    Raises:
      ValueError: parameters, cache, config and plan that do not belong together.
    """
    stops = plan.stops if isinstance(plan, Plan) else plan
    fits.require_cache(params, token, cache, config, stops)
    decoder = decoder_of(params, config)
    hidden = keep(decoder.embed_words(token)[:, None, :])
    keys, values, rope = list(cache.keys), list(cache.values), config.text.rope
    for index, (first, stop) in enumerate(zip((0, *stops), stops, strict=False)):
        lengths = cache.lengths[index]
        turned = rotation(on_all_axes(cache.positions[index], rope.position_axes), rope)
        for number in range(first, stop):
            hidden, keys[number], values[number] = _decode_in_layer(
                decoder.variables["params"][f"layers_{number}"],
                hidden,
                turned,
                cache.keys[number],
                cache.values[number],
                lengths,
                config=config.text,
            )
    logits = fits.or_nan(decoder.logits(hidden[:, 0]), fits.has_space(cache, stops))
    return logits, Cache(tuple(keys), tuple(values), cache.lengths + 1, cache.positions + 1)


def decoder_of(params: Params, config: ModelConfig) -> Llama:
    """The decoder with its parameters: layers, table and head can be called."""
    return Llama(config.text, name=DECODER).bind({"params": params[DECODER]})


def beside_decoder(params: Params) -> Params:
    """The parameters of all that is not the decoder: towers and projector."""
    return {name: part for name, part in params.items() if name != DECODER}


def start(prompt: Prompt, plan: Plan, axes: int) -> Tokens:
    """The sequence that enters the first stage, its raters chosen; its positions have so many axes."""
    shape = prompt.visual.shape
    raters, lengths = jnp.zeros(shape, bool), prompt.lengths.astype(jnp.int32)
    visual_count = jnp.sum(prompt.visual, axis=1, dtype=jnp.int32)
    text = plan.stages[0].text_tokens(shape[1])
    with jax.named_scope("rate"):
        if len(plan.stages) > 1:
            raters = choose_raters(prompt.embeddings, prompt.visual, prompt.lengths, plan.visual_tokens)
        rater_rows = positions_where(raters, text)
    with jax.named_scope("select"):
        counts = counts_ahead(plan, visual_count, prompt.lengths)
    return Tokens(
        hidden=prompt.embeddings,
        positions=prompt_positions(prompt.positions, shape, axes),
        visual=prompt.visual,
        rater_rows=rater_rows,
        rater_count=jnp.sum(raters, axis=1, dtype=jnp.int32),
        text_count=lengths - visual_count,
        lengths=lengths,
        saliency=prompt.saliency if METHODS[plan.sparsity.method].needs_saliency else None,
        add=prompt.add,
        frame=prompt.frame if plan.sparsity.per_frame else None,
        counts=counts,
    )


def run_stage(
    decoder: Llama,
    tokens: Tokens,
    stage: StagePlan,
    config: ModelConfig,
    sparsity: Sparsity,
    max_new_tokens: int,
    jitter: Array | None = None,
    trace: bool = False,
    seed: Array | int | None = None,
) -> tuple[Tokens, list[tuple[Array, Array]], PruningStep | None, list[Array]]:
    """Runs a stage's layers and prunes after the last.

    Args:
      decoder: with its parameters, from `decoder_of`.

    Returns:
      The next stage's sequence; keys and values of each layer, as long as this stage and the new tokens; and,
      traced, what pruning did and the last token after each layer.
    """
    cached, last_hidden = [], []
    hidden, add, query, key = tokens.hidden, tokens.add, None, None
    turned = rotation_of_all(tokens.positions, config.text.rope)
    for number in range(stage.start, stage.stop):
        hidden, query, key, value = _prefill_layer(
            decoder.variables["params"][f"layers_{number}"],
            hidden,
            turned,
            tokens.lengths,
            config=config,
        )
        hidden, add = _added(hidden, add)
        cached.append((_with_room(key, max_new_tokens), _with_room(value, max_new_tokens)))
        last_hidden.append(_last(hidden, tokens.lengths))
    tokens = tokens._replace(hidden=hidden, add=add)
    event = None
    if stage.keep is not None:
        if METHODS[sparsity.method].looks_ahead and stage.stop < config.text.num_hidden_layers:
            query, key = decoder.queries_and_keys(stage.stop, hidden, tokens.positions)
        view = PruningContext(query, key, tokens, stage, config.text.rope, seed)
        tokens, event = prune(view, sparsity, jitter)
        tokens = tokens._replace(hidden=keep(tokens.hidden))
        if last_hidden:
            last_hidden[-1] = _last(tokens.hidden, tokens.lengths)
    return tokens, cached, event if trace else None, last_hidden if trace else []


def last_logits(decoder: Llama, tokens: Tokens) -> Float[Array, "b vocab"]:
    """Logits behind the last valid token of each row."""
    return decoder.logits(_last(tokens.hidden, tokens.lengths))


# Both layers are functions of their own, which jax traces once for all layers of one length. XLA sees through them.


@partial(jax.jit, static_argnames="config")
def _prefill_layer(
    params: Params,
    hidden: Float[Array, "b l d"],
    turned: Rotation,
    lengths: Int[Array, "b"],
    *,
    config: ModelConfig,
) -> tuple[Float[Array, "b l d"], Float[Array, "b l n h"], Float[Array, "b l k h"], Float[Array, "b l k h"]]:
    """A layer on a packed sequence: its output, queries, keys and values."""

    def attend_causally(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        out = attend(query, key, value, lengths, causal=True, implementation=config.attention)
        return out, (query, key, value)

    found = DecoderLayer(config.text).apply({"params": params}, hidden, turned, attend_causally)
    hidden, (query, key, value) = cast(tuple[Array, tuple[Array, Array, Array]], found)
    return keep(hidden), query, key, value


@partial(jax.jit, static_argnames="config")
def _decode_in_layer(
    params: Params,
    hidden: Float[Array, "b 1 d"],
    turned: Rotation,
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    lengths: Int[Array, "b"],
    *,
    config: TextConfig,
) -> tuple[Float[Array, "b 1 d"], Float[Array, "b s k h"], Float[Array, "b s k h"]]:
    """A layer on one new token per row: its output, and keys and values with the token's own."""

    def attend_cache(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
        held = _append(keys, key, lengths), _append(values, value, lengths)
        return attend(query, *held, lengths + 1, causal=False, implementation="auto"), held

    found = DecoderLayer(config).apply({"params": params}, hidden, turned, attend_cache)
    hidden, (keys, values) = cast(tuple[Array, tuple[Array, Array]], found)
    return keep(hidden), keys, values


def _added(hidden: Float[Array, "b l d"], add: Array | None) -> tuple[Float[Array, "b l d"], Array | None]:
    """A layer's output with what is added to it, and what is left for the layers behind it (None: nothing)."""
    if add is None:
        return hidden, None
    return hidden + add[:, :, 0].astype(hidden.dtype), add[:, :, 1:] if add.shape[2] > 1 else None


def _last(values: Array, lengths: Int[Array, "b"]) -> Array:
    """The last valid entry of each row."""
    return jax.vmap(lambda row, length: row[length - 1])(values, lengths)


def _with_room(cached: Float[Array, "b l k h"], room: int) -> Float[Array, "b s k h"]:
    return keep(jnp.pad(cached, ((0, 0), (0, room), (0, 0), (0, 0))), BY_HEAD)


def _append(
    cached: Float[Array, "b s k h"], new: Float[Array, "b 1 k h"], lengths: Int[Array, "b"]
) -> Float[Array, "b s k h"]:
    longer = jax.vmap(lambda row, at, entry: row.at[at].set(entry[0], mode="drop"))(cached, lengths, new)
    return keep(longer, BY_HEAD)
