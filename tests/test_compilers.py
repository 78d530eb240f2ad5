"""Models of every family at their real size, compiled for accelerators that need not be here: `make test-compilers`."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from itertools import chain

import pytest
from jax import numpy as jnp

from sparsevlm_jax.aot.compile_for import CompiledAnswer, Deployment, compile_for
from sparsevlm_jax.aot.devices import DEVICES, require_compiler
from sparsevlm_jax.aot.hlo import Instruction
from sparsevlm_jax.aot.programs import Prompts
from sparsevlm_jax.aot.report import kernels_of_a_point, program_report
from sparsevlm_jax.aot.scopes import phase_of
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.parameters import abstract_params, tree_bytes
from sparsevlm_jax.models.presets import llava_15_7b, llava_15_13b, llava_next_7b, video_llava_7b
from sparsevlm_jax.models.vipllava import VipLlavaConfig
from sparsevlm_jax.ops.attention import choose_implementation, target
from sparsevlm_jax.parallel.mesh import MeshShape
from sparsevlm_jax.pruning.methods import sparsity

LAYERS, MOST_KERNELS, TEXT, FRAMES = 32, 25, 88, 8
pytestmark = pytest.mark.compilers


def vip_llava_7b() -> VipLlavaConfig:
    """As in `llava-hf/vip-llava-7b-hf`."""
    base = llava_15_7b()
    shared = {field.name: getattr(base, field.name) for field in fields(base) if field.name != "model_type"}
    own = {"vision_feature_layer": (-2, -5, -8, -11, 6), "projector_norm_eps": 1e-5}
    return VipLlavaConfig(**shared | own)


MODELS = {
    "llava": llava_15_7b,
    "vipllava": vip_llava_7b,
    "llava_next": llava_next_7b,
    "video_llava": video_llava_7b,
}
families = pytest.mark.parametrize("family", MODELS)
# The TPU's compiler takes minutes for each; towers apart, they are the same program at other lengths.
everywhere = pytest.mark.parametrize(
    ("device", "family"), [*(("h100", family) for family in MODELS), ("v5e", "llava"), ("v5e", "video_llava")]
)
methods = pytest.mark.parametrize("method", ["dense", "v1.5"])


@cache
def answer(device: str, family: str, method: str) -> CompiledAnswer:
    _require(device)
    config = MODELS[family]()
    return compile_for(config, sparsity(method), _prompts(config), Deployment(DEVICES[device]))


@cache
def on_four(method: str) -> CompiledAnswer:
    """LLaVA-1.5-13B over four H100s."""
    _require("h100")
    config = llava_15_13b()
    return compile_for(config, sparsity(method), _prompts(config), Deployment(DEVICES["h100"], MeshShape(tensor=4)))


def _require(device: str) -> None:
    try:
        require_compiler(DEVICES[device])
    except UserError as error:
        pytest.skip(str(error))


def _prompts(config: ModelConfig) -> Prompts:
    """One image that becomes most visual tokens, or one video."""
    video = config.video_token_id is not None
    layout = config.video_layout(FRAMES) if video else config.image_layout(config.fullest_image)
    return Prompts(1, (layout,), TEXT, 128)


def instructions(found: CompiledAnswer) -> list[Instruction]:
    return list(chain(found.prefill.program.instructions(), found.decode.program.instructions()))


@families
@methods
def test_cudnn_attends_in_every_layer_of_a_prefill_where_it_is_chosen(family: str, method: str) -> None:
    found = answer("h100", family, method)
    with target("cuda"):
        for length in found.programs.lengths:
            shape = (1, length, 32, 128)
            assert choose_implementation(shape, shape, jnp.dtype("bfloat16"), causal=True) == "cudnn"
    calls = [each for each in found.prefill.program.instructions() if each.target.startswith("__cudnn$fmha")]
    assert len(calls) == LAYERS and all("PADDING_CAUSAL" in call.rest for call in calls)
    assert {call.shapes[0].dims[2] for call in calls} == set(found.programs.lengths)


@everywhere
@methods
def test_nothing_calls_the_host_and_no_dimension_is_dynamic(device: str, family: str, method: str) -> None:
    found = instructions(answer(device, family, method))
    assert not [each.name for each in found if "callback" in each.target or "host" in each.target.lower()]
    assert not {each.opcode for each in found} & {"infeed", "outfeed", "send", "recv"}
    assert not [each.name for each in found for shape in each.shapes if shape.dynamic]


@everywhere
def test_nothing_that_scores_is_length_by_length(device: str, family: str) -> None:
    found = answer(device, family, "v1.5")
    shortest = min(found.programs.lengths)
    scoring = [each for each in found.prefill.program.instructions() if phase_of(each.scope) == "score"]
    assert len(scoring) > 20
    squares = [(e.name, s) for e in scoring for s in e.shapes if sum(size >= shortest for size in s.dims) > 1]
    assert not [(name, shape) for name, shape in squares if not _is_hidden(shape.dims)]


def _is_hidden(dims: tuple[int, ...]) -> bool:
    """[.., l, heads or width]: of the model, not of two sequences."""
    return 4096 in dims or (128 in dims and 32 in dims)


@everywhere
def test_pruned_temporaries_and_outputs_are_below_dense(device: str, family: str) -> None:
    """Temporaries are most where the first stage runs, or the tower: there pruning has nothing to save."""
    dense, pruned = answer(device, family, "dense"), answer(device, family, "v1.5")
    assert pruned.prefill.temporaries < dense.prefill.temporaries + 2**16
    assert pruned.prefill.output < dense.prefill.output
    assert pruned.memory < dense.memory < DEVICES[device].memory


@families
def test_a_pruning_layer_adds_fewer_than_twenty_five_kernels_of_its_own(family: str) -> None:
    dense, pruned = answer("h100", family, "dense"), answer("h100", family, "v1.5")
    before, after = (program_report(each.prefill, DEVICES["h100"]) for each in (dense, pruned))
    scopes, everything = kernels_of_a_point(before, after, len(pruned.programs.lengths) - 1)
    print(f"a pruning layer: {scopes:.1f} kernels of its own, {everything:.1f} in all")
    assert scopes < MOST_KERNELS


@methods
def test_the_decoding_loop_holds_no_second_cache(method: str) -> None:
    found = answer("h100", "llava", method)
    assert found.decode.shared >= found.programs.cache > 200 * 2**20
    assert found.decode.output - found.decode.shared < 2**10
    assert found.decode.temporaries < found.programs.cache / 200


@cache
def in_eight_bits() -> CompiledAnswer:
    _require("h100")
    config = llava_15_7b()
    return compile_for(config, sparsity("dense"), _prompts(config), Deployment(DEVICES["h100"], quantize="int8"))


def test_weights_in_eight_bits_are_read_as_they_are() -> None:
    """In each loop of decoding a weight is read once, in one byte; nowhere is one written out in 16 bits."""
    plain, held = answer("h100", "llava", "dense"), in_eight_bits()
    layers = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # bytes in 16 bits
    read, before = (sum(kernel.bytes for kernel in each.decode.kernels) for each in (held, plain))
    assert before - read == pytest.approx(layers / 2, rel=0.01)
    assert len(held.decode.kernels) == len(plain.decode.kernels)
    assert held.decode.temporaries <= 1.1 * plain.decode.temporaries
    assert held.prefill.temporaries <= 1.1 * plain.prefill.temporaries
    assert held.memory < 0.6 * plain.memory


@methods
def test_four_devices_exchange_what_tensor_parallelism_needs_and_nothing_else(method: str) -> None:
    """Two sums over [tokens, width] in every layer and one for the words, one over [raters, tokens] at every pruning
    layer, and the logits."""
    found, text = on_four(method), llava_15_13b().text
    lengths, stages = found.programs.lengths, found.programs.plan.stages
    through_layers = sum(2 * (stage.stop - stage.start) * length for stage, length in zip(stages, lengths, strict=True))
    scored = [(lengths[0] - stages[0].visual) * length for length in lengths[:-1]]
    logits = (1, 2 * text.vocab_size)
    sums = 2 * text.num_hidden_layers + 1
    size = 2 * text.hidden_size * (through_layers + lengths[0]) + 4 * sum(scored)
    print(f"prefill {found.prefill.collectives}, a step {found.decode.collectives}, {found.memory / 2**30:.2f} GiB")
    assert found.prefill.collectives == {"all-reduce": (sums + len(scored), size), "all-gather": logits}
    assert found.decode.collectives == {"all-reduce": (sums, 2 * text.hidden_size * sums), "all-gather": logits}


def test_a_fourth_of_the_decoder_and_of_its_cache_is_on_each_of_four_devices() -> None:
    found, config = on_four("v1.5"), llava_15_13b()
    shapes = abstract_params(config, jnp.bfloat16)
    decoder, whole = tree_bytes(shapes["language_model"]), tree_bytes(shapes)
    assert found.programs.parameters == pytest.approx(whole - decoder + decoder / 4, rel=1e-3)  # norms are whole
    tokens = sum(
        (s.stop - s.start) * (n + 128) for s, n in zip(found.programs.plan.stages, found.programs.lengths, strict=True)
    )
    assert found.programs.cache == pytest.approx(2 * 2 * tokens * config.text.hidden_size / 4, rel=1e-3)
    assert found.memory < found.programs.parameters + found.programs.cache + 2**28
