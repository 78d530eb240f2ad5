"""Attention of the decoder: one call behind one name, and the rows of it that pruning reads.

Axis letters: b batch, l query length, s key length, r chosen rows, n heads, k key-value heads,
g query heads per key-value head, h head dim.

Rows are packed: the tokens of a row stand together and padding only at its end. A causal flag and
one length per row are therefore the whole mask, which is what fused kernels take.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("auto", "xla", "blockwise", "tiled", "cudnn")
BLOCK = 256  # query rows at a time in the blockwise path
TILE = 256  # queries and keys at a time, at most, in the tiled path
LOGITS_LIMIT = 2**30  # bytes of float32 logits [b, n, l, s] above which "auto" goes blockwise


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
      causal: True in the prefill, where l == s and token i sees tokens 0..i; False for one decoded token.
      implementation: "cudnn" (NVIDIA, 16 bit), "xla", "blockwise" (XLA, `BLOCK` query rows at a time, never
        [l, s] logits), "tiled" (XLA, a head and `TILE` queries and keys at a time, which fit a core's cache), or
        "auto", which chooses by backend, dtype and size (`choose_implementation`). One decoded token knows no
        blocks and no tiles.

    Returns:
      The attended values; rows of padding are zeros or finite, never NaN.
    """
    if implementation == "auto":
        implementation = choose_implementation(query.shape, key.shape, query.dtype)
    if implementation == "blockwise" and causal:
        return _attend_blockwise(query, key, value, lengths)
    if implementation == "tiled" and causal:
        with jax.named_scope("attend"):
            return _attend_tiled(query, key, value, lengths)
    return _dot_product_attention(
        query,
        key,
        value,
        is_causal=causal,
        query_seq_lengths=lengths if causal else None,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if implementation == "cudnn" else "xla",
    )


def choose_implementation(query: tuple[int, ...], key: tuple[int, ...], dtype: jnp.dtype) -> str:
    """What "auto" means for these shapes on the default backend.

    cuDNN's fused kernel takes a prefill in bfloat16 or float16 with a head dim that is a multiple of 8 up to 128.
    One decoded token reads the cache once whatever the kernel, so it stays with XLA. Any other prefill is written
    out, in blocks where its logits are large. "tiled" is asked for by name: it is as fast as PyTorch's on one thread,
    on two it has not been measured on a quiet machine (benchmarks/attention.py).
    """
    batch, length, heads, head_dim = query
    fits_cudnn = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    if length > 1 and fits_cudnn and _default_backend_is_nvidia():
        return "cudnn"
    logits_bytes = 4 * batch * heads * length * key[1]
    return "blockwise" if logits_bytes > LOGITS_LIMIT else "xla"


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
    grouped = query.reshape(batch, count, key.shape[2], groups, head_dim)
    logits = jnp.einsum(
        "brkgh,bskh->bkgrs", grouped, key, precision=exact(query.dtype), preferred_element_type=jnp.float32
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


@jax.custom_vjp
def _attend_tiled(
    query: Float[Array, "b l n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    lengths: Int[Array, "b"],
) -> Float[Array, "b l n h"]:
    """Causal attention with a running softmax (FlashAttention's), a key-value head at a time, in float32.

    Loops all the way: the program has two products for the tiles on the diagonal and two for those below it, whatever
    the length. Tiles behind a row's length attend within themselves only. Gradients are those of the "xla" path:
    a loop whose turns are counted while it runs has none of its own.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    tile = 16 * -(-length // (16 * -(-length // TILE)))  # as many as needed, equally full, whole vectors wide
    tiles = -(-length // tile)
    precision = exact(jnp.dtype(jnp.float32))

    def by_tile(x: Array, groups: int) -> Array:
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, tiles * tile - length), (0, 0), (0, 0)))
        x = x.reshape(batch, tiles, tile, kv_heads, groups, head_dim)
        return jnp.transpose(x, (0, 3, 1, 4, 2, 5)).reshape(batch * kv_heads, tiles, groups * tile, head_dim)

    scaled = query.astype(jnp.float32) * jnp.float32(1 / math.sqrt(head_dim))
    # Apart, or the loops would read what is transposed for each of their products.
    by_head = jax.lax.optimization_barrier((by_tile(scaled, groups), by_tile(key, 1), by_tile(value, 1)))
    places = jnp.arange(tile)
    seen: Bool[Array, "gq t"] = jnp.tile(places[None, :] <= places[:, None], (groups, 1))

    def attend_head(of_head: tuple[Array, Array, Array, Array]) -> Array:
        queries, keys, values, valid = of_head

        def attend_tile(i: Array) -> Array:
            def see(j: Array, state: tuple[Array, Array, Array], diagonal: bool = False) -> tuple[Array, Array, Array]:
                most, total, attended = state
                logits = jnp.einsum("qh,th->qt", queries[i], keys[j], precision=precision)
                if diagonal:
                    logits = jnp.where(seen, logits, -jnp.inf)
                # The barriers keep XLA from computing the exponentials once for the sum and again for the product.
                new = jax.lax.optimization_barrier(jnp.maximum(most, jnp.max(logits, axis=1, keepdims=True)))
                weights = jax.lax.optimization_barrier(jnp.exp(logits - new))
                fade = jnp.exp(most - new)
                total = total * fade + jnp.sum(weights, axis=1, keepdims=True)
                return new, total, attended * fade + jnp.einsum("qt,th->qh", weights, values[j], precision=precision)

            rows = (groups * tile, 1)
            state = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((groups * tile, head_dim))
            if tiles > 1:
                state = jax.lax.fori_loop(0, jnp.where(i * tile < valid, i, 0), see, state)
            _, total, attended = see(i, state, diagonal=True)
            return attended / total

        return jax.lax.map(attend_tile, jnp.arange(tiles))

    out = jax.lax.map(attend_head, (*by_head, jnp.repeat(lengths, kv_heads)))
    out = out.reshape(batch, kv_heads, tiles, groups, tile, head_dim)
    out = jnp.transpose(out, (0, 2, 4, 1, 3, 5)).reshape(batch, tiles * tile, heads, head_dim)
    return out[:, :length].astype(query.dtype)


def _attend_tiled_forward(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _attend_tiled(*arguments), arguments


def _attend_tiled_backward(arguments: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    *inputs, lengths = arguments
    written_out = partial(attend, lengths=lengths, causal=True, implementation="xla")
    return (*jax.vjp(written_out, *inputs)[1](gradient), None)


_attend_tiled.defvjp(_attend_tiled_forward, _attend_tiled_backward)


def _dot_product_attention(query: Array, key: Array, value: Array, **options) -> Array:
    # jax's own attention mixes dtypes and ranks inside, which strict promotion would refuse.
    dtype = query.dtype
    if dtype == jnp.float16 and options["implementation"] == "xla" and not _default_backend_is_nvidia():
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


def _default_backend_is_nvidia() -> bool:
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version.lower()
