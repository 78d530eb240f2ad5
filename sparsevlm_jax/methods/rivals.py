"""What text-guided pruning has to beat, on the same compiled path.

Axis letters: b batch, l sequence length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparsevlm_jax.methods.base import Layer, Method, Scores
from sparsevlm_jax.schedule import Sparsity


def score_at_random(layer: Layer, sparsity: Sparsity) -> Scores:
    """Random numbers, the same for every row: from the seed, the pruning layer and the token's number in its row."""
    if layer.seed is None:
        raise ValueError("random draws random numbers: give prefill a seed, or its settings one")
    key = jax.random.fold_in(jax.random.key(layer.seed), layer.stage.stop)
    numbers = jax.random.uniform(key, (layer.stage.visual,), jnp.float32)
    return Scores(numbers[jnp.minimum(layer.ordinals(), layer.stage.visual - 1)])


def score_evenly(layer: Layer, sparsity: Sparsity) -> Scores:
    """1 for tokens spread evenly over those that stand, in order, as many as are kept; 0 for the others."""
    count = jnp.maximum(jnp.sum(layer.tokens.visual, axis=1, keepdims=True), 1)
    ordinals, kept = layer.ordinals(), layer.kept[:, None]
    chosen = (ordinals + 1) * kept // count > ordinals * kept // count
    return Scores(chosen.astype(jnp.float32))


def score_by_last_token(layer: Layer, sparsity: Sparsity) -> Scores:
    """The last token's attention, mean over heads: in the layer that has just run (FastV) or the next (PyramidDrop)."""
    last = layer.tokens.lengths[:, None] - 1
    return Scores(jnp.mean(layer.attention(last), axis=(1, 2)))


def score_by_tower(layer: Layer, sparsity: Sparsity) -> Scores:
    """The vision tower's own attention: its class token's, mean over heads, in the last layer that runs."""
    assert layer.tokens.saliency is not None
    return Scores(layer.tokens.saliency)


def _settings(method: str, *, positions: str = "keep", **settings) -> Sparsity:  # noqa: ANN003
    return Sparsity(method=method, recycle=False, positions=positions, **settings)


RANDOM = Method(_settings("random", seed=0), score_at_random, "baseline; at SparseVLM's layers")
UNIFORM = Method(_settings("uniform"), score_evenly, "baseline; at SparseVLM's layers")
FASTV = Method(
    _settings("fastv", layers=(1,), ratio=0.5),
    score_by_last_token,
    "FastV (ECCV 2024): half of the tokens after the second layer",
)
PYRAMIDDROP = Method(
    _settings("pyramiddrop", published_layers=(7, 15, 23), ratio=0.5, positions="renumber"),
    score_by_last_token,
    "PyramidDrop (CVPR 2025): half of what is left after each quarter of the layers, ranked by what the next sees",
    looks_ahead=True,
)
VISION = Method(
    _settings("vision", layers=(-1,)),
    score_by_tower,
    "class-token attention, as FasterVLM and VisionZip rank patches; before the first layer",
    needs_saliency=True,
)
POOL = Method(_settings("pool"), None, "baseline; average pooling of the projected patches")
DOWNSAMPLE = Method(_settings("downsample"), None, "baseline; a smaller picture, position embeddings interpolated")
DENSE = Method(Sparsity.dense(), None, "LLaVA as it is")
