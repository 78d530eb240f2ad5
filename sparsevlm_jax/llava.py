"""LLaVA whose decoder drops visual tokens while it runs.

`Llava` ties tower, projector and decoder together and runs the decoder stage by stage; the functions
under it (`embed`, `prefill`, `decode_step`) are what scripts call inside their own `jax.jit`.

Axis letters: b batch, l packed sequence length, s cache length, v visual tokens, m images, n heads,
k key-value heads, h head dim, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer

from sparsevlm_jax import fits, sparsify
from sparsevlm_jax.attention import attend
from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.llama import Llama
from sparsevlm_jax.methods import METHODS, Layer, Scores
from sparsevlm_jax.schedule import Plan, Sparsity, StagePlan, make_plan
from sparsevlm_jax.sparsify import Recycled, Selection, Tokens
from sparsevlm_jax.vision import Projector, Tower, pool_patches, shrink_pictures

Params = dict[str, Any]


class Prompt(NamedTuple):
    """Input embeddings of a batch, packed: the first `lengths` tokens of a row are valid, in order."""

    embeddings: Float[Array, "b l d"]
    visual: Bool[Array, "b l"]  # False in the padding
    lengths: Int[Array, "b"]
    saliency: Float[Array, "b l"] | None = None  # for methods that rate by the tower's attention


class Pictures(NamedTuple):
    """Projected visual tokens of pictures, which several questions can share."""

    tokens: Float[Array, "m v d"]
    saliency: Float[Array, "m v"]  # how much the tower's class token looks at each, float32


class Cache(NamedTuple):
    """Keys and values per layer, each as long as its stage, with room for new tokens behind.

    A layer holds what entered it. `lengths` and `positions` have a row per stage: how many tokens the stage's
    layers hold, and the rotary position of the next token there.
    """

    keys: tuple[Float[Array, "b _s k h"], ...]
    values: tuple[Float[Array, "b _s k h"], ...]
    lengths: Int[Array, "stages b"]
    positions: Int[Array, "stages b"]


class Event(NamedTuple):
    """One pruning layer, recorded: what scored how, what was chosen, and the sequence after it."""

    layer: int
    before: Tokens  # the layer's output, which was scored and pruned
    scores: Scores
    selection: Selection
    recycled: Recycled | None
    after: Tokens


class Trace(NamedTuple):
    """A recorded prefill. `hidden` is the decoder's output sequence before the final norm."""

    tokens: Tokens
    events: tuple[Event, ...]
    last_hidden: Float[Array, "layers b d"]  # last valid token after every layer, after pruning
    hidden: Float[Array, "b l d"]


class Llava(nn.Module):
    """Parameters of the whole model; the methods are pure functions of them."""

    config: LlavaConfig

    def setup(self) -> None:
        self.vision_tower = Tower(self.config.vision, self.config.feature_layers)
        self.multi_modal_projector = Projector(self.config)
        self.language_model = Llama(self.config.text)

    def __call__(self, pixel_values: Array, input_ids: Array, lengths: Array) -> Array:
        """Touches every parameter once, for initialisation."""
        self.encode_images(pixel_values)
        prompt = self.embed(input_ids, lengths, None)
        plan = make_plan(Sparsity.dense(), self.config, visual_tokens=0)
        return self.prefill(prompt, plan, max_new_tokens=0)[0]

    def encode_images(self, pixel_values: Float[Array, "m 3 height width"], plan: Plan | None = None) -> Pictures:
        """See the function `encode_images`."""
        grid, method = (None, "") if plan is None else (plan.grid, plan.sparsity.method)
        if grid is not None and method == "downsample":
            pixel_values = shrink_pictures(pixel_values, grid * self.config.vision.patch_size)
        features, saliency = self.vision_tower(pixel_values)
        if self.config.vision_feature_select_strategy == "default":
            features, saliency = features[:, 1:], saliency[:, 1:]
        tokens = self.multi_modal_projector(features)
        if grid is not None and method == "pool":
            tokens, saliency = pool_patches(tokens, grid), pool_patches(saliency[..., None], grid)[..., 0]
        return Pictures(tokens, saliency)

    def embed(self, input_ids: Int[Array, "b l"], lengths: Int[Array, "b"], pictures: Pictures | None) -> Prompt:
        """See the function `embed`."""
        valid = jnp.arange(input_ids.shape[1])[None, :] < lengths[:, None]
        visual = (input_ids == self.config.image_token_id) & valid
        # The marker may lie outside the table (-200 in original LLaVA checkpoints).
        words = self.language_model.embed_tokens(jnp.clip(input_ids, 0, self.config.text.vocab_size - 1))
        if pictures is None:
            # A marker without its picture has no embedding.
            words = fits.or_nan(words, ~jnp.any(visual, axis=1))
            return Prompt(words, jnp.zeros_like(visual), lengths)
        tokens = pictures.tokens.reshape(-1, words.shape[-1]).astype(words.dtype)
        given, marked = tokens.shape[0], jnp.sum(visual, axis=1)
        # A row's own pictures for each row, or one row's pictures for all: the same index either way.
        index = jnp.maximum(jnp.cumsum(visual.reshape(-1)) - 1, 0).reshape(visual.shape) % given
        embeddings = jnp.where(visual[:, :, None], tokens[index], words)
        matching = (jnp.sum(marked) == given) | jnp.all(marked == given)
        embeddings = fits.or_nan(embeddings, jnp.broadcast_to(matching, lengths.shape))
        return Prompt(embeddings, visual, lengths, jnp.where(visual, pictures.saliency.reshape(-1)[index], 0.0))

    def start(self, prompt: Prompt, plan: Plan, trace: bool = False) -> Tokens:
        """The sequence that enters the first stage, its raters chosen."""
        shape = prompt.visual.shape
        raters = jnp.zeros(shape, bool)
        if len(plan.stages) > 1:
            with jax.named_scope("rate"):
                raters = sparsify.choose_raters(prompt.embeddings, prompt.visual, prompt.lengths, plan.visual_tokens)
        return Tokens(
            hidden=prompt.embeddings,
            positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape),
            visual=prompt.visual,
            raters=raters,
            lengths=prompt.lengths.astype(jnp.int32),
            saliency=prompt.saliency if METHODS[plan.sparsity.method].needs_saliency else None,
            origins=sparsify.identity_origins(prompt.visual, plan.visual_tokens) if trace else None,
        )

    def run_stage(
        self,
        tokens: Tokens,
        stage: StagePlan,
        sparsity: Sparsity,
        max_new_tokens: int,
        jitter: Array | None = None,
        trace: bool = False,
        seed: Array | int | None = None,
    ) -> tuple[Tokens, list[tuple[Array, Array]], Event | None, list[Array]]:
        """Runs a stage's layers and prunes after the last.

        Returns:
          The next stage's sequence; keys and values of each layer, as long as this stage and the new tokens; and,
          traced, what pruning did and the last token after each layer.
        """

        def attend_causally(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array, Array]]:
            implementation = self.config.attention
            out = attend(query, key, value, tokens.lengths, causal=True, implementation=implementation)
            return out, (query, key, value)

        cached, last_hidden = [], []
        hidden, query, key = tokens.hidden, None, None
        for layer in self.language_model.layers[stage.start : stage.stop]:
            hidden, (query, key, value) = layer(hidden, tokens.positions, attend_causally)
            cached.append((_with_room(key, max_new_tokens), _with_room(value, max_new_tokens)))
            last_hidden.append(_last(hidden, tokens.lengths))
        tokens = tokens._replace(hidden=hidden)
        event = None
        if stage.keep is not None:
            if METHODS[sparsity.method].looks_ahead and stage.stop < self.config.text.num_hidden_layers:
                query, key = self.language_model.queries_and_keys(stage.stop, hidden, tokens.positions)
            view = Layer(query, key, tokens, stage, self.config.text.rope_theta, seed)
            tokens, event = prune(view, sparsity, jitter)
            if last_hidden:
                last_hidden[-1] = _last(tokens.hidden, tokens.lengths)
        return tokens, cached, event if trace else None, last_hidden if trace else []

    def prefill(
        self,
        prompt: Prompt,
        plan: Plan,
        max_new_tokens: int,
        jitter: Sequence[Array] | None = None,
        trace: bool = False,
        seed: Array | int | None = None,
    ) -> tuple[Array, Cache, Trace | None]:
        """See the function `prefill`."""
        first = tokens = self.start(prompt, plan, trace)
        seed = plan.sparsity.seed if seed is None else seed
        keys, values, lengths, positions, events, last_hidden = [], [], [], [], [], []
        for index, stage in enumerate(plan.stages):
            lengths.append(tokens.lengths)
            positions.append(next_positions(tokens, prompt, plan.sparsity))
            noise = jitter[index] if jitter is not None and index < len(jitter) else None
            tokens, cached, event, lasts = self.run_stage(
                tokens, stage, plan.sparsity, max_new_tokens, noise, trace, seed
            )
            keys += [key for key, _ in cached]
            values += [value for _, value in cached]
            events += [event] if event is not None else []
            last_hidden += lasts
        logits = fits.or_nan(self.last_logits(tokens), fits.holds(prompt, plan))
        cache = Cache(tuple(keys), tuple(values), jnp.stack(lengths), jnp.stack(positions))
        if not trace:
            return logits, cache, None
        return logits, cache, Trace(first, tuple(events), jnp.stack(last_hidden), tokens.hidden)

    def decode_step(self, token: Int[Array, "b"], cache: Cache, stops: Sequence[int]) -> tuple[Array, Cache]:
        """See the function `decode_step`."""
        hidden = self.language_model.embed_tokens(token)[:, None, :]
        keys, values = list(cache.keys), list(cache.values)
        for index, (first, stop) in enumerate(zip((0, *stops), stops, strict=False)):
            lengths, positions = cache.lengths[index], cache.positions[index]
            for number in range(first, stop):

                def attend_cache(
                    query: Array, key: Array, value: Array, number: int = number, lengths: Array = lengths
                ) -> tuple[Array, tuple[Array, Array]]:
                    held = _append(cache.keys[number], key, lengths), _append(cache.values[number], value, lengths)
                    return attend(query, *held, lengths + 1, causal=False, implementation="xla"), held

                layer = self.language_model.layers[number]
                hidden, (keys[number], values[number]) = layer(hidden, positions[:, None], attend_cache)
        logits = fits.or_nan(self.language_model.logits(hidden[:, 0]), fits.has_space(cache, stops))
        return logits, Cache(tuple(keys), tuple(values), cache.lengths + 1, cache.positions + 1)

    def last_logits(self, tokens: Tokens) -> Float[Array, "b vocab"]:
        """Logits behind the last valid token of each row."""
        return self.language_model.logits(_last(tokens.hidden, tokens.lengths))

    def logits(self, hidden: Float[Array, "b l d"]) -> Float[Array, "b l vocab"]:
        """Final norm and head of any hidden states."""
        return self.language_model.logits(hidden)


def encode_images(
    params: Params, pixel_values: Float[Array, "m 3 height width"], config: LlavaConfig, plan: Plan | None = None
) -> Pictures:
    """Pictures to visual tokens: tower, feature selection, projector; shrunk where the plan says so."""
    return apply(config, params, "encode_images", pixel_values, plan)


def embed(
    params: Params,
    input_ids: Int[Array, "b l"],
    lengths: Int[Array, "b"],
    pictures: Float[Array, "m 3 height width"] | Pictures | None,
    config: LlavaConfig,
    plan: Plan | None = None,
) -> Prompt:
    """Token ids and pictures to a prompt: visual tokens go, in order, where the image markers stand.

    Args:
      input_ids: packed rows; every visual token stands as one `config.image_token_id`.
      lengths: valid ids of each row.
      pictures: those of all rows, in order, or those of one row, which then go with every row: pixels, or what
        `encode_images` made of them; None for text only.
      plan: that of the prefill. It has to be given where it shrinks pictures.

    Returns:
      The prompt. Its embeddings are NaN where the markers are not as many as the visual tokens of the pictures.

    Raises:
      ValueError: pictures of another model or plan.
    """
    if pictures is not None and not isinstance(pictures, Pictures):
        pictures = encode_images(params, pictures, config, plan) if pictures.shape[0] else None
    if pictures is not None:
        fits.require_pictures(pictures, input_ids.shape[0], config, plan)
    return apply(config, params, "embed", input_ids, lengths, pictures)


def prefill(
    params: Params,
    prompt: Prompt,
    config: LlavaConfig,
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
    return apply(config, params, "prefill", prompt, plan, max_new_tokens, jitter, trace, seed)


def decode_step(
    params: Params, token: Int[Array, "b"], cache: Cache, config: LlavaConfig, plan: Plan | tuple[int, ...]
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
    return apply(config, params, "decode_step", token, cache, stops)


def next_positions(tokens: Tokens, prompt: Prompt, sparsity: Sparsity) -> Int[Array, "b"]:
    """Rotary position of the first new token in a stage: behind its own tokens, or behind the prompt as it was."""
    return tokens.lengths if sparsity.positions == "renumber" else prompt.lengths.astype(jnp.int32)


def prune(layer: Layer, sparsity: Sparsity, jitter: Array | None) -> tuple[Tokens, Event]:
    """Scores, selects, recycles, and rebuilds the sequence after one layer."""
    tokens, stage = layer.tokens, layer.stage
    score = METHODS[sparsity.method].score
    assert score is not None and stage.keep is not None
    with jax.named_scope("score"):
        scores = score(layer, sparsity)
    with jax.named_scope("select"):
        kept_count = layer.kept if scores.keep is None else scores.keep
        dropped = jnp.sum(tokens.visual, axis=1) - kept_count
        most = range(stage.visual + 1)
        selection = sparsify.select(
            scores.values,
            tokens.visual,
            kept_count,
            jnp.asarray([sparsity.pool(n) for n in most], jnp.int32)[dropped],
            jnp.asarray([sparsity.clusters(n) for n in most], jnp.int32)[dropped],
            keep=stage.keep,
            pool=stage.pool,
        )
    recycled = None
    with jax.named_scope("recycle"):
        if stage.clusters:
            recycled = sparsify.recycle(
                sparsify.take(tokens.hidden, selection.pool),
                selection.pool_count,
                selection.cluster_count,
                stage.clusters,
                None if jitter is None else sparsify.take(jitter, selection.pool) * sparsity.jitter,
            )
    with jax.named_scope("rebuild"):
        length = tokens.visual.shape[1] - stage.visual + stage.standing
        after = sparsify.rebuild(tokens, selection, recycled, length=length, renumber=sparsity.positions == "renumber")
    return after, Event(stage.stop - 1, tokens, scores, selection, recycled, after)


def init_params(config: LlavaConfig, key: Array, dtype: DTypeLike) -> Params:
    """Random parameters, for tests and benchmarks."""
    config = replace(config, attention="xla")  # values and shapes do not depend on it, and it runs everywhere
    shape = (1, config.vision.num_channels, config.vision.image_size, config.vision.image_size)
    ids, lengths = jnp.zeros((1, 2), jnp.int32), jnp.full((1,), 2, jnp.int32)
    params = Llava(config).init(key, jnp.zeros(shape, jnp.float32), ids, lengths)["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract_params(config: LlavaConfig, dtype: DTypeLike) -> Params:
    """Shapes and dtypes of the parameter tree, without making it."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _shapes(config))


@cache
def _shapes(config: LlavaConfig) -> Params:
    """`abstract_params` in float32: tracing a whole model takes a second, and costs are asked for again and again."""
    return jax.eval_shape(lambda key: init_params(config, key, jnp.float32), jax.random.key(0))


def apply(config: LlavaConfig, params: Params, method: str, *args: Any) -> Any:
    """Calls a method of `Llava` as a function of its parameters."""
    return Llava(config).apply({"params": params}, *args, method=method)


def _last(values: Array, lengths: Int[Array, "b"]) -> Array:
    """The last valid entry of each row."""
    return jax.vmap(lambda row, length: row[length - 1])(values, lengths)


def _with_room(cached: Float[Array, "b l k h"], room: int) -> Float[Array, "b s k h"]:
    return jnp.pad(cached, ((0, 0), (0, room), (0, 0), (0, 0)))


def _append(
    cached: Float[Array, "b s k h"], new: Float[Array, "b 1 k h"], lengths: Int[Array, "b"]
) -> Float[Array, "b s k h"]:
    return jax.vmap(lambda row, at, entry: row.at[at].set(entry[0], mode="drop"))(cached, lengths, new)
