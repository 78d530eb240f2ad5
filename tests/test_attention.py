"""Every implementation of the decoder's attention against plain softmax in NumPy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from sparsevlm_jax.ops import attention
from sparsevlm_jax.ops.attention import attend, attention_rows, choose_implementation
from sparsevlm_jax.ops.rope import apply_rope
from sparsevlm_jax.rotary import plain_rope

LENGTH, HEAD_DIM = 27, 8
LENGTHS = np.array([27, 11, 1], np.int32)
# On an NVIDIA machine (JAX_PLATFORMS=cuda) the fused kernel is held against the same reference.
IN_16_BIT = ["xla", "blockwise", "tiled", *(["cudnn"] if attention.traced_for() == "cuda" else [])]
HEADS = [(4, 4), (4, 2), (4, 1)]  # query heads, key-value heads


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two full blocks and a remainder; in tiles three and a remainder, two heads at a time."""
    monkeypatch.setattr(attention, "BLOCK", 10)
    monkeypatch.setattr(attention, "ROWS", 8)
    monkeypatch.setattr(attention, "CACHED", 4 * 8 * LENGTH * 4)


def inputs(heads: int, kv_heads: int, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key, value; the padding of short rows is loud."""
    random = np.random.default_rng(0)
    found = []
    for count in (heads, kv_heads, kv_heads):
        x = random.normal(0, 2, (len(LENGTHS), LENGTH, count, HEAD_DIM))
        x[np.arange(LENGTH)[None] >= LENGTHS[:, None]] *= 100
        found.append(jnp.asarray(x, dtype))
    return found[0], found[1], found[2]


def reference(query: Any, key: Any, value: Any, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attended values [b, l, n, h] and probabilities [b, n, l, s], float64; visible [b, l, s]."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("blnh,bsnh->bnls", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(visible[:, None], logits, -np.inf)
    with np.errstate(invalid="ignore"):
        e = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = e / e.sum(-1, keepdims=True)
    return np.einsum("bnls,bsnh->blnh", probabilities, v), probabilities


def causal() -> np.ndarray:
    places = np.arange(LENGTH)
    return (places <= places[:, None])[None] & (places < LENGTHS[:, None, None])


def valid(x: Any) -> np.ndarray:
    """The tokens [.., n, h] that are not padding."""
    return np.asarray(x, np.float64)[np.arange(LENGTH)[None] < LENGTHS[:, None]]


@pytest.mark.parametrize("implementation", ["xla", "blockwise", "tiled"])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_attention_is_softmax(implementation: str, heads: tuple[int, int]) -> None:
    qkv = inputs(*heads)
    expected, _ = reference(*qkv, causal())
    out = attend(*qkv, jnp.asarray(LENGTHS), causal=True, implementation=implementation)
    np.testing.assert_allclose(valid(out), valid(expected), atol=2e-5, rtol=0)
    assert np.all(np.isfinite(out))


@pytest.mark.parametrize("implementation", IN_16_BIT)
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 5e-2), ("float16", 6e-3)])
def test_prefill_attention_takes_16_bit(implementation: str, dtype: str, tolerance: float) -> None:
    qkv = inputs(4, 2, dtype)
    run = jax.jit(partial(attend, causal=True, implementation=implementation))  # not every product compiles on a CPU
    out = run(*qkv, jnp.asarray(LENGTHS))
    assert out.dtype == dtype
    expected, _ = reference(*qkv, causal())
    np.testing.assert_allclose(valid(out), valid(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", ["xla", "tiled"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("queries", [1, LENGTH], ids=["decoding", "tower"])
def test_attention_that_is_not_causal_sees_all_that_is_valid(
    implementation: str, heads: tuple[int, int], queries: int
) -> None:
    query, key, value = inputs(*heads)
    visible = np.arange(LENGTH)[None, None] < LENGTHS[:, None, None]
    expected, _ = reference(query[:, :queries], key, value, visible)
    out = attend(query[:, :queries], key, value, jnp.asarray(LENGTHS), causal=False, implementation=implementation)
    np.testing.assert_allclose(out[0], expected[0], atol=2e-5, rtol=0)
    np.testing.assert_allclose(out[:, :1], expected[:, :1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_rows_are_rows_of_the_softmax(heads: tuple[int, int], platform: str) -> None:
    query, key, value = inputs(*heads)
    rows = np.array([[0, 13, 26], [3, 10, 9], [0, 0, 0]])
    _, expected = reference(query, key, value, causal())
    chosen = jnp.take_along_axis(query, rows[:, :, None, None], axis=1)
    with attention.target(platform):
        found = attention_rows(chosen, key, jnp.asarray(rows), jnp.asarray(LENGTHS))
    for b in range(len(LENGTHS)):
        np.testing.assert_allclose(found[b], expected[b][:, rows[b]], atol=1e-6, rtol=0)


def test_accelerators_get_the_keys_of_a_row_side_by_side() -> None:
    """A softmax over them is one kernel then."""
    query, key, _ = inputs(4, 2)
    rows = jnp.zeros((3, 5), jnp.int32)
    for platform, expected in (("cpu", (3, 2, 27, 5, 2)), ("cuda", (3, 2, 2, 5, 27)), ("tpu", (3, 2, 2, 5, 27))):
        with attention.target(platform):
            run = partial(attention_rows, query[:, :5], key, rows)  # a new one: traces are kept by function
            jaxpr = jax.make_jaxpr(run)(jnp.asarray(LENGTHS))
        (product,) = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        assert product.outvars[0].aval.shape == expected, platform


@pytest.mark.parametrize("platform, length, expected", [("cuda", 405, 408), ("cuda", 408, 408), ("cpu", 405, 405)])
def test_a_shortened_sequence_is_a_multiple_of_eight_long_on_nvidia(platform: str, length: int, expected: int) -> None:
    with attention.target(platform):
        assert attention.padded_length(length) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_rows_are_float32_whatever_the_dtype(dtype: str) -> None:
    query, key, value = inputs(4, 2, dtype)
    rows = jnp.broadcast_to(jnp.arange(LENGTH)[None], query.shape[:2])
    found = attention_rows(query, key, rows, jnp.asarray(LENGTHS))
    _, expected = reference(query, key, value, causal())
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=0)


def shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (value.aval.shape for value in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@pytest.mark.parametrize("implementation, squares", [("blockwise", False), ("tiled", False), ("xla", True)])
def test_only_the_written_out_one_is_length_by_length(implementation: str, squares: bool) -> None:
    run = partial(attend, causal=True, implementation=implementation)
    found = shapes(jax.make_jaxpr(run)(*inputs(4, 2), jnp.asarray(LENGTHS)).jaxpr)
    assert any(sum(size >= LENGTH for size in shape) > 1 for shape in found) == squares


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 255, 256, 257, 511, 513, 664, 1500, 3001, 4097, 6000])
def test_tiles_of_every_length_are_softmax(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Rows at borders of tiles, and some others, against float64; a short row beside the full one."""
    monkeypatch.setattr(attention, "ROWS", 168)
    random = np.random.default_rng(length)
    query, key, value = (random.normal(0, 1, (2, length, count, HEAD_DIM)).astype(np.float32) for count in (2, 1, 1))
    lengths = np.array([length, max(1, length // 3)], np.int32)
    given = (jnp.asarray(x) for x in (query, key, value, lengths))
    out = np.asarray(jax.jit(partial(attend, causal=True, implementation="tiled"))(*given))
    assert np.all(np.isfinite(out))
    for b, valid_tokens in enumerate(lengths):
        borders = np.arange(0, valid_tokens, 8)[:, None] + np.array([-1, 0])
        rows = np.unique(np.clip(np.append(borders[:: 1 + len(borders) // 40], valid_tokens - 1), 0, valid_tokens - 1))
        visible = (np.arange(length) <= rows[:, None])[None]
        one = slice(b, b + 1)
        expected, _ = reference(query[one, rows], key[one], value[one], visible)
        np.testing.assert_allclose(out[one, rows], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("length, blocks", [(1, 1), (168, 1), (169, 2), (664, 4), (2016, 8), (100_000, 8)])
def test_the_tiled_program_grows_up_to_eight_blocks(monkeypatch: pytest.MonkeyPatch, length: int, blocks: int) -> None:
    monkeypatch.setattr(attention, "ROWS", 168)
    x = jax.ShapeDtypeStruct((2, length, 4, HEAD_DIM), jnp.float32)
    run = partial(attend, causal=True, implementation="tiled")
    jaxpr = jax.make_jaxpr(run)(x, x, x, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert str(jaxpr).count("dot_general[") == 2 * blocks


def test_the_tiled_path_has_the_gradients_of_the_written_out_one() -> None:
    valid_tokens = jnp.asarray(np.arange(LENGTH)[None] < LENGTHS[:, None])[:, :, None, None]

    def loss(inputs: tuple[jax.Array, jax.Array, jax.Array], implementation: str) -> jax.Array:
        out = attend(*inputs, jnp.asarray(LENGTHS), causal=True, implementation=implementation)
        return jnp.sum(jnp.where(valid_tokens, out, 0.0) ** 2)

    found, expected = (jax.jit(jax.grad(partial(loss, implementation=name)))(inputs(4, 2)) for name in ("tiled", "xla"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-5), found, expected)


def test_large_logits_go_blockwise(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = (1, 64, 4, 16), (1, 64, 4, 16)
    with attention.target("tpu"):
        monkeypatch.setattr(attention, "LOGITS_LIMIT", 4 * 4 * 64 * 64)
        assert choose_implementation(query, key, jnp.dtype("float32"), causal=True) == "xla"
        monkeypatch.setattr(attention, "LOGITS_LIMIT", 4 * 4 * 64 * 64 - 1)
        assert choose_implementation(query, key, jnp.dtype("float32"), causal=True) == "blockwise"
        assert choose_implementation(query, key, jnp.dtype("float32"), causal=False) == "xla"


@pytest.mark.parametrize(
    "platform, dtype, causal, head_dim, expected",
    [
        ("cuda", "bfloat16", True, 128, "cudnn"),
        ("cuda", "float16", True, 64, "cudnn"),
        ("cuda", "float32", True, 128, "xla"),
        ("cuda", "bfloat16", True, 132, "xla"),
        ("cuda", "bfloat16", True, 256, "xla"),
        ("cuda", "bfloat16", False, 128, "xla"),
        ("tpu", "bfloat16", True, 128, "xla"),
        ("cpu", "bfloat16", True, 128, "tiled"),
        ("cpu", "float32", False, 64, "tiled"),
    ],
)
def test_the_platform_and_the_dtype_choose(
    monkeypatch: pytest.MonkeyPatch, platform: str, dtype: str, causal: bool, head_dim: int, expected: str
) -> None:
    shape = (1, 64, 4, head_dim)
    with attention.target(platform):
        assert choose_implementation(shape, shape, jnp.dtype(dtype), causal=causal) == expected
    monkeypatch.setattr(attention, "traced_for", lambda: platform)
    assert choose_implementation(shape, shape, jnp.dtype(dtype), causal=causal) == expected


def test_a_trace_is_taken_for_its_own_target() -> None:
    seen: list[str] = []

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        seen.append(attention.traced_for())
        return x

    for platform in ("tpu", "cuda", "tpu", "cuda"):
        with attention.target(platform):
            run(jnp.float32(1))
    assert seen == ["tpu", "cuda"]


def test_cudnn_is_asked_for_causal_attention_over_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on NVIDIA only. What it is asked for stands in a program that any machine can lower."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    run = jax.jit(partial(attend, causal=True, implementation="cudnn"))
    export = jax.export.export(
        run, platforms=["cuda"], disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")]
    )
    program = str(export(*inputs(4, 2, "bfloat16"), jnp.asarray(LENGTHS)).mlir_module())
    (call,) = (line for line in program.splitlines() if "custom_call" in line)
    assert "@__cudnn$fmhaSoftmax(%arg0, %arg1, %arg2, %arg3, %arg3)" in call  # lengths of queries and of keys
    asked = json.loads(call.split('"')[1].replace("\\22", '"'))["cudnn_fmha_backend_config"]
    assert asked["mask_type"] == "PADDING_CAUSAL"
    assert asked["fmha_scale"] == pytest.approx(HEAD_DIM**-0.5)
    assert (asked["dropout_rate"], asked["sliding_window_length"]) == (0.0, 0)


def test_auto_computes_what_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "choose_implementation", lambda *shapes, causal: "tiled" if causal else "xla")
    given = (*inputs(4, 2), jnp.asarray(LENGTHS))
    for causal, chosen in ((True, "tiled"), (False, "xla")):
        auto, named = (
            str(jax.make_jaxpr(partial(attend, causal=causal, implementation=name))(*given))
            for name in ("auto", chosen)
        )
        assert auto == named


@pytest.mark.parametrize("head_dim, theta", [(16, 10000.0), (128, 10000.0), (64, 500000.0)])
def test_rope_rotates_pairs_half_a_head_apart(head_dim: int, theta: float) -> None:
    positions = np.array([[0, 1, 2, 63, 640, 1999, 2000]])
    x = np.random.default_rng(0).normal(0, 1, (1, 7, 2, head_dim))
    angle = positions[0][:, None] * theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    turn = np.exp(1j * angle)[None, :, None]
    half = head_dim // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    found = apply_rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions)[..., None], plain_rope(head_dim, theta))
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
    np.testing.assert_allclose(found[:, :4], expected[:, :4], atol=2e-5, rtol=0)


def test_rope_depends_on_distance_only() -> None:
    random = np.random.default_rng(1)
    query, key = (jnp.asarray(random.normal(0, 1, (1, 1, 1, 32)), jnp.float32) for _ in range(2))

    def product(at: int, of: int) -> float:
        rotated = (apply_rope(x, jnp.asarray([[[p]]]), plain_rope(32, 10000.0)) for x, p in ((query, at), (key, of)))
        return float(jnp.vdot(*rotated))

    assert product(700, 650) == pytest.approx(product(50, 0), abs=1e-3)
    assert product(700, 650) != pytest.approx(product(51, 0), abs=1e-2)
