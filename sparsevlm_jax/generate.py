"""From questions about pictures, or token ids and pixels, to answers.

Shapes are those of buckets for text, visual tokens and new tokens, so another question of about the same length
compiles nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, Unpack

import jax
import numpy as np
from jaxtyping import Array, Float

from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.decoding import Decoding, Sampler, State, decode, first_token, start
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.ladder import prefill_by_rungs
from sparsevlm_jax.llava import Cache, Params, Pictures, embed
from sparsevlm_jax.messages import Asked, read_prompts
from sparsevlm_jax.methods import METHODS
from sparsevlm_jax.methods import sparsity as sparsity_named
from sparsevlm_jax.packing import NEW_TOKEN_BUCKETS, Packed, bucket, pack, shrink_markers
from sparsevlm_jax.schedule import Plan, Sparsity, make_plan

if TYPE_CHECKING:  # the checkpoint module imports transformers where it is used
    from sparsevlm_jax.checkpoint import Model
    from sparsevlm_jax.processing import ImageLike, Processor

    Images = ImageLike | Sequence[ImageLike | None] | Sequence[Sequence[ImageLike]] | None


class Settings(TypedDict):
    """How to answer.

    Attributes:
      sparsity: what to prune, or the name of a method.
      max_new_tokens: the longest answer.
      end_tokens: ids that end a row.
      temperature: 0, the default, is greedy.
      top_p: sample from the smallest set of tokens of this probability; 1 by default.
      key: PRNG key of sampling; each row draws from its own split of it.
    """

    sparsity: Sparsity | str
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
    finite: list[bool]  # per row: whether all logits were; if not, its tokens are no answer
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
      pictures: those of all rows in order, or those of one row, which every row then shows: pixels, float32
        [m, 3, height, width], or what `encode_images` made of them.
      settings: see `Settings`.

    Returns:
      The answers. Logits that are not finite do not raise here: see `Generation.finite`.

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
    require_limit("every", every)
    yield from Run(params, config, rows, pictures, **settings).instalments(every)


def generate(
    model: Model,
    images: Images,
    prompts: str | Sequence[Any],
    *,
    sparsity: Sparsity | str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    aspect: str | None = None,
) -> str | list[str]:
    """Answers questions about pictures.

    Args:
      model: from `load`, with its processor.
      images: for one prompt its picture or pictures; for a list of prompts a list of pictures for each, or one picture,
        or pictures that go with all of them. None or an empty list for text alone.
      prompts: a question, or a batch of them. They may contain `<image>` markers; by default pictures come first. A
        question may also be a list of messages, as chat interfaces take them; those may hold the pictures themselves.
      sparsity: what to prune, or a method's name; by default v1.5 with a third of the visual tokens.
      max_new_tokens, temperature, top_p: see `generate_ids`; `seed` makes the PRNG key.
      aspect: "pad", "crop", or None for what the checkpoint's processor says.

    Returns:
      The answer, or a list of answers.

    Raises:
      UserError: bad pictures, prompts or settings, or logits that are not finite.
    """
    asked, alone = read_prompts(prompts)
    batch = _in_ids(model, images, asked, aspect)
    settings = settings_for(model, sparsity, max_new_tokens, temperature, top_p, seed)
    generation = require_finite(generate_ids(*batch, **settings), model.params)
    answers = [require_processor(model).decode(tokens) for tokens in generation.tokens]
    return answers[0] if alone else answers


def stream(
    model: Model,
    images: Images,
    prompt: str | Sequence[Any],
    *,
    sparsity: Sparsity | str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    aspect: str | None = None,
    every: int = 1,
) -> Iterator[str]:
    """Answers one question piece by piece; the pieces joined are what `generate` returns."""
    asked, alone = read_prompts(prompt)
    if not alone:
        raise UserError("stream answers one question: give a text or one list of messages")
    batch = _in_ids(model, images, asked, aspect)
    settings = settings_for(model, sparsity, max_new_tokens, temperature, top_p, seed)
    instalments = stream_ids(*batch, every=every, **settings)
    for piece, _ in pieces(instalments, require_processor(model), model.params):
        yield piece


def pieces(instalments: Iterator[Generation], processor: Processor, params: Params) -> Iterator[tuple[str, Generation]]:
    """The text that each instalment adds to the first row's answer, with the instalment.

    Text whose end may still change (a character made of several tokens) waits for the next piece.

    Raises:
      UserError: logits that are not finite.
    """
    said, generation = "", None
    for generation in instalments:
        require_finite(generation, params)
        text = processor.decode(generation.tokens[0])
        complete = text.startswith(said) and not text.endswith("\ufffd")
        yield (text[len(said) :] if complete else ""), generation
        said = text if complete else said
    if generation is not None:
        yield processor.decode(generation.tokens[0])[len(said) :], generation


def require_finite(generation: Generation, params: Params) -> Generation:
    """The generation, if it is one.

    Raises:
      UserError: logits that are NaN or infinite chose some of its tokens.
    """
    if all(generation.finite):
        return generation
    dtype = jax.tree.leaves(params)[0].dtype.name
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(dtype)
    raise UserError(
        f"the logits are not finite, so there is no answer: in {dtype} something in this model overflows"
        + (f"; load it with --dtype {wider}" if wider else ", or its weights are spoilt")
    )


def _in_ids(
    model: Model, images: Images, asked: Sequence[Asked], aspect: str | None
) -> tuple[Params, LlavaConfig, list[np.ndarray], np.ndarray | None]:
    """What `generate_ids` takes, from pictures and questions."""
    rows: list[list[ImageLike]] = [one.pictures for one in asked]
    if not any(rows):
        rows = pictures_by_prompt(images, len(asked))
    elif any(pictures_by_prompt(images, 1)[0]):
        raise UserError("pictures in the messages and beside them: give them in one place")
    inputs = require_processor(model)(rows, [one.conversation for one in asked], aspect)
    return model.params, model.config, inputs.ids, inputs.pixel_values


def settings_for(
    model: Model,
    sparsity: Sparsity | str | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Settings:
    """What `generate` takes as the settings of `generate_ids`, with the model's own end tokens.

    Raises:
      UserError: a seed that is none.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}: a whole number from 0 to 2**32 - 1 is expected")
    return {
        "sparsity": as_sparsity(sparsity),
        "max_new_tokens": max_new_tokens,
        "end_tokens": model.generation.eos_token_ids,
        "temperature": temperature,
        "top_p": top_p,
        "key": _key(int(seed)),
    }


def as_sparsity(given: Sparsity | str | None) -> Sparsity:
    """Settings from themselves, the name of a method, or None for the default.

    Raises:
      UserError: anything else.
    """
    if given is None:
        return Sparsity.v15()
    if isinstance(given, str):
        return sparsity_named(given)
    if isinstance(given, Sparsity):
        return given
    raise UserError(f"sparsity is of type {type(given).__name__}: give Sparsity settings or the name of a method")


def pictures_by_prompt(images: Images, prompts: int) -> list[list[ImageLike]]:
    """A list of pictures for every prompt, or one that goes with each of them, from what `generate` takes.

    Raises:
      UserError: neither.
    """
    # A path must not be taken for a list of letters, nor an array for a list of rows.
    several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
    rows = [_row(row) for row in several]
    if prompts == 1:
        return [[picture for row in rows for picture in row]]
    if len(rows) in (0, 1):
        return rows or [[]]
    if len(rows) != prompts:
        raise UserError(
            f"{prompts} prompts but pictures for {len(rows)}: give a list of pictures per prompt, or one for all"
        )
    return rows


def _row(pictures: Any) -> list[Any]:
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


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
        sparsity: Sparsity | str,
        max_new_tokens: int,
        end_tokens: tuple[int, ...],
        temperature: float = 0.0,
        top_p: float = 1.0,
        key: Array | None = None,
        room: int | None = None,
    ) -> None:
        _check_settings(config, rows, pictures, max_new_tokens, temperature, top_p)
        self.params, self.config = params, config
        self.max_new_tokens = max_new_tokens
        self.packed = pack(rows, config.image_token_id)
        sparsity = as_sparsity(sparsity)
        self.seed = _seed(sparsity)
        # The seed is traced: in the plan it would make another program.
        self.plan = make_plan(replace(sparsity, seed=None), config, self.packed.visual, self.packed.text)
        if self.plan.grid is not None:
            shrunk = [shrink_markers(row, config, self.plan.grid**2) for row in rows]
            self.packed = pack(shrunk, config.image_token_id)
        self.room = bucket(room or max_new_tokens, NEW_TOKEN_BUCKETS, "max_new_tokens")
        self.decoding = Decoding(self.room, temperature == 0, tuple(end_tokens))
        # Everything from the host is put on the device by name: servers forbid what happens on the side.
        self.sampler = Sampler(*jax.device_put((np.float32(temperature or 1.0), np.float32(top_p))))
        self.keys = _split(_key(0) if key is None else key, len(rows))
        self.pictures = jax.device_put(pictures) if self.packed.visual else None
        self.visual_tokens: list[list[int]] = []  # known after the prefill
        self.compile_seconds = self.prefill_seconds = self.decode_seconds = 0.0

    def instalments(self, every: int) -> Iterator[Generation]:
        """The answers so far: after the prefill, and after every so many tokens."""
        state = self.prefill()
        yield self.result(state)
        for limit in range(1 + every, self.max_new_tokens + every, every):
            if np.all(jax.device_get(state.done)):
                return
            state = self.decode(state, min(limit, self.max_new_tokens))
            yield self.result(state)

    def prefill(self) -> State:
        ids, lengths = jax.device_put((self.packed.input_ids, self.packed.lengths))
        if self.plan.sparsity.ladder:
            state = self._prefill_by_rungs(ids, lengths)
        else:
            args = (self.params, ids, lengths, self.pictures, self.keys, self.sampler, self.seed)
            static = {"config": self.config, "plan": self.plan, "decoding": self.decoding}
            state, self.prefill_seconds = self._timed(start, *args, **static)
        text = np.sum((self.packed.input_ids != self.config.image_token_id) & self.packed.valid, axis=1)
        self.visual_tokens = (jax.device_get(state.cache.lengths) - text[None, :]).T.tolist()
        return state

    def resume(self, logits: Float[Array, "b vocab"], cache: Cache) -> State:
        """A fresh answer on a cache that is already there."""
        return first_token(logits, cache, self.keys, self.sampler, decoding=self.decoding)

    def decode(self, state: State, limit: int) -> State:
        args = (self.params, state, jax.device_put(np.int32(limit)), self.sampler)
        static = {"config": self.config, "stops": self.plan.stops, "decoding": self.decoding}
        state, seconds = self._timed(decode, *args, **static)
        self.decode_seconds += seconds
        return state

    def _prefill_by_rungs(self, ids: Array, lengths: Array) -> State:
        def call(program: Callable, *args: Any, **static: Any) -> Any:
            out, seconds = self._timed(program, *args, **static)
            self.prefill_seconds += seconds
            return out

        prompt = call(_embed, self.params, ids, lengths, self.pictures, config=self.config, plan=self.plan)
        logits, cache, self.plan = prefill_by_rungs(
            self.params, prompt, self.config, self.plan, max_new_tokens=self.room, call=call
        )
        return call(first_token, logits, cache, self.keys, self.sampler, decoding=self.decoding)

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
        said, counts, finite, steps = jax.device_get((state.tokens, state.counts, state.finite, state.steps))
        ends = self.decoding.end_tokens
        tokens = []
        for row, count in zip(said, counts, strict=True):
            chosen = row[:count].tolist()
            tokens.append(chosen[:-1] if chosen and chosen[-1] in ends else chosen)
        return Generation(
            tokens,
            self.visual_tokens,
            finite.tolist(),
            self.plan,
            self.packed,
            self.compile_seconds,
            self.prefill_seconds,
            self.decode_seconds,
            int(steps) - 1,
        )


_embed = jax.jit(embed, static_argnames=("config", "plan"))
_split = jax.jit(jax.random.split, static_argnums=1)


def _key(seed: int) -> Array:
    return jax.random.key(jax.device_put(np.uint32(seed)))


def _seed(sparsity: Sparsity) -> Array | None:
    """The seed of a method that draws random numbers."""
    method = METHODS.get(sparsity.method)
    if method is None or not method.draws or sparsity.seed is None:
        return None
    return jax.device_put(np.uint32(sparsity.seed))


def require_limit(name: str, value: object) -> None:
    """Refuses what is no number of tokens.

    Raises:
      UserError: not an int, or below 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}: a whole number is expected")
    if value < 1:
        raise UserError(f"{name} {value}: at least 1")


def _check_settings(
    config: LlavaConfig,
    rows: Sequence[np.ndarray],
    pictures: np.ndarray | Pictures | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    require_limit("max_new_tokens", max_new_tokens)
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, Real):
            raise UserError(f"{name} is {value!r}: a number is expected")
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
    markers = [int(np.sum(row == config.image_token_id)) for row in rows]
    images = pictures.tokens if isinstance(pictures, Pictures) else pictures
    visual = 0 if images is None else len(images) * config.tokens_per_image
    if sum(markers) != visual and any(count != visual for count in markers):
        raise UserError(
            f"the ids hold {sum(markers)} image markers, but the pictures given become {visual} visual tokens: "
            f"write {config.tokens_per_image} markers per picture"
        )
