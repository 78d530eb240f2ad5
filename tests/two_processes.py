"""Run twice at a time by test_parallel.py, each with two devices: one model over both processes, answers as JSON.

python -m tests.two_processes PORT NUMBER DEMO TINY    two converted checkpoints
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

import sparsevlm_jax as sv
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.inputs.processor import Processor
from tests.on_mesh import generated, in_numbers

BATCH = 4


def asked() -> tuple[list[Any], list[str]]:
    """Twelve questions about four images."""
    pairs = [(sample.image, asked.question) for sample in demo_model.samples() for asked in sample.questions][:12]
    return [[image] for image, _ in pairs], [question for _, question in pairs]


def demo_answers(model: sv.Model) -> list[str]:
    images, questions = asked()
    found = sv.answer_all(model, images, questions, batch_size=BATCH, max_new_tokens=8)
    return [answer.text for _, answer in sorted(found)]


def tiny_answers(model: sv.Model) -> list[str]:
    return generated(model, rows=2)


def require_parts(params: Any, processes: int) -> None:
    """This process holds its part of the decoder's matrices."""
    for leaf in (leaf for leaf in jax.tree.leaves(params["language_model"]) if leaf.ndim == 2):
        assert sum(shard.data.size for shard in leaf.addressable_shards) == leaf.size // processes


def main(arguments: Sequence[str]) -> dict[str, list[str]]:
    port, number, demo, tiny = arguments
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    found = {"demo": demo_answers(sv.load(demo, sharding="data=2,tensor=2"))}
    Processor.decode = in_numbers
    over_both = sv.load(tiny, sharding="tensor=4")
    require_parts(over_both.params, 2)
    return found | {"tiny": tiny_answers(over_both)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
