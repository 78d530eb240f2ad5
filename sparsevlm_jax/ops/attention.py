"""Attention of the decoder: one call behind one name, and the rows of it that pruning reads.

Axis letters: b batch, l query length, s key length, r chosen rows, n heads, k key-value heads,
g query heads per key-value head, h head dim.

Rows are packed: the tokens of a row stand together and padding only at its end. A causal flag and
one length per row are therefore the whole mask, which is what fused kernels take.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsevlm_jax.parallel.inside import by_head, sizes

IMPLEMENTATIONS = ("auto", "xla", "blockwise", "tiled", "cudnn")
BLOCK = 256  # query rows at a time in the blockwise path
ROWS = 224  # query rows at a time, about, in the tiled path
BLOCKS = 8  # of query rows, at most, in the tiled path
CACHED = 4 * 2**20  # bytes of float32 logits that the tiled path works on at a time, but for two heads' at least
UNSEEN = -1e30  # added to a logit: its weight is exactly 0
LOGITS_LIMIT = 2**30  # bytes of float32 logits [b, n, l, s] above which "auto" goes blockwise

_target: Any = jax.make_user_context(default_value=None)  # jax's caches know it: a trace is taken for its own target


def target(platform: str) -> AbstractContextManager[None]:
    """Within, "auto" chooses for a program that another platform will run: "cpu", "cuda", "rocm" or "tpu"."""
    return _target(platform)


def traced_for() -> str:
    """The platform that programs are traced for, the `target` or the default backend's: "cpu", "cuda", "rocm" or
    "tpu"."""
    if (named := _target.value) is not None:
        return named
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "cuda" if "cuda" in jax.devices()[0].client.platform_version.lower() else "rocm"


def on_one_cpu() -> bool:
    """Whether programs are traced for a CPU and no mesh: on one, loops over heads or blocks would cross its devices."""
    return traced_for() == "cpu" and sizes() is None


def exact(dtype: jnp.dtype) -> jax.lax.Precision:
    """Matmul precision that makes float32 mean float32 (no TF32 on GPU, no bfloat16 passes on TPU)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def attend(
    query: Float[Array, "b l n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    lengths: Int[Array, "b"],
    *,
    causal: bool,
    implementation: str,
) -> Float[Array, "b l n h"]:
    """Scaled dot-product attention over packed rows, softmax in float32.

    Args:
      query, key, value: in the model's dtype; n is a multiple of k (grouped-query attention).
      lengths: valid keys of each row; the others are not looked at.
      causal: True in the prefill, where l == s and token i sees tokens 0..i; False for one decoded token and in
        towers, where every query sees all valid keys.
      implementation: "cudnn" (NVIDIA, 16 bit), "xla", "blockwise" (XLA, `BLOCK` query rows at a time, never
        [l, s] logits; "xla" where not causal), "tiled" (XLA, for CPUs: as many heads and query rows at a time as fit
        a core's cache), or "auto", which chooses by backend, dtype and size (`choose_implementation`).

    Returns:
      The attended values; rows of padding are zeros or finite, never NaN.
    """
    here = partial(_attend_here, causal=causal, implementation=implementation)
    return by_head(here, query, key, value, lengths=lengths)


def _attend_here(
    query: Float[Array, "b l n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    lengths: Int[Array, "b"],
    causal: bool,
    implementation: str,
) -> Float[Array, "b l n h"]:
    """`attend` on the rows and heads of one device."""
    if implementation == "auto":
        implementation = choose_implementation(query.shape, key.shape, query.dtype, causal=causal)
    if implementation == "blockwise" and causal:
        return _attend_blockwise(query, key, value, lengths)
    if implementation == "tiled":
        with jax.named_scope("attend"):
            return _attend_tiled(query, key, value, lengths, causal)
    return _dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        query_seq_lengths=lengths if causal else None,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if implementation == "cudnn" else "xla",
    )


def choose_implementation(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype, *, causal: bool) -> str:
    """What "auto" means for these shapes on the default backend, or on the `target`.

    CPUs take "tiled" for everything (measured: benchmarks/attention.py). cuDNN's fused kernel takes a prefill in
    bfloat16 or float16 with a head dim that is a multiple of 8 up to 128. One decoded token reads the cache once
    whatever the kernel, so it stays with XLA, and so do towers. Any other prefill is written out, in blocks where its
    logits are large.
    """
    batch, length, heads, head_dim = query
    platform = traced_for()
    if platform == "cpu":
        return "tiled"
    fits_cudnn = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    if causal and fits_cudnn and platform == "cuda":
        return "cudnn"
    logits_bytes = 4 * batch * heads * length * key[1]
    return "blockwise" if causal and logits_bytes > LOGITS_LIMIT else "xla"


def padded_length(length: int) -> int:
    """How long a shortened sequence of so many tokens is made on the default backend, or the `target`.

    On NVIDIA a multiple of 8: cuBLAS wants that of both sides of a product in 16 bit, and XLA would copy hidden states
    and results to such a length and back around each product. The rows' own lengths mask what stands behind them.
    """
    return 8 * -(-length // 8) if traced_for() == "cuda" else length


def attention_rows(
    query: Float[Array, "b r n h"],
    key: Float[Array, "b s k h"],
    rows: Int[Array, "b r"],
    lengths: Int[Array, "b"],
) -> Float[Array, "b n r s"]:
    """Causal attention probabilities of chosen query rows only, in float32 with their own softmax.

    Args:
      query: rotated queries of the chosen rows.
      key: rotated keys of all tokens.
      rows: index of each chosen row in its packed sequence; row i sees keys 0..i.
      lengths: valid keys of each row of the batch.

    Returns:
      Probabilities over all s keys: what `softmax(q kᵀ / sqrt(h) + causal mask)` holds in these rows.
    """
    batch, count, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    grouped, axes = query.reshape(batch, count, key.shape[2], groups, head_dim), "brkgh"
    if traced_for() != "cpu":
        # Rows behind heads, or the product has its keys outside, where a GPU's softmax takes several kernels.
        grouped, axes = jnp.transpose(grouped, (0, 2, 3, 1, 4)), "bkgrh"
    logits = jnp.einsum(
        f"{axes},bskh->bkgrs", grouped, key, precision=exact(query.dtype), preferred_element_type=jnp.float32
    )
    keys = jnp.arange(key.shape[1])[None, None, :]
    seen = (keys <= rows[:, :, None]) & (keys < lengths[:, None, None])
    logits = jnp.where(seen[:, None, None], logits / math.sqrt(head_dim), -jnp.inf)
    return jax.nn.softmax(logits, axis=-1).reshape(batch, heads, count, key.shape[1])


def _attend_blockwise(
    query: Float[Array, "b l n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    lengths: Int[Array, "b"],
) -> Float[Array, "b l n h"]:
    batch, length, heads, head_dim = query.shape
    blocks = -(-length // BLOCK)
    padded = jnp.pad(query, ((0, 0), (0, blocks * BLOCK - length), (0, 0), (0, 0)))
    by_block = jnp.moveaxis(padded.reshape(batch, blocks, BLOCK, heads, head_dim), 1, 0)

    def attend_block(args: tuple[Array, Array]) -> Array:
        block, start = args
        rows = start + jnp.arange(BLOCK)
        causal: Bool[Array, "1 1 q s"] = (jnp.arange(key.shape[1])[None, :] <= rows[:, None])[None, None]
        return _dot_product_attention(
            block, key, value, mask=causal, key_value_seq_lengths=lengths, implementation="xla"
        )

    out = jax.lax.map(attend_block, (by_block, BLOCK * jnp.arange(blocks)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, blocks * BLOCK, heads, head_dim)[:, :length]


def _attend_tiled(
    query: Float[Array, "b l n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    lengths: Int[Array, "b"],
    causal: bool,
) -> Float[Array, "b l n h"]:
    """A few heads and query rows at a time, so that their logits stay in a core's cache; in float32.

    Three things make XLA's CPU compiler fast here: heads stand before tokens in every product, they are put there a
    few at a time, and the mask is added, so that products and softmax become one kernel. Causal rows see no key
    behind their block; rows are packed, so that a valid one sees no padding either. The program grows with the number
    of blocks, which is at most `BLOCKS`.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    rows = rows_at_a_time(length) if causal else length
    prompts, together = heads_at_a_time(batch, kv_heads, bytes_each=4 * groups * rows * key.shape[1])

    def by_head(x: Array, prompt: Array, head: Array, count: int) -> Array:
        part = jax.lax.dynamic_slice(x, (prompt, 0, head, 0), (prompts, x.shape[1], count, head_dim))
        return jnp.swapaxes(part.astype(jnp.float32), 1, 2).reshape(prompts * together, -1, x.shape[1], head_dim)

    def attend_turn(turn: Array, out: Array) -> Array:
        prompt, head = turn // (kv_heads // together) * prompts, turn % (kv_heads // together) * together
        queries = by_head(query, prompt, head * groups, together * groups) * jnp.float32(1 / math.sqrt(head_dim))
        # Apart, or every product would transpose its operands again.
        queries, keys, values = jax.lax.optimization_barrier(
            (queries, by_head(key, prompt, head, together), by_head(value, prompt, head, together))
        )
        valid = jnp.repeat(jax.lax.dynamic_slice(lengths, (prompt,), (prompts,)), together)

        def attend_rows(start: int, stop: int) -> Array:
            seen = stop if causal else keys.shape[2]
            places = jnp.arange(seen)[None, :]
            if causal:
                visible = (places <= jnp.arange(start, stop)[:, None])[None, None]
            else:
                visible = (places < valid[:, None])[:, None, None]
            logits = product("kgqh,kth->kgqt", queries[:, :, start:stop], keys[:, 0, :seen])
            logits = logits + jnp.where(visible, jnp.float32(0), jnp.float32(UNSEEN))
            weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
            attended = product("kgqt,kth->kgqh", weights, values[:, 0, :seen])
            return attended / jnp.sum(weights, axis=-1, keepdims=True)

        starts = range(0, length, rows)
        attended = jnp.concatenate([attend_rows(start, min(start + rows, length)) for start in starts], axis=2)
        attended = attended.reshape(prompts, together * groups, length, head_dim).astype(query.dtype)
        return jax.lax.dynamic_update_slice(out, jnp.swapaxes(attended, 1, 2), (prompt, 0, head * groups, 0))

    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    turns = batch * kv_heads // (prompts * together)
    return jax.lax.fori_loop(0, turns, attend_turn, jnp.zeros_like(query))


def rows_at_a_time(length: int) -> int:
    """About `ROWS`, more where there would be over `BLOCKS` blocks; a multiple of 8."""
    blocks = min(-(-length // ROWS), BLOCKS)
    return 8 * -(-length // (8 * blocks))


def heads_at_a_time(prompts: int, heads: int, bytes_each: int) -> tuple[int, int]:
    """Rows of the batch, and heads: divisors, as many as have logits of at most `CACHED` bytes; two heads at least, as
    one is hardly shared by two cores."""
    together = _largest_divisor(heads, max(2, CACHED // bytes_each))
    return (_largest_divisor(prompts, CACHED // (bytes_each * heads)) if together == heads else 1), together


def _largest_divisor(number: int, limit: int) -> int:
    """At most `limit`; 1 if there is none."""
    return max(n for n in range(1, number + 1) if number % n == 0 and (n == 1 or n <= limit))


def _dot_product_attention(query: Array, key: Array, value: Array, **options) -> Array:
    # jax's own attention mixes dtypes and ranks inside, which strict promotion would refuse.
    dtype = query.dtype
    if dtype == jnp.float16 and options["implementation"] == "xla" and traced_for() != "cuda":
        # jax's XLA path asks for a float16 product that CPU and TPU do not have: compilation would fail.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    precision = "highest" if query.dtype == jnp.float32 else None
    with (
        jax.named_scope("attend"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision(precision),
    ):
        return jax.nn.dot_product_attention(query, key, value, **options).astype(dtype)
