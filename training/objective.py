"""What is minimised: word-patch alignment, and answers to questions packed behind their scene.

Axis letters: m scenes, q questions of a scene, t ids of a question, p prefix (two words and the v visual tokens),
n heads, h head dim, d width, w words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from sparsevlm_jax.models.llava import Llava, LlavaConfig
from sparsevlm_jax.models.stages import Params
from sparsevlm_jax.ops.rope import rotation
from training.batches import Batch
from training.words import BEGIN, END, ID

PREFIX_WORDS = (BEGIN, ID["user:"])  # in front of the image
RARE = 4.0  # weight of a word that holds for a patch against one that does not: few do
MASKED = -1e30  # a finite stand-in for -inf, whose gradients are numbers
# A word is said of a patch where sigmoid(SHARPNESS · (cosine - threshold)) says so.
SHARPNESS = 30.0
THRESHOLD = 0.3  # three words hold for a digit's patch: 0.58 to each can be had
SCENE_THRESHOLD = 0.1  # up to 25 hold for a scene: 0.2


class Losses(NamedTuple):
    """Means over a batch."""

    alignment: Float[Array, ""]
    presence: Float[Array, ""]
    recognition: Float[Array, ""]  # share of patches with one of the `told` words whose best of these is the right one
    answer: Float[Array, ""]
    accuracy: Float[Array, ""]
    blind_accuracy: Float[Array, ""]  # where only the question's words see the scene


def losses(params: Params, config: LlavaConfig, batch: Batch, told: Sequence[int], *, with_questions: bool) -> Losses:
    """Losses of a batch.

    Args:
      told: ids of words of which at most one holds for a patch, and by which recognition is counted.

    alignment: binary cross-entropy of the cosines of projected patches and word embeddings, over all patches and
    words. It stands in for CLIP's pretraining and LLaVA's first stage. presence: the same for the projected class
    token and the whole scene, which gives the class token something to look for, as CLIP's objective does.
    answer: cross-entropy of the answer and the end token; 0 without questions.
    """
    model = Llava(config)
    return model.apply({"params": params}, batch, told, with_questions, method=_losses)  # pyright: ignore[reportReturnType]


def _losses(model: Llava, batch: Batch, told: Sequence[int], with_questions: bool) -> Losses:
    features, _ = model.vision_tower(batch.pixels)
    projected = model.multi_modal_projector(features)
    cosines = _cosines(projected, model.language_model.embed_tokens.embedding)
    alignment = _weighted(SHARPNESS * (cosines[:, 1:] - THRESHOLD), batch.words)
    presence = _weighted(SHARPNESS * (cosines[:, :1] - SCENE_THRESHOLD), batch.present[:, None])
    recognition = _recognition(cosines[:, 1:], batch.words, jnp.asarray(told))
    if not with_questions:
        zero = jnp.zeros(())
        return Losses(alignment, presence, recognition, zero, zero, zero)
    logits = answer_logits(model, projected[:, 1:], batch.questions, batch.ends, batch.blind, batch.kept)
    answers = jnp.take_along_axis(batch.questions, batch.ends[:, :, None] + 1, axis=2)
    targets = jnp.concatenate([answers, jnp.full_like(answers, END)], axis=2)
    answer = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = (jnp.argmax(logits[:, :, 0], axis=-1) == answers[:, :, 0]).astype(jnp.float32)
    return Losses(
        alignment=alignment,
        presence=presence,
        recognition=recognition,
        answer=jnp.mean(answer),
        accuracy=jnp.mean(right),
        blind_accuracy=jnp.mean(right, where=batch.blind),
    )


def answer_logits(
    model: Llava,
    visual: Float[Array, "m v d"],
    questions: Int[Array, "m q t"],
    ends: Int[Array, "m q"],
    blind: Bool[Array, "m q"],
    kept: Bool[Array, "m layers v"] | None = None,
) -> Float[Array, "m q 2 w"]:
    """Logits behind "assistant:" and behind the answer, for all questions of a scene in one pass.

    Each question stands at the positions it would have alone behind the image and sees the prefix and itself, so the
    image's tokens are computed once for all of them. What is not `kept` is not there in that layer, and what follows
    moves up, as where pruning renumbers.
    """
    decoder, (scenes, count, length) = model.language_model, questions.shape
    words = jnp.broadcast_to(jnp.asarray(PREFIX_WORDS)[None], (scenes, len(PREFIX_WORDS)))
    asked = decoder.embed_tokens(questions).reshape(scenes, count * length, -1)
    hidden = jnp.concatenate([decoder.embed_tokens(words), visual, asked], axis=1)
    prefix = hidden.shape[1] - asked.shape[1]
    places = jnp.concatenate([jnp.arange(prefix), prefix + jnp.tile(jnp.arange(length), count)])
    positions = jnp.broadcast_to(places[None], hidden.shape[:2])
    answering = jnp.arange(length)[None, None, :] >= ends[:, :, None]
    sees_scene = ~(answering & blind[:, :, None])

    for number, layer in enumerate(decoder.layers):
        there = None if kept is None else kept[:, number]

        def attend_packed(query: Array, key: Array, value: Array, there: Array | None = there) -> tuple[Array, None]:
            return _attend_packed(query, key, value, prefix, sees_scene, there), None

        own = positions if there is None else renumbered(positions, there)
        hidden, _ = layer(hidden, rotation(own[..., None], decoder.config.rope), attend_packed)
    asked = hidden[:, prefix:].reshape(scenes, count, length, -1)
    last = ends[:, :, None] + jnp.arange(2)[None, None, :]
    return decoder.logits(jnp.take_along_axis(asked, last[..., None], axis=2))


def renumbered(positions: Int[Array, "m l"], kept: Bool[Array, "m v"]) -> Int[Array, "m l"]:
    """Positions without those of the visual tokens that are gone; a token that is gone has any."""
    gone = jnp.cumsum(~kept, axis=1, dtype=jnp.int32)
    behind = positions.shape[1] - len(PREFIX_WORDS) - kept.shape[1]
    before = jnp.pad(gone, ((0, 0), (len(PREFIX_WORDS), 0)))
    return positions - jnp.pad(before, ((0, 0), (0, behind)), mode="edge")


def _attend_packed(
    query: Float[Array, "m l n h"],
    key: Float[Array, "m l n h"],
    value: Float[Array, "m l n h"],
    prefix: int,
    sees_scene: Bool[Array, "m q t"],
    kept: Bool[Array, "m v"] | None,
) -> Float[Array, "m l n h"]:
    """Causal attention of the prefix, and of every question over the prefix and itself under one softmax.

    Visual tokens that are not kept are not looked at.

    The two parts of a question's softmax are never put side by side: on CPUs that costs more than the products.
    """
    scenes, count, length = sees_scene.shape
    query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    heads, prefix_key, prefix_value = query.shape[1], key[:, :, :prefix], value[:, :, :prefix]
    own = (scenes, heads, count, length)
    own_query, own_key, own_value = (x[:, :, prefix:].reshape(*own, -1) for x in (query, key, value))

    causal = jnp.tril(jnp.ones((prefix, prefix), bool))[None, None]
    if kept is not None:
        kept = jnp.pad(kept, ((0, 0), (len(PREFIX_WORDS), 0)), constant_values=True)[:, None, None]
        causal = causal & kept
    within = jnp.einsum("mnph,mnsh->mnps", query[:, :, :prefix], prefix_key)
    within = jax.nn.softmax(jnp.where(causal, within, MASKED), axis=-1)
    first = jnp.einsum("mnps,mnsh->mnph", within, prefix_value)

    is_scene = (jnp.arange(prefix) >= len(PREFIX_WORDS))[None, None, None]
    visible = sees_scene.reshape(scenes, 1, count * length, 1) | ~is_scene
    if kept is not None:
        visible = visible & kept
    to_prefix = jnp.einsum("mnlh,mnph->mnlp", query[:, :, prefix:], prefix_key)
    to_prefix = jnp.where(visible, to_prefix, MASKED)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None, None]
    to_own = jnp.where(causal, jnp.einsum("mnqth,mnqsh->mnqts", own_query, own_key), MASKED)
    most = jnp.maximum(jnp.max(to_prefix, axis=-1), jnp.max(to_own, axis=-1).reshape(to_prefix.shape[:-1]))
    most = jax.lax.stop_gradient(most)
    to_prefix, to_own = jnp.exp(to_prefix - most[..., None]), jnp.exp(to_own - most.reshape(own)[..., None])
    total = jnp.sum(to_prefix, axis=-1) + jnp.sum(to_own, axis=-1).reshape(most.shape)
    rest = jnp.einsum("mnqts,mnqsh->mnqth", to_own, own_value).reshape(scenes, heads, count * length, -1)
    rest = (rest + jnp.einsum("mnlp,mnph->mnlh", to_prefix, prefix_value)) / total[..., None]
    return jnp.concatenate([first, rest], axis=2).swapaxes(1, 2)


def _cosines(projected: Float[Array, "m v d"], table: Float[Array, "w d"]) -> Float[Array, "m v w"]:
    def unit(vectors: Array) -> Array:
        return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + 1e-6)

    return jnp.einsum("mvd,wd->mvw", unit(projected), unit(table))


def _weighted(scores: Float[Array, "m v w"], holds: Bool[Array, "m v w"]) -> Float[Array, ""]:
    """Binary cross-entropy, summed over words, those that hold weighted up."""
    entropy = optax.sigmoid_binary_cross_entropy(scores, jnp.asarray(holds, jnp.float32))
    return jnp.mean(jnp.sum(jnp.where(holds, RARE, 1.0) * entropy, axis=-1))


def _recognition(scores: Float[Array, "m v w"], holds: Bool[Array, "m v w"], told: Int[Array, "k"]) -> Float[Array, ""]:
    scores, holds = scores[..., told], holds[..., told]
    best = jnp.take_along_axis(holds, jnp.argmax(scores, axis=-1, keepdims=True), axis=-1)[..., 0]
    return jnp.mean(best.astype(jnp.float32), where=jnp.any(holds, axis=-1))
