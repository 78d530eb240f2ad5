"""The two stages of training, and one step of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.llava import Params
from training.batches import Batch
from training.model import start
from training.objective import Losses, losses

DIGITS = 9  # the most in a scene


class Stage(NamedTuple):
    """A stretch of training with an optimizer of its own.

    Attributes:
      steps, scenes, questions: how long, and the size of a batch; no questions: tower, projector and words only.
      rate, tower_scale: peak learning rate, and what it is multiplied by in the tower.
      alignment, presence: weights of these losses beside the answers'.
      fewest: digits in a scene at least.
      easy, harder: scenes have at most two digits in the first `easy` steps, one more every `harder` steps from there.
    """

    name: str
    steps: int
    scenes: int
    questions: int
    rate: float
    tower_scale: float
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
    Stage("see", 2400, 12, 0, rate=2e-3, tower_scale=1.0, alignment=1.0, presence=0.1, fewest=DIGITS),
    Stage("answer", 3600, 8, 12, rate=1.5e-3, tower_scale=0.4, alignment=0.3, presence=0.03, easy=300, harder=80),
)
WARM_UP = 100
PARTS = ("vision_tower", "multi_modal_projector", "language_model")


class State(NamedTuple):
    """Everything that a step changes."""

    params: Params
    optimizer: optax.OptState


Step = Callable[[State, Batch], tuple[State, Losses]]


def optimizer(stage: Stage) -> optax.GradientTransformation:
    """AdamW with a cosine schedule, gradients clipped, a slower tower."""
    warm_up = min(WARM_UP, stage.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, stage.rate, warm_up, stage.steps, end_value=stage.rate / 100)
    in_tower = {part: part == "vision_tower" for part in PARTS}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.99, weight_decay=0.05),
        optax.masked(optax.scale(stage.tower_scale), in_tower),
    )


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

    Decoder layers start anew, since weight decay has worn at those that a stage without questions left alone. The head
    starts as the embedding table, at unit length on average.
    """
    fresh = start(config, seed)["language_model"]
    table = params["language_model"]["embed_tokens"]["embedding"]
    head = table.T / jnp.mean(jnp.linalg.norm(table, axis=1))
    decoder = fresh | {"embed_tokens": {"embedding": table}, "lm_head": {"kernel": head}}
    params = params | {"language_model": decoder}
    return State(params, optimizer(stage).init(params))
