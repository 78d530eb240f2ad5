"""From questions about pictures, or token ids and pixels, to answers.

Shapes are those of buckets for text, visual tokens and new tokens, so another question of about the same length
compiles nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.decoding import Decoding, Sampler, State, decode, first_token, start
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.ladder import prefill_by_rungs
from sparsevlm_jax.llava import Cache, Params, Pictures, embed
from sparsevlm_jax.packing import NEW_TOKEN_BUCKETS, Packed, bucket, pack, shrink_markers
from sparsevlm_jax.schedule import Plan, Sparsity, make_plan

if TYPE_CHECKING:  # the checkpoint module imports transformers where it is used
    from sparsevlm_jax.checkpoint import Model
    from sparsevlm_jax.processing import ImageLike, Processor


class Settings(TypedDict):
    """How to answer.

    Attributes:
      sparsity: what to prune.
      max_new_tokens: the longest answer.
      end_tokens: ids that end a row.
      temperature: 0, the default, is greedy.
      top_p: sample from the smallest set of tokens of this probability; 1 by default.
      key: PRNG key of sampling; each row draws from its own split of it.
    """

    sparsity: Sparsity
    max_new_tokens: int
    end_tokens: tuple[int, ...]
    temperature: NotRequired[float]
    top_p: NotRequired[float]
    key: NotRequired[Array | None]


@dataclass(frozen=True)
class Generation:
    """Answers as ids, how they were computed, and how long each part took."""

    tokens: list[list[int]]  # per row, end token left out
    visual_tokens: list[list[int]]  # per row: those that entered each stage of the plan
    plan: Plan
    packed: Packed
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    steps: int  # calls of decode_step


def generate_ids(
    params: Params,
    config: LlavaConfig,
    rows: Sequence[np.ndarray],
    pictures: np.ndarray | Pictures | None,
    **settings: Unpack[Settings],
) -> Generation:
    """Answers a batch of prompts given as ids and pixels.

    Args:
      params, config: the model.
      rows: ids of each prompt, int32 [l_i], every picture as `config.tokens_per_image` image markers.
      pictures: those of all rows in order: pixels, float32 [m, 3, height, width], or what `encode_images` made of them.
      settings: see `Settings`.

    Raises:
      UserError: prompts longer than the model's context, pictures that do not match the markers, or bad settings.
    """
    run = Run(params, config, rows, pictures, **settings)
    return run.result(run.decode(run.prefill(), settings["max_new_tokens"]))


def stream_ids(
    params: Params,
    config: LlavaConfig,
    rows: Sequence[np.ndarray],
    pictures: np.ndarray | Pictures | None,
    *,
    every: int = 1,
    **settings: Unpack[Settings],
) -> Iterator[Generation]:
    """`generate_ids` in instalments of `every` tokens: the same compiled loop, the same tokens."""
    yield from Run(params, config, rows, pictures, **settings).instalments(every)


def generate(
    model: Model,
    images: ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]],
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
      images: for one prompt its picture or pictures; for a list of prompts a list of pictures for each, or one picture.
      prompts: a question, or a batch of them. They may contain `<image>` markers; by default pictures come first.
      sparsity: what to prune; by default v1.5 with a third of the visual tokens.
      max_new_tokens, temperature, top_p: see `generate_ids`; `seed` makes the PRNG key.
      aspect: "pad", "crop", or None for what the checkpoint's processor says.

    Returns:
      The answer, or a list of answers.

    Raises:
      UserError: bad pictures, prompts or settings.
    """
    batch = _in_ids(model, images, prompts, aspect)
    settings = settings_for(model, sparsity, max_new_tokens, temperature, top_p, seed)
    generation = generate_ids(*batch, **settings)
    answers = [require_processor(model).decode(tokens) for tokens in generation.tokens]
    return answers[0] if isinstance(prompts, str) else answers


def stream(
    model: Model,
    images: ImageLike | Sequence[ImageLike],
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
    batch = _in_ids(model, images, prompt, aspect)
    settings = settings_for(model, sparsity, max_new_tokens, temperature, top_p, seed)
    for piece, _ in pieces(stream_ids(*batch, every=every, **settings), require_processor(model)):
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


def _in_ids(
    model: Model,
    images: ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]],
    prompts: str | Sequence[str],
    aspect: str | None,
) -> tuple[Params, LlavaConfig, list[np.ndarray], np.ndarray | None]:
    """What `generate_ids` takes, from pictures and questions."""
    questions = [prompts] if isinstance(prompts, str) else list(prompts)
    inputs = require_processor(model)(pictures_by_prompt(images, prompts), questions, aspect)
    return model.params, model.config, inputs.ids, inputs.pixel_values


def settings_for(
    model: Model,
    sparsity: Sparsity | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Settings:
    """What `generate` takes as the settings of `generate_ids`, with the model's own end tokens."""
    return {
        "sparsity": sparsity or Sparsity.v15(),
        "max_new_tokens": max_new_tokens,
        "end_tokens": model.generation.eos_token_ids,
        "temperature": temperature,
        "top_p": top_p,
        "key": jax.random.key(seed),
    }


def pictures_by_prompt(
    images: ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]], prompts: str | Sequence[str]
) -> list[list[ImageLike]]:
    """A list of pictures for every prompt, from the shorter forms that `generate` takes."""
    # A path must not be taken for a list of letters, nor an array for a list of rows.
    several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
    rows: list[list[Any]] = [list(row) if isinstance(row, (list, tuple)) else [row] for row in several]
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

    `Settings` and `generate_ids` say what the arguments are. `room` is what the cache holds behind the prompt; by
    default just `max_new_tokens`.
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
        self.image_token_id = config.image_token_id
        self.max_new_tokens = max_new_tokens
        self.packed = pack(rows, config.image_token_id)
        self.plan = make_plan(sparsity, config, self.packed.visual, self.packed.text)
        if self.plan.grid is not None:
            shrunk = [shrink_markers(row, config, self.plan.grid**2) for row in rows]
            self.packed = pack(shrunk, config.image_token_id)
        self.room = bucket(room or max_new_tokens, NEW_TOKEN_BUCKETS, "max_new_tokens")
        decoding = Decoding(self.room, temperature == 0, tuple(end_tokens))
        self.static = {"config": config, "plan": self.plan, "decoding": decoding}
        self.sampler = Sampler(jnp.float32(temperature or 1.0), jnp.float32(top_p))
        self.keys = jax.random.split(jax.random.key(0) if key is None else key, len(rows))
        self.pictures = jax.tree.map(jnp.asarray, pictures) if self.packed.visual else None
        self.visual_tokens: list[list[int]] = []  # known after the prefill
        self.compile_seconds = self.prefill_seconds = self.decode_seconds = 0.0

    def instalments(self, every: int) -> Iterator[Generation]:
        """The answers so far: after the prefill, and after every so many tokens."""
        state = self.prefill()
        yield self.result(state)
        for limit in range(1 + every, self.max_new_tokens + every, every):
            if bool(np.all(state.done)):
                return
            state = self.decode(state, min(limit, self.max_new_tokens))
            yield self.result(state)

    def prefill(self) -> State:
        ids, lengths = jnp.asarray(self.packed.input_ids), jnp.asarray(self.packed.lengths)
        if self.plan.sparsity.ladder:
            state = self._prefill_by_rungs(ids, lengths)
        else:
            args = (self.params, ids, lengths, self.pictures, self.keys, self.sampler)
            state, self.prefill_seconds = self._timed(start, *args, **self.static)
        text = np.sum((self.packed.input_ids != self.image_token_id) & self.packed.valid, axis=1)
        self.visual_tokens = (np.asarray(state.cache.lengths) - text[None, :]).T.tolist()
        return state

    def resume(self, logits: Float[Array, "b vocab"], cache: Cache) -> State:
        """A fresh answer on a cache that is already there."""
        return first_token(logits, cache, self.keys, self.sampler, decoding=self.static["decoding"])

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
        return call(first_token, logits, cache, self.keys, self.sampler, decoding=decoding)

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
            self.visual_tokens,
            self.plan,
            self.packed,
            self.compile_seconds,
            self.prefill_seconds,
            self.decode_seconds,
            int(state.steps) - 1,
        )


_embed = jax.jit(embed, static_argnames=("config", "plan"))


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
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:  # nan is neither
        raise UserError(f"temperature {temperature} must be 0 or more and top_p {top_p} must be in (0, 1]")
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
