"""Several questions about the same images and videos: prune anew for each, or go on with what the first selected.

Both are exact: "again" answers as a fresh run of the whole conversation does, "first" as if the first question's prompt
had been decoded on, token by token. The vision tower runs once in either case.

The conversation is rendered and tokenized as a whole for every question. Tokenized again, an answer may come out in
other tokens than the model chose: "again" then reads those of the text, as a fresh run does; "first" keeps in its cache
what the model chose, and adds what stands behind the answer in the whole conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.api import images_by_prompt, require_finite, require_processor
from sparsevlm_jax.generation.checks import require_limit
from sparsevlm_jax.generation.request import Generation, GenerationRequest, encode
from sparsevlm_jax.inputs.images import ImageLike
from sparsevlm_jax.inputs.messages import Conversation
from sparsevlm_jax.inputs.packing import TEXT_BUCKETS, TiledImages, bucket
from sparsevlm_jax.inputs.video import SAMPLING, Sampling, VideoLike
from sparsevlm_jax.layout import ImageLayout
from sparsevlm_jax.models.offload import tower_on_device
from sparsevlm_jax.models.stages import Cache, ImageFeatures, Params, decode_step
from sparsevlm_jax.parallel.arrays import on_mesh_of, put_beside
from sparsevlm_jax.pruning.budgets import make_plan
from sparsevlm_jax.pruning.methods import METHODS, as_sparsity
from sparsevlm_jax.pruning.settings import Sparsity

SELECTIONS = ("again", "first")


class Chat:
    """A conversation about some images and videos.

    Attributes:
      ids: the conversation so far, int32, answers included.
      turns: its questions and answers.
    """

    def __init__(
        self,
        model: Model,
        images: ImageLike | Sequence[ImageLike] | None,
        *,
        sparsity: Sparsity | str | None = None,
        selection: str = "again",
        max_new_tokens: int = 128,
        room: int = 1024,
        aspect: str | None = None,
        videos: VideoLike | Sequence[VideoLike] | None = None,
        frames: int = SAMPLING.frames,
        sampling: str = SAMPLING.rule,
    ) -> None:
        """Starts a conversation; nothing runs before the first question.

        Args:
          model: from `load`, with its processor.
          images: all images of the conversation; None or an empty list for none.
          sparsity: what to prune, or a method's name; by default v1.5 with a third of the visual tokens.
          selection: "again" prunes for every question anew, guided by all text after the images; what an earlier
            question dropped can come back, and every question costs a prefill. "first" keeps what the first question
            selected and only decodes on: cheaper, and blind to what that question did not ask about.
          max_new_tokens: the longest answer.
          room: tokens that the cache has room for after the first prompt ("first").
          aspect: "pad", "crop", or None for what the checkpoint's processor says.
          videos: all videos of the conversation; `frames` and `sampling` as for `generate`.

        Raises:
          UserError: a model without processor, another selection, or a limit that is no number of tokens.
        """
        if selection not in SELECTIONS:
            raise UserError(f'selection is "{selection}": expected {" or ".join(SELECTIONS)}')
        require_limit("max_new_tokens", max_new_tokens)
        require_limit("room", room)
        self.model = model
        self.processor = require_processor(model)
        (self.images,) = images_by_prompt(images, 1)
        (self.videos,) = images_by_prompt(videos, 1)
        self.sampling = Sampling(frames, sampling)
        self.sparsity = as_sparsity(sparsity)
        self.selection = selection
        self.max_new_tokens = max_new_tokens
        self.room = room if selection == "first" else max_new_tokens
        self.aspect = aspect
        self.ids = np.zeros(0, np.int32)
        self.turns: list[tuple[str, str]] = []
        self._features: ImageFeatures | None = None
        self._layouts: tuple[ImageLayout, ...] = ()
        self._run: GenerationRequest | None = None
        self._cache: Cache | None = None
        self._prompt_length = 0  # ids of the first prompt
        self._in_cache = 0  # how many of `ids` the cache has seen

    def ask(self, question: str) -> str:
        """Answers the next question.

        Raises:
          UserError: an image or video that cannot be read, more conversation than the model or the cache has room for,
            or logits that are not finite. The conversation is then as it was before the question; after logits that
            were not finite, "first" selects anew.
        """
        if self.turns:
            ids = self._next_ids(question)
        else:
            inputs = self.processor([self.images], [question], self.aspect, [self.videos], self.sampling)
            ids = inputs.ids[0]
            self._layouts = inputs.layouts
            self._features = self._encode(inputs.images) if inputs.layouts else None
        answer = self._prefill(ids) if self._cache is None else self._go_on(ids)
        if not all(answer.finite):
            self._cache = None
        require_finite(answer, self.model.params)
        self.ids = np.concatenate([ids, np.asarray(answer.tokens[0], np.int32)])
        self.turns.append((question, self.processor.decode(answer.tokens[0])))
        return self.turns[-1][1]

    def _next_ids(self, question: str) -> np.ndarray:
        """The conversation with another question."""
        talk = Conversation(question, tuple(self.turns))
        whole, behind = self.processor.next_turn(talk, self._layouts)
        if self.selection == "again" or np.array_equal(whole[: len(self.ids)], self.ids):
            return whole
        return np.concatenate([self.ids, behind])

    def _prefill(self, ids: np.ndarray) -> Generation:
        """The whole conversation, pruned for its last question."""
        run = GenerationRequest(
            self.model.params,
            self.model.config,
            [ids],
            self._features,
            sparsity=self.sparsity,
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.model.generation.eos_token_ids,
            room=self.room,
        )
        state = run.decode(run.prefill(), self.max_new_tokens)
        if self.selection == "first":
            self._run, self._cache, self._prompt_length = run, state.cache, len(ids)
            self._in_cache = len(ids) + int(jax.device_get(state.steps)) - 1
        return run.result(state)

    def _go_on(self, ids: np.ndarray) -> Generation:
        """What is new in the conversation goes through the decoder on the cache that is there."""
        run, cache = self._run, self._cache
        assert run is not None and cache is not None
        first = len(ids) - self._in_cache
        used = len(ids) - self._prompt_length + self.max_new_tokens
        if used > run.room:
            raise UserError(f"the conversation needs room for {used} tokens, the cache has {run.room}: raise room")
        text = self.model.config.text
        if len(ids) + self.max_new_tokens > text.max_position_embeddings:
            raise UserError(
                f"the conversation has {len(ids)} tokens and the answer may take {self.max_new_tokens}: "
                f"more than the model's {text.limit}; start a new one"
            )
        new = np.zeros(bucket(first, TEXT_BUCKETS, "the question"), np.int32)
        new[:first] = ids[self._in_cache :]
        params = self.model.params
        counted = put_beside(params, (new, np.int32(first)))
        with on_mesh_of(params):
            logits, cache = append_tokens(params, *counted, cache, config=self.model.config, stops=run.plan.stops)
        state = run.decode(run.resume(logits, cache), self.max_new_tokens)
        self._cache = state.cache
        self._in_cache = len(ids) + int(jax.device_get(state.steps)) - 1
        return run.result(state)

    def _encode(self, images: np.ndarray | TiledImages) -> ImageFeatures:
        config = self.model.config
        visual = sum(layout.tokens for layout in self._layouts)
        plan = make_plan(self.sparsity, config, visual) if METHODS[self.sparsity.method].shrinks else None
        placed = put_beside(self.model.params, images)
        with on_mesh_of(self.model.params), tower_on_device(self.model.params) as params:
            return jax.block_until_ready(encode(params, placed, config=config, plan=plan))


@partial(jax.jit, static_argnames=("config", "stops"), donate_argnames=("cache",))
def append_tokens(
    params: Params,
    ids: Int[Array, "t"],
    count: Int[Array, ""],
    cache: Cache,
    *,
    config: ModelConfig,
    stops: tuple[int, ...],
) -> tuple[Float[Array, "1 vocab"], Cache]:
    """Runs the first `count` of some given ids through the decoder, one by one, as if they had been generated.

    Returns:
      Logits behind the last of them, and the cache.
    """

    def step(index: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        return decode_step(params, ids[index][None], carry[1], config, stops)

    empty = jnp.zeros((1, config.text.vocab_size), jnp.float32)
    return jax.lax.fori_loop(0, count, step, (empty, cache))
