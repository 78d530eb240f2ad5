"""From token ids to an answer: one jitted prefill, one jitted decoding loop.

Shapes are those of a layout (buckets for text, visual tokens and new tokens), so another question of about the same
length compiles nothing. The step limit is traced: `stream` drives the same compiled loop a few steps at a time.

Axis letters: b batch, l packed sequence length, g room for new tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.ladder import prefill_by_rungs
from sparsevlm_jax.llava import Cache, Params, Pictures, decode_step, embed, prefill
from sparsevlm_jax.schedule import Plan, Sparsity, make_plan

if TYPE_CHECKING:  # the checkpoint module imports transformers where it is used
    from sparsevlm_jax.checkpoint import Model
    from sparsevlm_jax.processing import ImageLike, Processor

TEXT_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
NEW_TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Decoding:
    """Static settings of the loop: room for new tokens, whether it samples, and the ids that end an answer."""

    room: int
    greedy: bool
    end_tokens: tuple[int, ...]


class Sampler(NamedTuple):
    """Traced settings of sampling: temperature, and the probability mass that top-p keeps."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


class State(NamedTuple):
    """Where decoding stands. `tokens` holds what was chosen so far; the last one has not been decoded yet."""

    cache: Cache
    tokens: Int[Array, "b g"]
    counts: Int[Array, "b"]  # tokens chosen in each row, its end token included
    done: Bool[Array, "b"]
    steps: Int[Array, ""]  # tokens chosen in the rows that are not done
    keys: Array  # a PRNG key per row


class Packed(NamedTuple):
    """Rows of ids in one rectangle: padding at the end, `text` + `visual` columns."""

    input_ids: Int[np.ndarray, "b l"]
    lengths: Int[np.ndarray, "b"]
    text: int
    visual: int


@dataclass(frozen=True)
class Generation:
    """Answers as ids, how they were computed, and how long each part took."""

    tokens: list[list[int]]  # per row, end token left out
    plan: Plan
    packed: Packed
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    steps: int  # calls of decode_step


@partial(jax.jit, static_argnames=("config", "plan", "decoding"))
def start(
    params: Params,
    input_ids: Int[Array, "b l"],
    lengths: Int[Array, "b"],
    pictures: Float[Array, "m 3 height width"] | Pictures | None,
    keys: Array,
    sampler: Sampler,
    *,
    config: LlavaConfig,
    plan: Plan,
    decoding: Decoding,
) -> State:
    """Prefill and the first token."""
    prompt = embed(params, input_ids, lengths, pictures, config, plan)
    logits, cache, _ = prefill(params, prompt, config, plan, max_new_tokens=decoding.room)
    return _first(logits, cache, keys, sampler, decoding=decoding)


@partial(jax.jit, static_argnames=("config", "plan", "decoding"), donate_argnames=("state",))
def decode(
    params: Params,
    state: State,
    limit: Int[Array, ""],
    sampler: Sampler,
    *,
    config: LlavaConfig,
    plan: Plan,
    decoding: Decoding,
) -> State:
    """Decodes until every row has ended or `limit` tokens are chosen; `limit` is traced, at most `decoding.room`."""

    def go_on(state: State) -> Array:
        return (state.steps < limit) & ~jnp.all(state.done)

    def step(state: State) -> State:
        token = jax.lax.dynamic_index_in_dim(state.tokens, state.steps - 1, axis=1, keepdims=False)
        logits, cache = decode_step(params, token, state.cache, config, plan)
        return _choose(state._replace(cache=cache), logits, sampler, decoding)

    return jax.lax.while_loop(go_on, step, state)


def sample(logits: Float[Array, "b vocab"], keys: Array, sampler: Sampler) -> Int[Array, "b"]:
    """Draws a token per row from the tempered distribution, cut to the smallest set of mass `top_p` or more."""
    logits = logits / sampler.temperature
    ranked = jnp.sort(logits, axis=-1, descending=True)
    mass_before = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) - jax.nn.softmax(ranked, axis=-1)
    kept = jnp.sum(mass_before < sampler.top_p, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(ranked, jnp.maximum(kept - 1, 0), axis=-1)
    return jax.vmap(jax.random.categorical)(keys, jnp.where(logits >= threshold, logits, -jnp.inf))


def pack(rows: Sequence[np.ndarray], image_token_id: int) -> Packed:
    """Pads rows of ids to the bucket of their text and to their largest number of visual tokens.

    Raises:
      UserError: more text than the largest bucket.
    """
    visual = [int(np.sum(row == image_token_id)) for row in rows]
    most_text = max(len(row) - v for row, v in zip(rows, visual, strict=True))
    text = bucket(most_text, TEXT_BUCKETS, "the prompt's text")
    ids = np.zeros((len(rows), text + max(visual)), np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    # Padding must not look like a picture, whatever id the marker has.
    ids[np.arange(ids.shape[1])[None, :] >= np.array([len(r) for r in rows])[:, None]] = 0 if image_token_id else 1
    return Packed(ids, np.array([len(row) for row in rows], np.int32), text, max(visual))


def bucket(size: int, buckets: Sequence[int], what: str) -> int:
    """The smallest bucket that holds `size`.

    Raises:
      UserError: none does.
    """
    for limit in buckets:
        if size <= limit:
            return limit
    raise UserError(f"{what} has {size} tokens, the largest bucket {buckets[-1]}: shorten it")


def generate_ids(
    params: Params,
    config: LlavaConfig,
    rows: Sequence[np.ndarray],
    pixel_values: np.ndarray | None,
    *,
    sparsity: Sparsity,
    max_new_tokens: int,
    end_tokens: tuple[int, ...],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
) -> Generation:
    """Answers a batch of prompts given as ids and pixels.

    Args:
      params, config: the model.
      rows: ids of each prompt, int32 [l_i], every picture as `config.tokens_per_image` image markers.
      pixel_values: pictures of all rows in order, float32 [m, 3, height, width].
      sparsity: what to prune.
      max_new_tokens: the longest answer.
      end_tokens: ids that end a row.
      temperature: 0 is greedy.
      top_p: sample from the smallest set of tokens of this probability.
      key: PRNG key, needed where temperature is above 0; each row draws from its own split of it.

    Raises:
      UserError: prompts longer than the model's context, pictures that do not match the markers, or bad settings.
    """
    run = Run(
        params,
        config,
        rows,
        pixel_values,
        sparsity=sparsity,
        max_new_tokens=max_new_tokens,
        end_tokens=end_tokens,
        temperature=temperature,
        top_p=top_p,
        key=key,
    )
    state = run.prefill()
    state = run.decode(state, max_new_tokens)
    return run.result(state)


def stream_ids(
    params: Params,
    config: LlavaConfig,
    rows: Sequence[np.ndarray],
    pixel_values: np.ndarray | None,
    *,
    sparsity: Sparsity,
    max_new_tokens: int,
    end_tokens: tuple[int, ...],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
    every: int = 1,
) -> Iterator[Generation]:
    """`generate_ids` in instalments of `every` tokens: the same compiled loop, the same tokens."""
    run = Run(
        params,
        config,
        rows,
        pixel_values,
        sparsity=sparsity,
        max_new_tokens=max_new_tokens,
        end_tokens=end_tokens,
        temperature=temperature,
        top_p=top_p,
        key=key,
    )
    state = run.prefill()
    yield run.result(state)
    for limit in range(1 + every, max_new_tokens + every, every):
        if bool(np.all(state.done)):
            return
        state = run.decode(state, min(limit, max_new_tokens))
        yield run.result(state)


def generate(
    model: Model,
    images: Sequence[ImageLike] | Sequence[Sequence[ImageLike]],
    prompts: str | Sequence[str],
    *,
    sparsity: Sparsity | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    aspect: str | None = None,
) -> str | list[str]:
    """Answers questions about pictures.

    Args:
      model: from `load`, with its processor.
      images: for one prompt its pictures; for a list of prompts a list of pictures per prompt, or one picture each.
      prompts: a question, or a batch of them. They may contain `<image>` markers; by default pictures come first.
      sparsity: what to prune; by default v1.5 with a third of the visual tokens.
      max_new_tokens, temperature, top_p: see `generate_ids`; `seed` makes the PRNG key.
      aspect: "pad", "crop", or None for what the checkpoint's processor says.

    Returns:
      The answer, or a list of answers.

    Raises:
      UserError: bad pictures, prompts or settings.
    """
    questions = [prompts] if isinstance(prompts, str) else list(prompts)
    inputs = require_processor(model)(pictures_by_prompt(images, prompts), questions, aspect)
    generation = generate_ids(
        model.params,
        model.config,
        inputs.ids,
        inputs.pixel_values,
        sparsity=sparsity or Sparsity.v15(),
        max_new_tokens=max_new_tokens,
        end_tokens=model.generation.eos_token_ids,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
    )
    answers = [require_processor(model).decode(tokens) for tokens in generation.tokens]
    return answers[0] if isinstance(prompts, str) else answers


def stream(
    model: Model,
    images: Sequence[ImageLike],
    prompt: str,
    *,
    sparsity: Sparsity | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    aspect: str | None = None,
    every: int = 1,
) -> Iterator[str]:
    """Answers one question piece by piece; the pieces joined are what `generate` returns."""
    processor = require_processor(model)
    inputs = processor([list(images)], [prompt], aspect)
    instalments = stream_ids(
        model.params,
        model.config,
        inputs.ids,
        inputs.pixel_values,
        sparsity=sparsity or Sparsity.v15(),
        max_new_tokens=max_new_tokens,
        end_tokens=model.generation.eos_token_ids,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        every=every,
    )
    for piece, _ in pieces(instalments, processor):
        yield piece


def pieces(instalments: Iterator[Generation], processor: Processor) -> Iterator[tuple[str, Generation]]:
    """The text that each instalment adds to the first row's answer, with the instalment.

    Text whose end may still change (a character made of several tokens) waits for the next piece.
    """
    said, generation = "", None
    for generation in instalments:
        text = processor.decode(generation.tokens[0])
        complete = text.startswith(said) and not text.endswith("\ufffd")
        yield (text[len(said) :] if complete else ""), generation
        said = text if complete else said
    if generation is not None:
        yield processor.decode(generation.tokens[0])[len(said) :], generation


def pictures_by_prompt(
    images: Sequence[ImageLike] | Sequence[Sequence[ImageLike]], prompts: str | Sequence[str]
) -> list[list[ImageLike]]:
    """A list of pictures for every prompt, from the shorter forms that `generate` takes."""
    rows: list[list[Any]] = [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
    if isinstance(prompts, str):
        return [[picture for row in rows for picture in row]]
    if len(rows) != len(prompts):
        raise UserError(f"{len(prompts)} prompts but pictures for {len(rows)}: give a list of pictures per prompt")
    return rows


def require_processor(model: Model) -> Processor:
    """The model's processor.

    Raises:
      UserError: its checkpoint has none.
    """
    if model.processor is None:
        raise UserError(
            f"{model.name}: the checkpoint has no tokenizer and processor files: use generate_ids with ids and pixels"
        )
    return model.processor


class Run:
    """One batch on its way through prefill and decoding, with a clock.

    `generate_ids` says what the arguments are. `room` is what the cache holds behind the prompt; by default just
    `max_new_tokens`.
    """

    def __init__(
        self,
        params: Params,
        config: LlavaConfig,
        rows: Sequence[np.ndarray],
        pictures: np.ndarray | Pictures | None,
        *,
        sparsity: Sparsity,
        max_new_tokens: int,
        end_tokens: tuple[int, ...],
        temperature: float = 0.0,
        top_p: float = 1.0,
        key: Array | None = None,
        room: int | None = None,
    ) -> None:
        _check_settings(config, rows, pictures, max_new_tokens, temperature, top_p)
        self.params = params
        self.packed = pack(rows, config.image_token_id)
        self.plan = make_plan(sparsity, config, self.packed.visual, self.packed.text)
        if self.plan.grid is not None:
            shrunk = [_shrink_markers(row, config, self.plan.grid**2) for row in rows]
            self.packed = pack(shrunk, config.image_token_id)
        self.room = bucket(room or max_new_tokens, NEW_TOKEN_BUCKETS, "max_new_tokens")
        decoding = Decoding(self.room, temperature == 0, tuple(end_tokens))
        self.static = {"config": config, "plan": self.plan, "decoding": decoding}
        self.sampler = Sampler(jnp.float32(temperature or 1.0), jnp.float32(top_p))
        self.keys = jax.random.split(jax.random.key(0) if key is None else key, len(rows))
        self.pictures = jax.tree.map(jnp.asarray, pictures) if self.packed.visual else None
        self.compile_seconds = self.prefill_seconds = self.decode_seconds = 0.0

    def prefill(self) -> State:
        ids, lengths = jnp.asarray(self.packed.input_ids), jnp.asarray(self.packed.lengths)
        if self.plan.sparsity.ladder:
            return self._prefill_by_rungs(ids, lengths)
        args = (self.params, ids, lengths, self.pictures, self.keys, self.sampler)
        state, self.prefill_seconds = self._timed(start, *args, **self.static)
        return state

    def resume(self, logits: Float[Array, "b vocab"], cache: Cache) -> State:
        """A fresh answer on a cache that is already there."""
        return _first(logits, cache, self.keys, self.sampler, decoding=self.static["decoding"])

    def decode(self, state: State, limit: int) -> State:
        args = (self.params, state, jnp.int32(limit), self.sampler)
        state, seconds = self._timed(decode, *args, **self.static)
        self.decode_seconds += seconds
        return state

    def _prefill_by_rungs(self, ids: Array, lengths: Array) -> State:
        config, decoding = self.static["config"], self.static["decoding"]

        def call(program: Callable, *args: Any, **static: Any) -> Any:
            out, seconds = self._timed(program, *args, **static)
            self.prefill_seconds += seconds
            return out

        prompt = call(_embed, self.params, ids, lengths, self.pictures, config=config, plan=self.plan)
        logits, cache, self.plan = prefill_by_rungs(
            self.params, prompt, config, self.plan, max_new_tokens=decoding.room, call=call
        )
        self.static["plan"] = self.plan
        return call(_first, logits, cache, self.keys, self.sampler, decoding=decoding)

    def _timed(self, program: Any, *args: Any, **static: Any) -> tuple[Any, float]:
        """Runs a jitted program and returns its seconds; compiling comes before, on a clock of its own.

        Compiling ahead of time is free where the program is compiled already.
        """
        began = time.perf_counter()
        program.lower(*args, **static).compile()
        compiled = time.perf_counter()
        self.compile_seconds += compiled - began
        out = jax.block_until_ready(program(*args, **static))
        return out, time.perf_counter() - compiled

    def result(self, state: State) -> Generation:
        ends = self.static["decoding"].end_tokens
        tokens = []
        for row, count in zip(np.asarray(state.tokens), np.asarray(state.counts), strict=True):
            chosen = row[:count].tolist()
            tokens.append(chosen[:-1] if chosen and chosen[-1] in ends else chosen)
        return Generation(
            tokens,
            self.plan,
            self.packed,
            self.compile_seconds,
            self.prefill_seconds,
            self.decode_seconds,
            int(state.steps) - 1,
        )


_embed = jax.jit(embed, static_argnames=("config", "plan"))


@partial(jax.jit, static_argnames=("decoding",), donate_argnames=("cache",))
def _first(logits: Array, cache: Cache, keys: Array, sampler: Sampler, *, decoding: Decoding) -> State:
    batch = logits.shape[0]
    empty = State(
        cache=cache,
        tokens=jnp.zeros((batch, decoding.room), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        steps=jnp.int32(0),
        keys=keys,
    )
    return _choose(empty, logits, sampler, decoding)


def _choose(state: State, logits: Float[Array, "b vocab"], sampler: Sampler, decoding: Decoding) -> State:
    """Chooses the next token of every row; rows that are done repeat an end token that is not counted."""
    if decoding.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.steps)
        token = sample(logits, keys, sampler).astype(jnp.int32)
    ends = jnp.zeros_like(state.done)
    for end in decoding.end_tokens:
        ends |= token == end
    return state._replace(
        tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.steps, axis=1),
        counts=state.counts + ~state.done,
        done=state.done | ends,
        steps=state.steps + 1,
    )


def _shrink_markers(row: np.ndarray, config: LlavaConfig, tokens_per_image: int) -> np.ndarray:
    """Leaves the first `tokens_per_image` of the markers of each picture."""
    visual = row == config.image_token_id
    number = (np.cumsum(visual) - 1) % config.tokens_per_image
    return row[~visual | (number < tokens_per_image)]


def _check_settings(
    config: LlavaConfig,
    rows: Sequence[np.ndarray],
    pictures: np.ndarray | Pictures | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature} must not be negative and top_p {top_p} must be in (0, 1]")
    context = config.text.max_position_embeddings
    longest = max((len(row) for row in rows), default=0)
    if not longest:
        raise UserError("no prompt, or an empty one: nothing to answer")
    if longest + max_new_tokens > context:
        raise UserError(
            f"the prompt has {longest} tokens and the answer may take {max_new_tokens}: "
            f"more than the model's context of {context}; shorten the question or use fewer pictures"
        )
    markers = sum(int(np.sum(row == config.image_token_id)) for row in rows)
    images = pictures.tokens if isinstance(pictures, Pictures) else pictures
    visual = 0 if images is None else len(images) * config.tokens_per_image
    if markers != visual:
        raise UserError(
            f"the ids hold {markers} image markers, but the pictures given become {visual} visual tokens: "
            f"write {config.tokens_per_image} markers per picture"
        )
