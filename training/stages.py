"""The stages of training, and one step of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, muon

from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.stages import Params
from training.batches import Batch
from training.model import FIRST_READER, init_lookup_heads, normalise_embeddings
from training.objective import Losses, losses
from training.words import Spellings

DIGITS = 9  # the most in a scene


class Stage(NamedTuple):
    """A stretch of training with an optimizer of its own.

    Attributes:
      steps, scenes, questions: how long, and the size of a batch; no questions: tower, projector and words only.
      rate, warm_up: peak learning rate, and steps until it is reached.
      seeing: what the rate is multiplied by for tower, projector and words, at the stage's start and at its end.
      alignment, presence: weights of these losses beside the answers'.
      fewest: digits in a scene at least.
      easy, harder: scenes have at most two digits in the first `easy` steps, one more every `harder` steps from there.
      wired: the decoder starts from what has been learned of words and images: see `model.wire`.
      thin: in half of the scenes layers get ever fewer of the patches without digits, renumbered, as if pruned.
    """

    name: str
    steps: int
    scenes: int
    questions: int
    rate: float
    warm_up: int
    seeing: tuple[float, float]
    alignment: float
    presence: float
    fewest: int = 1
    easy: int = 0
    harder: int = 0
    wired: bool = False
    thin: bool = False

    def digits(self, step: int) -> tuple[int, int]:
        """The curriculum: the fewest and the most digits of a scene at a step of the stage."""
        most = min(DIGITS, 2 + max(0, step - self.easy) // self.harder) if self.harder else DIGITS
        return self.fewest, most


SEEING = ("vision_tower", "multi_modal_projector", "embed_tokens")
EARLY = tuple(f"layers_{number}" for number in range(FIRST_READER))
B2, DECAY = 0.99, 0.05  # of squared gradients' mean, and of weights
EARLY_RATE = 0.05  # of the rate, for the decoder layers before the first that reads


class Task(NamedTuple):
    """What a model learns, and from what.

    Attributes:
      config: Hugging Face's config.json.
      ids, spellings: the vocabulary, as in `words`.
      said: words that are said of patches.
      told: those of them by which recognition is counted; at most one holds for a patch.
      stages: trained one after the other.
      batch: makes the batch of a stage from a seed, a step, and how many steps into the stage that is.
      measured: makes images from a seed, on which a wired stage measures the image's tokens before it starts.
      packages: whose versions decide what is drawn.
    """

    config: dict[str, Any]
    ids: dict[str, int]
    spellings: Spellings
    said: tuple[str, ...]
    told: tuple[str, ...]
    stages: tuple[Stage, ...]
    batch: Callable[[Stage, int, int, int], Batch]
    measured: Callable[[int], np.ndarray]
    packages: tuple[str, ...]

    def ids_of(self, words: Sequence[str]) -> tuple[int, ...]:
        """Ids of words of the vocabulary."""
        return tuple(self.ids[word] for word in words)


class State(NamedTuple):
    """Everything that a step changes."""

    params: Params
    optimizer: optax.OptState


Step = Callable[[State, Batch], tuple[State, Losses]]


def optimizer(stage: Stage) -> optax.GradientTransformation:
    """What learns from gradients, clipped, with a cosine schedule.

    Without questions: Muon for matrices, AdamW for the rest of what sees; the decoder's layers stay as they are.
    With questions: AdamW, which leaves more of the decoder's start; what sees has a rate of its own.
    """
    warm_up = min(stage.warm_up, stage.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, stage.rate, warm_up, stage.steps, end_value=stage.rate / 100)
    clip, sees = optax.clip_by_global_norm(1.0), partial(_is_in, SEEING)
    if not stage.questions:
        learn = muon(
            rate,
            weight_decay=DECAY,
            adam_b2=B2,
            adam_weight_decay=DECAY,
            muon_weight_dimension_numbers=_matrices,  # pyright: ignore[reportArgumentType] -- a function it may be
            consistent_rms=0.2,  # as long as AdamW's updates, so that one rate serves both
        )
        return optax.chain(clip, optax.partition({True: learn, False: optax.set_to_zero()}, sees))
    return optax.chain(
        clip,
        optax.adamw(rate, b2=B2, weight_decay=DECAY),
        optax.masked(optax.scale_by_schedule(optax.linear_schedule(*stage.seeing, stage.steps)), sees),
        optax.masked(optax.scale(EARLY_RATE), partial(_is_in, EARLY)),
    )


def _matrices(params: Params) -> Params:
    """Which parameters are maps from one space to another, and between which axes; a table's rows are no such space."""

    def is_masked(leaf: object) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    def dimensions(path: tuple[Any, ...], leaf: Any) -> Any:
        if is_masked(leaf):
            return leaf
        inputs = tuple(range(1, leaf.ndim))
        return MuonDimensionNumbers(inputs, 0) if path[-1].key == "weight" else None

    return jax.tree_util.tree_map_with_path(dimensions, params, is_leaf=is_masked)


def _is_in(parts: tuple[str, ...], params: Params) -> Params:
    """Which parameters are below one of these names; the tower's own layers are not the decoder's."""

    def named(path: tuple[Any, ...], _: object) -> bool:
        names = [key.key for key in path]
        inside = names[1:] if names[0] == "language_model" else names[:1]
        return any(name in parts for name in inside)

    return jax.tree_util.tree_map_with_path(named, params)


@cache
def make_step(config: LlavaConfig, stage: Stage, told: tuple[int, ...]) -> Step:
    """The compiled training step of a stage, compiled once for all runs of a process; `told` as in `losses`."""
    transform = optimizer(stage)

    def objective(params: Params, batch: Batch) -> tuple[Array, Losses]:
        found = losses(params, config, batch, told, with_questions=stage.questions > 0)
        return found.answer + stage.alignment * found.alignment + stage.presence * found.presence, found

    def step(state: State, batch: Batch) -> tuple[State, Losses]:
        gradients, found = jax.grad(objective, has_aux=True)(state.params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers, and mixes them with floats
            updates, optimizer_state = transform.update(gradients, state.optimizer, state.params)
            params = cast(Params, optax.apply_updates(state.params, updates))
        return State(params, optimizer_state), found

    return jax.jit(step, donate_argnums=0)


def begin(task: Task, stage: Stage, config: LlavaConfig, params: Params, seed: int) -> State:
    """The state at the start of a stage.

    In a wired stage words and image are brought to one scale, and the decoder starts from them.
    """
    if stage.wired:
        balanced = normalise_embeddings(params, config, task.measured(seed))
        params = init_lookup_heads(balanced, config, seed, task.ids_of(task.said))
    return State(params, optimizer(stage).init(params))
