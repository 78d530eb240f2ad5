"""The task of the demo model: scenes of handwritten digits, and its stages."""

from __future__ import annotations

import numpy as np

from training.batches import Batch, make_batch
from training.model import CONFIG, PATCH_WORDS
from training.stages import DIGITS, Stage, Task
from training.words import ID, SPELLINGS

STAGES = (
    Stage("see", 2000, 12, 0, rate=4e-3, warm_up=100, seeing=(1.0, 1.0), alignment=1.0, presence=0.1, fewest=DIGITS),
    Stage(
        "answer",
        2800,
        4,
        24,
        rate=1.5e-3,
        warm_up=40,
        seeing=(0.0, 0.4),
        alignment=0.3,
        presence=0.03,
        easy=100,
        harder=50,
        wired=True,
    ),
    Stage(
        "thin",
        450,
        4,
        24,
        rate=3e-4,
        warm_up=20,
        seeing=(0.1, 0.1),
        alignment=0.3,
        presence=0.03,
        thin=True,
    ),
)
MEASURED = 24  # scenes


def _batch(stage: Stage, seed: int, step: int, of_stage: int) -> Batch:
    layers = CONFIG["text_config"]["num_hidden_layers"] if stage.thin else 0
    return make_batch(seed, step, stage.scenes, stage.questions, stage.digits(of_stage), thinned=layers)


def _measured(seed: int) -> np.ndarray:
    return make_batch(seed, 0, MEASURED, 0, (1, DIGITS)).pixels


DEMO = Task(
    config=CONFIG,
    ids=ID,
    spellings=SPELLINGS,
    said=PATCH_WORDS,
    told=tuple(map(str, range(10))),
    stages=STAGES,
    batch=_batch,
    measured=_measured,
    packages=("scikit-learn", "pillow"),
)
