"""What text-guided pruning has to beat, on the same compiled path.

Axis letters: b batch, l sequence length, m images, v patches, d width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsevlm_jax.pruning.methods.base import Method, PruningContext, Scores
from sparsevlm_jax.pruning.settings import Budget, Sparsity


def score_at_random(layer: PruningContext, sparsity: Sparsity) -> Scores:
    """Random numbers, the same for every row: from the seed, the pruning layer and the token's number in its row."""
    if layer.seed is None:
        raise ValueError("random draws random numbers: give prefill a seed, or its settings one")
    key = jax.random.fold_in(jax.random.key(layer.seed), layer.stage.stop)
    numbers = jax.random.uniform(key, (layer.stage.visual,), jnp.float32)
    return Scores(numbers[jnp.minimum(layer.ordinals(), layer.stage.visual - 1)])


def score_evenly(layer: PruningContext, sparsity: Sparsity) -> Scores:
    """1 for tokens spread evenly over those that stand, in order, as many as are kept; 0 for the others."""
    count = jnp.maximum(jnp.sum(layer.tokens.visual, axis=1, keepdims=True), 1)
    ordinals, kept = layer.ordinals(), layer.kept[:, None]
    chosen = (ordinals + 1) * kept // count > ordinals * kept // count
    return Scores(chosen.astype(jnp.float32))


def score_by_last_token(layer: PruningContext, sparsity: Sparsity) -> Scores:
    """The last token's attention, mean over heads: in the layer that has just run (FastV) or the next (PyramidDrop)."""
    last = layer.tokens.lengths[:, None] - 1
    return Scores(jnp.mean(layer.attention(last), axis=(1, 2)))


def score_by_tower(layer: PruningContext, sparsity: Sparsity) -> Scores:
    """The vision tower's own attention, mean over heads, in the last layer that runs: its class token's, where it has
    one, else that of all patches."""
    assert layer.tokens.saliency is not None
    return Scores(layer.tokens.saliency)


def shrink_images(pixel_values: Float[Array, "m 3 _h _w"], size: int) -> Float[Array, "m 3 {size} {size}"]:
    """Smaller images, antialiased (bicubic)."""
    shape = (*pixel_values.shape[:2], size, size)
    return jax.image.resize(pixel_values, shape, "cubic", antialias=True)


def pool_patches(features: Float[Array, "m _v d"], grid: int) -> Float[Array, "m v d"]:
    """Averages a square of patches to `grid` × `grid`; a patch on a border counts in both cells, as far as it covers
    each in whole patches (adaptive average pooling)."""
    images, patches, width = features.shape
    side = round(patches**0.5)
    starts = jnp.arange(grid) * side // grid
    stops = -(-(jnp.arange(grid) + 1) * side // grid)
    at = jnp.arange(side)[None, :]
    inside = ((at >= starts[:, None]) & (at < stops[:, None])).astype(jnp.float32)
    weights = inside / jnp.sum(inside, axis=1, keepdims=True)
    square = features.astype(jnp.float32).reshape(images, side, side, width)
    pooled = jnp.einsum("yi,xj,mijd->myxd", weights, weights, square, precision=jax.lax.Precision.HIGHEST)
    return pooled.reshape(images, grid * grid, width).astype(features.dtype)


def _settings(method: str, *, positions: str = "keep", seed: int | None = None, **budget) -> Sparsity:  # noqa: ANN003
    return Sparsity(method, Budget(**budget), recycling=None, positions=positions, seed=seed)


RANDOM = Method(
    _settings("random", seed=0),
    score_at_random,
    "baseline; at SparseVLM's layers",
    summary="Random numbers, the same for every row: from seed, pruning layer and the token's number in its row",
)
UNIFORM = Method(
    _settings("uniform"),
    score_evenly,
    "baseline; at SparseVLM's layers",
    summary="1 for tokens spread evenly over those that stand, in order, as many as are kept; 0 for the others",
)
_LAST_TOKEN = (
    "The last token's attention, mean over heads: in the layer that has just run (FastV) or the next (PyramidDrop)"
)
FASTV = Method(
    _settings("fastv", layers=(1,), ratio=0.5),
    score_by_last_token,
    "FastV (ECCV 2024): half of the tokens after the second layer",
    summary=_LAST_TOKEN,
)
PYRAMIDDROP = Method(
    _settings("pyramiddrop", published_layers=(7, 15, 23), ratio=0.5, positions="renumber"),
    score_by_last_token,
    "PyramidDrop (CVPR 2025): half of what is left after each quarter of the layers, ranked by what the next sees",
    summary=_LAST_TOKEN,
    looks_ahead=True,
)
VISION = Method(
    _settings("vision", layers=(-1,)),
    score_by_tower,
    "class-token attention, as FasterVLM and VisionZip rank patches; before the first layer",
    summary="The vision tower's own attention, mean over heads, in its last layer that runs: of its class token or all",
    needs_saliency=True,
)
_SHRINKS: Any = {"budgets": ("keep",), "no_budget": "it shrinks images before the decoder, to `keep` tokens"}
POOL = Method(
    _settings("pool"),
    None,
    "baseline; average pooling of the projected patches",
    shrink_features=pool_patches,
    **_SHRINKS,
)
DOWNSAMPLE = Method(
    _settings("downsample"),
    None,
    "baseline; a smaller image, position embeddings interpolated",
    shrink_images=shrink_images,
    **_SHRINKS,
)
DENSE = Method(Sparsity.dense(), None, "LLaVA as it is", budgets=(), no_budget="it keeps everything")
