"""The two stages of training, and one step of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import optax
from jaxtyping import Array

from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.llava import Params
from training.batches import Batch, make_batch
from training.model import FIRST_READER, balance, wire
from training.objective import Losses, losses

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

    def digits(self, step: int) -> tuple[int, int]:
        """The curriculum: the fewest and the most digits of a scene at a step of the stage."""
        most = min(DIGITS, 2 + max(0, step - self.easy) // self.harder) if self.harder else DIGITS
        return self.fewest, most


STAGES = (
    Stage("see", 2400, 12, 0, rate=2e-3, warm_up=100, seeing=(1.0, 1.0), alignment=1.0, presence=0.1, fewest=DIGITS),
    Stage(
        "answer",
        2600,
        4,
        24,
        rate=1.5e-3,
        warm_up=40,
        seeing=(0.0, 0.4),
        alignment=0.0,
        presence=0.0,
        easy=100,
        harder=50,
    ),
)
MEASURED = 24  # scenes that a stage with questions measures the picture's tokens on before it starts
SEEING = ("vision_tower", "multi_modal_projector", "embed_tokens")
EARLY = tuple(f"layers_{number}" for number in range(FIRST_READER))
EARLY_RATE = 0.05  # of the rate, for the decoder layers before the first that reads


class State(NamedTuple):
    """Everything that a step changes."""

    params: Params
    optimizer: optax.OptState


Step = Callable[[State, Batch], tuple[State, Losses]]


def optimizer(stage: Stage) -> optax.GradientTransformation:
    """AdamW with a cosine schedule, gradients clipped, what sees at a rate of its own."""
    warm_up = min(stage.warm_up, stage.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, stage.rate, warm_up, stage.steps, end_value=stage.rate / 100)
    seeing = optax.linear_schedule(*stage.seeing, stage.steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.99, weight_decay=0.05),
        optax.masked(optax.scale_by_schedule(seeing), partial(_is_in, SEEING)),
        optax.masked(optax.scale(EARLY_RATE), partial(_is_in, EARLY)),
    )


def _is_in(parts: tuple[str, ...], params: Params) -> Params:
    """Which parameters are below one of these names; the tower's own layers are not the decoder's."""

    def named(path: tuple[Any, ...], _: object) -> bool:
        names = [key.key for key in path]
        inside = names[1:] if names[0] == "language_model" else names[:1]
        return any(name in parts for name in inside)

    return jax.tree_util.tree_map_with_path(named, params)


def make_step(config: LlavaConfig, stage: Stage) -> Step:
    """The compiled training step of a stage."""
    transform = optimizer(stage)

    def objective(params: Params, batch: Batch) -> tuple[Array, Losses]:
        found = losses(params, config, batch, with_questions=stage.questions > 0)
        return found.answer + stage.alignment * found.alignment + stage.presence * found.presence, found

    def step(state: State, batch: Batch) -> tuple[State, Losses]:
        gradients, found = jax.grad(objective, has_aux=True)(state.params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers, and mixes them with floats
            updates, optimizer_state = transform.update(gradients, state.optimizer, state.params)
            params = cast(Params, optax.apply_updates(state.params, updates))
        return State(params, optimizer_state), found

    return jax.jit(step, donate_argnums=0)


def begin(stage: Stage, config: LlavaConfig, params: Params, seed: int) -> State:
    """The state at the start of a stage.

    With questions, words and picture are brought to one scale, and the decoder starts from them.
    """
    if stage.questions:
        pixels = make_batch(seed, 0, MEASURED, 0, (1, DIGITS)).pixels
        params = wire(balance(params, config, pixels), config, seed)
    return State(params, optimizer(stage).init(params))
