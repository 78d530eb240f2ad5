"""LLaVA-1.5-7B at its real size, compiled for accelerators that need not be here: `make test-compilers`."""

from __future__ import annotations

from functools import cache
from itertools import chain

import pytest
from jax import numpy as jnp

from sparsevlm_jax import llava_15_7b
from sparsevlm_jax.aot.compile_for import Answer, compile_for
from sparsevlm_jax.aot.devices import DEVICES, require_compiler
from sparsevlm_jax.aot.hlo import Instruction
from sparsevlm_jax.aot.programs import Prompts
from sparsevlm_jax.aot.report import kernels_of_a_point, program_report
from sparsevlm_jax.aot.scopes import phase_of
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.ops.attention import choose_implementation, target
from sparsevlm_jax.pruning.methods import sparsity

LAYERS, MOST_KERNELS = 32, 24
pytestmark = pytest.mark.compilers
devices = pytest.mark.parametrize("device", ["h100", "v5e"])
methods = pytest.mark.parametrize("method", ["dense", "v1.5"])


@cache
def answer(device: str, method: str) -> Answer:
    try:
        require_compiler(DEVICES[device])
    except UserError as error:
        pytest.skip(str(error))
    config = llava_15_7b()
    prompts = Prompts(1, (config.image_layout(config.fullest_image),), 88, 128)
    return compile_for(config, sparsity(method), prompts, "bfloat16", DEVICES[device])


def instructions(found: Answer) -> list[Instruction]:
    return list(chain(found.prefill.program.instructions(), found.decode.program.instructions()))


@methods
def test_cudnn_attends_in_every_layer_of_a_prefill_where_it_is_chosen(method: str) -> None:
    found = answer("h100", method)
    with target("cuda"):
        for length in found.programs.lengths:
            shape = (1, length, 32, 128)
            assert choose_implementation(shape, shape, jnp.dtype("bfloat16"), causal=True) == "cudnn"
    calls = [each for each in found.prefill.program.instructions() if each.target.startswith("__cudnn$fmha")]
    assert len(calls) == LAYERS and all("PADDING_CAUSAL" in call.rest for call in calls)
    assert {call.shapes[0].dims[2] for call in calls} == set(found.programs.lengths)


@devices
@methods
def test_nothing_calls_the_host_and_no_dimension_is_dynamic(device: str, method: str) -> None:
    found = instructions(answer(device, method))
    assert not [each.name for each in found if "callback" in each.target or "host" in each.target.lower()]
    assert not {each.opcode for each in found} & {"infeed", "outfeed", "send", "recv"}
    assert not [each.name for each in found for shape in each.shapes if shape.dynamic]


@devices
def test_nothing_that_scores_is_length_by_length(device: str) -> None:
    found = answer(device, "v1.5")
    shortest = min(found.programs.lengths)
    scoring = [each for each in found.prefill.program.instructions() if phase_of(each.scope) == "score"]
    assert len(scoring) > 20
    squares = [(e.name, s) for e in scoring for s in e.shapes if sum(size >= shortest for size in s.dims) > 1]
    assert not [(name, shape) for name, shape in squares if not _is_hidden(shape.dims)]


def _is_hidden(dims: tuple[int, ...]) -> bool:
    """[.., l, heads or width]: of the model, not of two sequences."""
    return 4096 in dims or (128 in dims and 32 in dims)


@devices
def test_pruned_temporaries_and_outputs_are_below_dense(device: str) -> None:
    dense, pruned = answer(device, "dense"), answer(device, "v1.5")
    assert pruned.prefill.temporaries < dense.prefill.temporaries
    assert pruned.prefill.output < dense.prefill.output
    assert pruned.memory < dense.memory < DEVICES[device].memory


def test_a_pruning_layer_adds_at_most_twenty_four_kernels_of_its_own() -> None:
    dense, pruned = answer("h100", "dense"), answer("h100", "v1.5")
    before, after = (program_report(each.prefill, DEVICES["h100"]) for each in (dense, pruned))
    scopes, everything = kernels_of_a_point(before, after, len(pruned.programs.lengths) - 1)
    print(f"a pruning layer: {scopes:.1f} kernels of its own, {everything:.1f} in all")
    assert scopes <= MOST_KERNELS
