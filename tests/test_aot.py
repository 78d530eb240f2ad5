"""Programs compiled for an accelerator: their text read, the roofline, the largest batch, and the command."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sparsevlm_jax.aot import devices
from sparsevlm_jax.aot.compile_for import Compiled, search
from sparsevlm_jax.aot.devices import DEVICES, Device, require_compiler
from sparsevlm_jax.aot.hlo import parse, shapes_in
from sparsevlm_jax.aot.programs import Prompts, lowered
from sparsevlm_jax.aot.report import kernels_of_a_point, program_report
from sparsevlm_jax.aot.roofline import Kernel, kernels
from sparsevlm_jax.aot.scopes import OTHER
from sparsevlm_jax.cli import main
from sparsevlm_jax.cli.compile_for import print_report
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.presets import llava_next_7b, tiny, video_llava_7b
from sparsevlm_jax.parallel.mesh import ONE
from sparsevlm_jax.pruning.methods import sparsity

HLO = Path(__file__).parent / "hlo"
# What XLA's compilers print, cut short. Of a GPU: a product in a fusion whose scope is an addition behind it, a product
# without any scope, an embedding's rows, a row written in place, cuDNN's attention, cuBLAS with its workspace, loops.
GPU = (HLO / "gpu.txt").read_text(encoding="utf-8")
# Of a TPU: a weight that is fetched ahead in two pieces, and products that are convolutions.
TPU = (HLO / "tpu.txt").read_text(encoding="utf-8")
PRODUCT = 2 * 64 * 32 * 16
BY_THE_SECOND = Device("slow", "cuda", 10**6, bandwidth=100.0, peak=1000.0, peak_float32=10.0, target="")


def named(text: str) -> dict[str, Kernel]:
    return {kernel.instruction.name: kernel for kernel in kernels(parse(text))}


@pytest.mark.parametrize(
    "name, phase, size, flops",
    [
        ("mlp", "mlp", 2 * (64 * 32 + 32 * 16 + 64 * 16 + 64 * 16), PRODUCT),
        ("split", "projections", 4 * (64 * 32 + 32 * 16 + 64 * 16), PRODUCT),
        ("embedded", OTHER, 2 * 64 * 32 + 4 * 64 + 2 * 64 * 32, 0),
        ("longer", OTHER, 2 * 2 * 8 * 32 + 4, 0),
        ("attended", "attend", 2 * 4 * 64 * 4 * 8, 2 * 2 * 64 * 64 * 4 * 8 // 2),
        ("gemm", "head", 2 * (64 * 32 + 32 * 16) + 4 * 64 * 16, PRODUCT),
    ],
)
def test_a_kernel_has_the_phase_the_bytes_and_the_flops_of_what_it_does(
    name: str, phase: str, size: int, flops: int
) -> None:
    kernel = named(GPU)[name]
    assert (kernel.phase, kernel.bytes, kernel.flops) == (phase, size, flops)


def test_loops_count_their_turns_and_one_where_only_data_knows_them() -> None:
    twice = [kernel for kernel in kernels(parse(GPU)) if kernel.instruction.name == "twice"]
    assert [(kernel.times, kernel.looped, kernel.phase) for kernel in twice] == [
        (5, False, "score"),
        (1, True, "score"),
    ]


def test_a_norm_is_no_part_of_what_made_its_input() -> None:
    """A fusion has the phase of what it computes: of a bitcast at its head only the name comes from elsewhere."""
    text = """HloModule norm

%fused (param_0: bf16[8,1,4]) -> bf16[1,8,4] {
  %param_0 = bf16[8,1,4]{2,1,0} parameter(0)
  %bitcast.1 = bf16[1,8,4]{2,1,0} bitcast(%param_0), metadata={op_name="jit(start)/rebuild/gather"}
  ROOT %mul = bf16[1,8,4]{2,1,0} multiply(%bitcast.1, %bitcast.1), metadata={op_name="jit(start)/layers_3/norm/mul"}
}

ENTRY %main (a: bf16[8,1,4]) -> bf16[1,8,4] {
  %a = bf16[8,1,4]{2,1,0} parameter(0)
  ROOT %norm = bf16[1,8,4]{2,1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(start)/norm/mul"}
}
"""
    assert named(text)["norm"].phase == OTHER


def test_what_names_nests_or_waits_is_no_kernel() -> None:
    assert list(named(GPU)) == [
        *("mlp", "split", "sum", "embedded", "longer", "attended", "gemm", "twice", "gathered", "out")
    ]
    assert list(named(TPU)) == ["one", "two", "copy-start"]  # the last brings back what is in fast memory


def test_what_a_tpu_fetches_ahead_counts_once_with_the_kernel_that_takes_it() -> None:
    found = named(TPU)
    weight, rest = 2 * 32 * 16, 2 * (64 * 32 + 64 * 16)
    assert (found["one"].bytes, found["two"].bytes) == (weight + rest, rest)
    assert found["one"].flops == PRODUCT and found["one"].phase == "mlp"


def test_a_kernel_takes_the_longer_of_its_bytes_and_its_flops() -> None:
    found = named(GPU)
    assert found["mlp"].seconds(BY_THE_SECOND) == max(found["mlp"].bytes / 100, PRODUCT / 1000)
    assert found["split"].seconds(BY_THE_SECOND) == PRODUCT / 10  # of float32
    assert found["longer"].seconds(BY_THE_SECOND) == found["longer"].bytes / 100


@pytest.mark.parametrize("spread", [1, 2])
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((2, 1), (1, 3))])
def test_flops_of_a_convolution_are_those_that_xla_counts(padding: tuple[tuple[int, int], ...], spread: int) -> None:
    image, kernel = jax.ShapeDtypeStruct((2, 9, 11, 3), jnp.float32), jax.ShapeDtypeStruct((3, 2, 3, 5), jnp.float32)

    def run(x: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, k, (2, 1), padding, (1, spread), (spread, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    program = jax.jit(run).lower(image, kernel)
    counted: Any = program.cost_analysis()
    found = kernels(parse(program.compile().as_text() or ""))
    assert sum(kernel.flops for kernel in found) == counted["flops"] > 0


def test_the_text_of_a_program_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        parse("HloModule nothing")


def test_shapes_know_their_bytes_their_place_and_whether_they_are_dynamic() -> None:
    small, fast, dynamic = shapes_in("(s4[3]{0}, f8e4m3fn[2,8]{1,0:T(8,128)S(1)}, /*index=2*/bf16[<=7])")
    assert (small.bytes, fast.bytes, dynamic.bytes) == (2, 16, 14)
    assert (small.space, fast.space, dynamic.dynamic, fast.dynamic) == (0, 1, True, False)


def compiled(text: str, only_loop: bool = False) -> Compiled:
    return Compiled(1.0, 100, 20, 10, 5, text, only_loop)


def test_a_report_sums_kernels_by_phase_and_counts_collectives() -> None:
    report = program_report(compiled(GPU), BY_THE_SECOND)
    assert report["kernels"] == 9 + 6 and report["kernels_by_phase"]["score"] == 6
    assert (report["collectives"], report["collective_bytes"]) == (1, 2 * 64 * 16)
    assert report["collectives_by_kind"] == {"all-reduce": {"arrays": 1, "bytes": 2 * 64 * 16}}
    assert report["predicted_seconds"] == pytest.approx(sum(report["predicted_seconds_by_phase"].values()))
    step = program_report(compiled(GPU, only_loop=True), BY_THE_SECOND)
    assert step["kernels_by_phase"] == {"score": 1}
    assert compiled(GPU).memory == 115


def test_the_command_s_tables_show_memory_and_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    part = program_report(compiled(GPU), BY_THE_SECOND)
    side = {
        "lengths": [9, 5],
        "parameter_bytes": 2**30,
        "cache_bytes": 2**20,
        "left_bytes": -(2**20),
        "largest_batch": 7,
    }
    side |= {"prefill": part, "decode": part}
    whole = {"device": "slow", "mesh": "tensor=2", "batch": 2, "dtype": "bfloat16", "quantize": None, "new_tokens": 16}
    whole["device_memory_bytes"] = 10**6
    print_report(whole | {"dense": side, "pruned": side})
    out = capsys.readouterr().out
    assert all(
        text in out for text in ("1.00 GiB", "none: 1.00 MiB too few", "projections", "predictions, not measured")
    )
    print_report(whole | {"dense": {"does_not_fit": "slow: too large"}, "pruned": side})
    assert "does not fit" in capsys.readouterr().out


def test_kernels_of_a_pruning_layer_leave_rating_out() -> None:
    dense = {"kernels": 100, "kernels_by_phase": {"mlp": 100}}
    pruned = {"kernels": 190, "kernels_by_phase": {"mlp": 110, "rate": 10, "score": 40, "select": 30}}
    assert kernels_of_a_point(dense, pruned, 2) == (35.0, 40.0)


@pytest.mark.parametrize(
    "memory, limit, known, expected",
    [
        (lambda batch: 1000 + 10 * batch, 2005, {}, 100),
        (lambda batch: 1000 + 10 * batch, 999, {}, 0),
        (lambda batch: 1000 + 10 * batch, 1010, {}, 1),
        (lambda batch: 1000 + 10 * batch + 100 * (batch > 50), 2005, {}, 90),  # steeper than its beginning says
        (lambda batch: 1000 + 10 * batch if batch < 5 else None, 2005, {}, 4),  # the compiler refuses earlier
        (lambda batch: 1000 + 10 * batch, 2005, {8: 1080, 32: 1320}, 100),
        (lambda batch: 1000 + batch, 10**9, {}, 1024),
    ],
)
def test_the_largest_batch_is_found_by_looking_at_few(
    memory: Callable[[int], int | None], limit: int, known: dict[int, int], expected: int
) -> None:
    looked: list[int] = []

    def look(batch: int) -> int | None:
        looked.append(batch)
        return memory(batch)

    assert search(look, limit, 8, known) == expected
    assert len(looked) <= 5 and len(looked) == len(set(looked)) and not set(looked) & set(known)


@pytest.mark.parametrize("model, frames, tiles", [(llava_next_7b, 0, 5), (video_llava_7b, 8, 0), (tiny, 0, 1)])
def test_programs_are_lowered_with_the_shapes_of_prompts_and_no_arrays(model: Any, frames: int, tiles: int) -> None:
    config = replace(model(), text=tiny().text, vision=replace(tiny().vision, image_size=336))
    layout = config.video_layout(frames) if frames else config.image_layout(config.fullest_image)
    seen: dict[str, Any] = {}

    class ReachedError(Exception):
        """Before anything is traced."""

    def start(params: Any, ids: Any, lengths: Any, images: Any, *rest: Any, **static: Any) -> None:
        seen.update(ids=ids, images=images, plan=static["plan"])
        raise ReachedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ReachedError):
        patch.setattr("sparsevlm_jax.aot.programs.start", SimpleNamespace(lower=start))
        lowered(config, sparsity("v1.5"), Prompts(3, (layout,), 90, 100), "bfloat16", jax.devices()[0], "cuda")
    assert seen["ids"].shape == (3, 96 + layout.tokens) and seen["plan"].visual_tokens == layout.tokens
    pixels = getattr(seen["images"], "pixel_values", seen["images"])
    assert len(pixels.shape) == 4 and pixels.shape[0] == 3 * tiles
    assert not frames or seen["images"].frames.shape[0] == 3 * frames


@pytest.mark.parametrize("platform, multiple", [("cpu", 1), ("cuda", 8)])
def test_a_tiny_model_s_programs_are_those_of_an_answer(platform: str, multiple: int) -> None:
    config = replace(tiny(), attention="xla")
    prompts = Prompts(2, (config.image_layout(config.fullest_image),), 20, 10)
    found = lowered(config, sparsity("v1.5", keep=8), prompts, "bfloat16", jax.devices()[0], platform)
    assert found.lengths[0] == 32 + 16 and len(found.lengths) == len(found.plan.stages) > 1
    cached: Any = found.start.out_info.cache.keys
    for stage, length in zip(found.plan.stages, found.lengths, strict=True):
        assert length == multiple * -(-(32 + stage.visual) // multiple)
        assert all(key.shape[1] == length + 16 for key in cached[stage.start : stage.stop])
    state: Any = found.start.out_info
    assert state.tokens.shape == (2, 16) and state.cache.keys[0].shape[:2] == (2, 32 + 16 + 16)
    assert found.cache == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    kept: Any = found.decode.out_info
    assert jax.tree.map(lambda leaf: leaf.shape, kept) == jax.tree.map(lambda leaf: leaf.shape, state)


@pytest.mark.parametrize("device, extra", [("h100", "cuda12"), ("v5e", "tpu")])
def test_a_compiler_that_is_missing_is_one_line_that_says_what_to_install(
    device: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices.importlib.util, "find_spec", partial(_hidden, importlib.util.find_spec))
    monkeypatch.setattr("sys.argv", ["sparsevlm", "plan", "--model", "tiny", "--compile-for", device])
    with pytest.raises(SystemExit) as stop:
        main.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and len(err.splitlines()) == 1
    assert f"--compile-for {device}: XLA's compiler for" in err and f"pip install 'sparsevlm_jax[{extra}]'" in err


def _hidden(find: Callable[..., Any], name: str, *rest: Any) -> Any:
    return None if name.startswith(("jax_plugins", "libtpu")) else find(name, *rest)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--compile-for", "h300"), "--compile-for h300: expected one of a100, h100"),
        (("--batch", "4"), "--batch 4: has an effect with --compile-for only"),
        (("--dtype", "bfloat16"), "--dtype bfloat16: has an effect with --compile-for only"),
        (("--compile-for", "h100", "--dtype", "int3"), "--dtype int3: expected one of float32"),
    ],
)
def test_options_of_compiling_that_mean_nothing_are_refused(
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["sparsevlm", "plan", "--model", "tiny", *options])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_every_device_says_what_its_compiler_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_installed", lambda module: False)
    for device in DEVICES.values():
        assert device.peak > device.peak_float32 > 0 and device.bandwidth > 0
        assert device.target.count("{") == device.target.count("}") == 3 * (device.platform == "cuda")
        with pytest.raises(UserError, match=device.name):
            require_compiler(device)


def test_a_report_of_what_does_not_fit_is_one_line_and_names_no_mesh_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    side = {"does_not_fit": "v5e: its memory, 15.75 GiB, does not hold the programs"}
    report = {"device": "v5e", "device_memory_bytes": DEVICES["v5e"].memory, "batch": 1, "dtype": "bfloat16"}
    print_report(report | {"mesh": str(ONE), "quantize": None, "new_tokens": 128, "dense": side, "pruned": side})
    head, line = capsys.readouterr().out.splitlines()
    assert head == "Compiled for v5e (15.75 GiB), batch 1, bfloat16, room for 128 new tokens:"
    assert line == f"{side['does_not_fit']}, dense or pruned; --mesh tensor=N shares them"
