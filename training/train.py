"""Trains a small LLaVA: `python -m training.train OUT [--task easy-vqa]`. The same command after a kill goes on from a
checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from sparsevlm_jax.ahead import ahead
from sparsevlm_jax.models.llava import LlavaConfig
from training.batches import Batch
from training.demo import DEMO
from training.export import export
from training.log import Log, draw_curves
from training.model import start
from training.shapes import EASY_VQA
from training.stages import Stage, State, Task, begin, make_step

TASKS = {"demo": DEMO, "easy-vqa": EASY_VQA}
SAVE_EVERY = 200  # steps; a multiple of log.LOG_EVERY, so that a mean of losses never spans a restart


def train(
    task: Task,
    folder: Path,
    *,
    seed: int = 0,
    save_every: int = SAVE_EVERY,
    stop: int | None = None,
) -> State:
    """Trains from the last checkpoint in `folder`, or from the beginning.

    Writes `log.jsonl` and checkpoints into `folder`. A batch is a function of seed and step, and a stage's start one of
    the state before it, so a run that was stopped gives the losses of one that was not.

    Args:
      task: what to train, and in which stages.
      seed: of parameters and batches.
      save_every: steps from one checkpoint to the next, a multiple of log.LOG_EVERY.
      stop: end after that many steps, as a kill would.

    Returns:
      The state after the last step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = LlavaConfig.from_hf(task.config)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(_checkpoints(folder, save_every))
        done = checkpoints.latest.step if checkpoints.latest else 0
        log = stack.enter_context(Log(folder / "log.jsonl", done, sum(stage.steps for stage in task.stages)))
        state, first = State(start(model, seed), ()), 0
        for stage in task.stages:
            last = first + stage.steps
            state = begin(task, stage, model, state.params, seed)
            if first < done <= last:
                state = _uncommitted(checkpoints.load(done, jax.tree.map(_abstract, state)))
            step = make_step(model, stage, task.ids_of(task.told))
            for number, batch in _batches(task, stage, seed, first, range(max(done, first), last)):
                state, losses = step(state, batch)
                log.add(number + 1, stage, losses)
                checkpoints.save(number + 1, state)
                if number + 1 == stop:
                    return state
            first = last
    return state


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _uncommitted(state: State) -> State:
    """A copy that is bound to no device, as a state from `begin` is: jit compiles a step for either kind once."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)


def _checkpoints(folder: Path, every: int) -> ocp.training.Checkpointer:
    saving, keeping = ocp.training.save_decision_policies, ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        str(folder.resolve() / "checkpoints"),
        # Orbax's own policies do not fit its protocols by their annotations.
        save_decision_policy=saving.FixedIntervalPolicy(every),  # pyright: ignore[reportArgumentType]
        preservation_policy=keeping.LatestN(2),  # pyright: ignore[reportArgumentType]
    )


def _batches(task: Task, stage: Stage, seed: int, first: int, steps: range) -> Iterator[tuple[int, Batch]]:
    """The stage's batches, each made while the one before it is learned from."""
    return zip(steps, ahead(task.batch(stage, seed, step, step - first) for step in steps), strict=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for log, checkpoints and, at the end, the model")
    parser.add_argument("--task", choices=TASKS, default="demo", help="what is learned; easy-vqa needs that package")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    task = TASKS[options.task]
    state = train(task, options.out, seed=options.seed)
    export(task, state.params, options.out / "model")
    draw_curves(options.out / "log.jsonl", options.out / "curves.png")
    environment = {
        "command": f"python -m training.train OUT --task {options.task} --seed {options.seed}",
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in ("jax", "flax", "optax", "numpy", *task.packages)},
    }
    (options.out / "run.json").write_text(json.dumps(environment, indent=2) + "\n")


if __name__ == "__main__":
    main()
