"""The retention study's runs: every variant on the same held-out questions.

Axis letters: n questions, m images, l sequence length, v visual tokens, d width, s pixels along an edge.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import sparsevlm_jax as sv
from benchmarks.retention.variants import Variant
from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.inputs.packing import shrink_markers
from sparsevlm_jax.models.embedding import encode_images
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.stages import ImageFeatures, Params
from sparsevlm_jax.pruning.plan import Plan
from sparsevlm_jax.pruning.settings import Sparsity
from training.batches import LONGEST, normalise
from training.heldout import HeldOut, prompts
from training.objective import PREFIX_WORDS
from training.words import ID

BATCH = 36  # questions at a time
PARTS = 4  # in which images are encoded
OTHER = 100  # the other question is that many questions away, so about another image
GIVEN = "vision"  # the method that ranks by `Prompt.saliency`, which is how a choice is handed over


class Outcome(NamedTuple):
    """What became of the questions under a variant.

    Attributes:
      right: bool [n].
      logits: of the answers' first tokens, float32 [n, vocab].
      kept: bool [n, v], where there was a cut by scores; else None.
      entering: visual tokens entering a layer, mean over layers and questions.
    """

    right: np.ndarray
    logits: np.ndarray
    kept: np.ndarray | None
    entering: float


class Questions(NamedTuple):
    """Questions with their truth, as a model of `training` gets them.

    Attributes:
      pixels: float32 [m, 3, s, s], the images.
      image_of: int [n], which of them each question shows.
      ids, lengths: int32 [n, l] and [n], the prompts.
      answers: int [n], ids of the true answers.
      masks: bool [n, v], the patches that each answer depends on.
    """

    pixels: np.ndarray
    image_of: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    masks: np.ndarray


def held_out_questions(data: HeldOut, config: ModelConfig) -> Questions:
    """Those about scenes."""
    ids, lengths = prompts([question.text for question in data.questions], config, ID, LONGEST)
    return Questions(
        pixels=np.stack([normalise(scene.pixels) for scene in data.scenes]),
        image_of=data.scene_of,
        ids=ids,
        lengths=lengths,
        answers=np.asarray([ID[question.answer] for question in data.questions]),
        masks=np.stack([question.mask for question in data.questions]),
    )


class Study:
    """A model and its questions, with what all variants share computed once."""

    def __init__(self, model: Model, data: Questions) -> None:
        self.params, self.config, self.data = model.params, model.config, data
        self.dense_images = self._encode(sv.make_plan(sv.Sparsity.dense(), self.config, self.config.tokens_per_image))

    def run(self, variant: Variant) -> Outcome:
        """Answers all questions."""
        sparsity, saliency = variant.sparsity, None
        if variant.guide == "other":
            saliency = self._choice_under_another_question(sparsity)
        elif variant.guide == "truth":
            saliency = self.data.masks
        if saliency is not None:
            sparsity = sv.sparsity(GIVEN, keep_at=sparsity.budget.keep_at)
        return self._answer(sparsity, self.data.ids, self.data.lengths, saliency)

    def _choice_under_another_question(self, sparsity: Sparsity) -> np.ndarray:
        """What the method keeps of each image when it is asked something that was meant for another."""
        other = np.roll(np.arange(len(self.data.lengths)), OTHER)
        kept = self._answer(sparsity, self.data.ids[other], self.data.lengths[other], None).kept
        assert kept is not None
        return kept

    def _answer(self, sparsity: Sparsity, ids: np.ndarray, lengths: np.ndarray, saliency: np.ndarray | None) -> Outcome:
        visual = self.config.tokens_per_image
        plan = sv.make_plan(sparsity, self.config, visual, ids.shape[1] - visual)
        images = self.dense_images
        if plan.grid is not None:
            markers = self.config.image_token_id, self.config.tokens_per_image
            images = self._encode(plan)
            ids = np.stack([shrink_markers(row, *markers, plan.grid**2) for row in ids])
            lengths = lengths - self.config.tokens_per_image + plan.grid**2
        logits, kept, entering = [], [], []
        for start in range(0, len(lengths), BATCH):
            rows = np.minimum(np.arange(start, start + BATCH), len(lengths) - 1)  # the last batch is filled up
            tokens, looked_at = (leaf[self.data.image_of[rows]] for leaf in images)
            if saliency is not None:
                looked_at = saliency[rows].astype(np.float32)
            seen = ImageFeatures(jnp.asarray(tokens.reshape(-1, tokens.shape[-1])), jnp.asarray(looked_at.reshape(-1)))
            found, chosen, visual = _answer_batch(self.params, ids[rows], lengths[rows], seen, self.config, plan)
            real = len(set(rows.tolist()))
            logits.append(np.asarray(found)[:real])
            kept += [] if chosen is None else [np.asarray(chosen)[:real]]
            entering += [plan.entering_tokens(row) for row in np.asarray(visual).T.tolist()[:real]]
        said = np.concatenate(logits)
        right = said.argmax(axis=-1) == self.data.answers
        return Outcome(right, said, np.concatenate(kept) if kept else None, float(np.mean(entering)))

    def _encode(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Visual tokens [m, v, d] of all images, and how much the tower looks at each [m, v]."""
        encode = jax.jit(encode_images, static_argnums=(2, 3))
        parts = [encode(self.params, part, self.config, plan) for part in np.array_split(self.data.pixels, PARTS)]
        tokens, looked_at = (np.concatenate([part[i] for part in parts]) for i in range(2))
        images = len(self.data.pixels)
        return tokens.reshape(images, -1, tokens.shape[-1]), looked_at.reshape(images, -1)


@partial(jax.jit, static_argnames=("config", "plan"))
def _answer_batch(
    params: Params,
    ids: Int[Array, "n l"],
    lengths: Int[Array, "n"],
    images: ImageFeatures,
    config: LlavaConfig,
    plan: Plan,
) -> tuple[Float[Array, "n vocab"], Bool[Array, "n v"] | None, Int[Array, "stages n"]]:
    """Logits of each answer's first token, what the first cut kept, and visual tokens that entered each stage."""
    prompt = sv.embed(params, ids, lengths, images, config)
    logits, cache, trace = sv.prefill(params, prompt, config, plan, trace=True, max_new_tokens=0)
    assert trace is not None
    text = lengths - jnp.sum(prompt.visual, axis=1)
    kept = None
    if trace.events:
        first = len(PREFIX_WORDS)
        kept = trace.events[0].selection.kept[:, first : first + plan.visual_tokens]
    return logits, kept, cache.lengths - text[None, :]
