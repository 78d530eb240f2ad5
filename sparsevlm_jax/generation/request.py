"""One batch on its way to answers: settings in, prefill and decoding with a clock, tokens out.

Shapes are those of buckets for text, visual tokens and new tokens, so another question of about the same length
compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np
from jaxtyping import Array, Float

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.checks import check_markers, check_settings
from sparsevlm_jax.generation.ladder import prefill_stage_by_stage
from sparsevlm_jax.generation.loop import DecodeState, LoopConfig, SamplingParams, decode, first_token, start
from sparsevlm_jax.generation.programs import Programs
from sparsevlm_jax.inputs.packing import (
    NEW_TOKEN_BUCKETS,
    Packed,
    TiledImages,
    bucket,
    pack,
    shrink_markers,
    text_bucket,
)
from sparsevlm_jax.models.embedding import embed, encode_images
from sparsevlm_jax.models.offload import is_offloaded, tower_on_device
from sparsevlm_jax.models.stages import Cache, ImageFeatures, Params
from sparsevlm_jax.parallel.arrays import fetch, on_mesh_of, put_beside, require_rows
from sparsevlm_jax.pruning.budgets import make_plan, plan_of_row
from sparsevlm_jax.pruning.methods import METHODS, as_sparsity
from sparsevlm_jax.pruning.plan import Plan
from sparsevlm_jax.pruning.settings import Sparsity

FIRST_CHUNK = 4  # tokens of a paced stream's second piece; the first is the prefill's token
PACE = 0.1  # seconds between its other pieces


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


class GenerationRequest:
    """One batch on its way through prefill and decoding, with a clock.

    `Settings` and `generate_ids` say what the arguments are. `room` is what the cache holds behind the prompt; by
    default just `max_new_tokens`. `programs` are those that requests share.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        rows: Sequence[np.ndarray],
        images: np.ndarray | TiledImages | ImageFeatures | None,
        *,
        sparsity: Sparsity | str,
        max_new_tokens: int,
        end_tokens: tuple[int, ...],
        temperature: float = 0.0,
        top_p: float = 1.0,
        key: Array | None = None,
        room: int | None = None,
        programs: Programs | None = None,
    ) -> None:
        check_settings(config, rows, max_new_tokens, temperature, top_p)
        encoded = isinstance(images, ImageFeatures)
        if not encoded:
            check_markers(config, rows, images)
        require_rows(params, len(rows))
        self.params, self.config = params, config
        self.max_new_tokens = max_new_tokens
        self.packed = pack(rows, config.image_token_id, config.visual_bucket)
        sparsity = as_sparsity(sparsity)
        self.seed = self._put(_seed(sparsity))
        # The seed is traced: in the plan it would make another program.
        self.plan = plan_of_rows(replace(sparsity, seed=None), config, self.packed)
        if self.plan.grid is not None:
            rows = [
                shrink_markers(row, config.image_token_id, config.tokens_per_image, self.plan.grid**2) for row in rows
            ]
            self.packed = pack(rows, config.image_token_id)
        if encoded:
            check_markers(config, rows, images)
        self.room = bucket(room or max_new_tokens, NEW_TOKEN_BUCKETS, "max_new_tokens")
        self.decoding = LoopConfig(self.room, temperature == 0, tuple(end_tokens))
        # Everything from the host is put on the device by name: servers forbid what happens on the side.
        self.sampler = SamplingParams(*self._put((np.float32(temperature or 1.0), np.float32(top_p))))
        self.keys = self._put(_split(key_of(0) if key is None else key, len(rows)))
        self.images = self._put(images) if self.packed.visual else None
        self.visual_tokens: list[list[int]] = []  # known after the prefill
        self.prefill_seconds = self.decode_seconds = self._tower_seconds = 0.0
        self._programs = Programs() if programs is None else programs
        self._compiled_before = self._programs.compile_seconds
        if self.images is not None and not encoded and is_offloaded(params):
            with tower_on_device(params) as whole:
                seen = (whole, self.images)
                self.images, self._tower_seconds = self._timed(encode, *seen, config=config, plan=self.plan)

    @property
    def compile_seconds(self) -> float:
        return self._programs.compile_seconds - self._compiled_before

    def chunks(self, every: int | None) -> Iterator[Generation]:
        """The answers so far: after the prefill, and after every so many tokens.

        None is paced: a few tokens first, then as many as take `PACE` seconds. To start and to read the compiled loop
        costs a small model as much as decoding a token.
        """
        state = self.prefill()
        yield self.result(state)
        limit, tokens = 1, every or FIRST_CHUNK
        while limit < self.max_new_tokens and not np.all(fetch(state.done)):
            before, limit = self.decode_seconds, min(limit + tokens, self.max_new_tokens)
            state = self.decode(state, limit)
            yield self.result(state)
            if every is None:
                tokens = max(1, int(tokens * PACE / (self.decode_seconds - before)))

    def prefill(self) -> DecodeState:
        """Begins the answer: `prefill_seconds` are those of the tower and of the decoder."""
        self.prefill_seconds = self._tower_seconds
        ids, lengths = self._put((self.packed.input_ids, self.packed.lengths))
        if METHODS[self.plan.sparsity.method].stage_by_stage(self.plan.sparsity):
            state = self._prefill_stage_by_stage(ids, lengths)
        else:
            args = (self.params, ids, lengths, self.images, self.keys, self.sampler, self.seed)
            static = {"config": self.config, "plan": self.plan, "decoding": self.decoding}
            state, seconds = self._timed(start, *args, **static)
            self.prefill_seconds += seconds
        text = np.sum((self.packed.input_ids != self.config.image_token_id) & self.packed.valid, axis=1)
        self.visual_tokens = (fetch(state.cache.lengths) - text[None, :]).T.tolist()
        return state

    def resume(self, logits: Float[Array, "b vocab"], cache: Cache) -> DecodeState:
        """A fresh answer on a cache that is already there."""
        with on_mesh_of(self.params):
            return first_token(logits, cache, self.keys, self.sampler, decoding=self.decoding)

    def decode(self, state: DecodeState, limit: int) -> DecodeState:
        args = (self.params, state, self._put(np.int32(limit)), self.sampler)
        static = {"config": self.config, "stops": self.plan.stops, "decoding": self.decoding}
        state, seconds = self._timed(decode, *args, **static)
        self.decode_seconds += seconds
        return state

    def _put(self, tree: Any) -> Any:
        return put_beside(self.params, tree)

    def _timed(self, program: Any, *args: Any, **static: Any) -> tuple[Any, float]:
        with on_mesh_of(self.params):
            return self._programs.timed(program, *args, **static)

    def _prefill_stage_by_stage(self, ids: Array, lengths: Array) -> DecodeState:
        def call(program: Callable, *args: Any, **static: Any) -> Any:
            out, seconds = self._timed(program, *args, **static)
            self.prefill_seconds += seconds
            return out

        prompt = call(_embed, self.params, ids, lengths, self.images, config=self.config, plan=self.plan)
        logits, cache, self.plan = prefill_stage_by_stage(
            self.params, prompt, self.config, self.plan, max_new_tokens=self.room, call=call
        )
        return call(first_token, logits, cache, self.keys, self.sampler, decoding=self.decoding)

    def result(self, state: DecodeState) -> Generation:
        said, counts, finite, steps = fetch((state.tokens, state.counts, state.finite, state.steps))
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
encode: Any = jax.jit(encode_images, static_argnames=("config", "plan"))
_split = jax.jit(jax.random.split, static_argnums=1)


def key_of(seed: int) -> Array:
    """A PRNG key on the device."""
    return jax.random.key(jax.device_put(np.uint32(seed)))


def plan_of_rows(sparsity: Sparsity, config: ModelConfig, packed: Packed) -> Plan:
    """The plan of a batch, see `plan_for`."""
    visual = np.sum(packed.input_ids == config.image_token_id, axis=1, where=packed.valid)
    rows = {(v, text_bucket(length - v)) for v, length in zip(visual.tolist(), packed.lengths.tolist(), strict=True)}
    return plan_for(sparsity, config, rows, packed.visual, packed.text)


def plan_for(
    sparsity: Sparsity, config: ModelConfig, rows: Collection[tuple[int, int]], visual: int, text: int
) -> Plan:
    """A plan under which rows of different numbers of visual tokens keep what each would alone.

    One program serves whatever rows a family with tiles may have; elsewhere rows differ by whole images, if they do.
    A budget that counts text counts each row's own, in the bucket that it would have alone.

    Args:
      rows: the visual tokens of each, and the bucket of its text.
      visual, text: columns that they are padded to.

    Raises:
      UserError: a budget that a row cannot meet.
    """
    counts, texts = {count for count, _ in rows}, sorted({own_text for _, own_text in rows})
    most, keep, row_counts = max(counts), sparsity.budget.keep, None
    if keep is not None and 0 < most < keep:  # a bucket may have room for more
        raise UserError(f"keep={keep}: the prompt has only {most} visual tokens")
    if config.packs_images:
        row_counts = range(visual + 1)
    elif len(counts) > 1:
        step = config.tokens_per_image
        row_counts = None if any(count % step for count in counts) else range(0, visual + 1, step)
    elif len(texts) > 1:
        row_counts = range(most, most + 1)
    row_texts = None if row_counts is None else texts
    plan = make_plan(sparsity, config, visual, text, row_counts=row_counts, row_texts=row_texts)
    for count, own_text in rows:
        plan_of_row(plan, count, own_text)
    return plan


def _seed(sparsity: Sparsity) -> Array | None:
    """The seed of a method that draws random numbers."""
    method = METHODS.get(sparsity.method)
    if method is None or not method.draws or sparsity.seed is None:
        return None
    return jax.device_put(np.uint32(sparsity.seed))
