"""One answer, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.generation.request import Generation
from sparsevlm_jax.inputs.processor import Processor
from sparsevlm_jax.pruning.budgets import paper_flops
from sparsevlm_jax.pruning.plan import Plan


@dataclass(frozen=True)
class Answer:
    """An answer to one question; printed, it is its text.

    Attributes:
      text: what the model said.
      tokens: the same as ids, the end token left out.
      visual_tokens: those that entered each stage of the plan.
      prompt_tokens: all tokens of the prompt, visual ones included.
      plan: the schedule that it was computed by.
      flops, dense_flops: multiply-adds of its prefill in the decoder by the paper's formula, and without pruning.
      compile_seconds, prefill_seconds, decode_seconds: of all `rows` that were answered together.
      error: why there is no answer; nothing else is set then.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    visual_tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0
    plan: Plan | None = None
    flops: int = 0
    dense_flops: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rows: int = 1
    error: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def entering_tokens(self) -> float:
        """Mean over layers of the visual tokens that entered each: what costs."""
        return self.plan.entering_tokens(self.visual_tokens) if self.plan is not None else 0.0


def read_answers(
    generation: Generation, processor: Processor, config: ModelConfig, asked: Sequence[np.ndarray]
) -> list[Answer]:
    """The answer of every row.

    Args:
      asked: ids of each prompt as it was given, int32 [l_i].
    """
    plan, answers = generation.plan, []
    for tokens, visual, given in zip(generation.tokens, generation.visual_tokens, asked, strict=True):
        text = int(np.sum(given != config.image_token_id))
        answers.append(
            Answer(
                text=processor.decode(tokens),
                tokens=tuple(tokens),
                visual_tokens=tuple(visual),
                prompt_tokens=len(given),
                plan=plan,
                flops=paper_flops(config.text, [text + count for count in plan.entering(visual)]),
                dense_flops=paper_flops(config.text, [len(given)] * plan.num_layers),
                compile_seconds=generation.compile_seconds,
                prefill_seconds=generation.prefill_seconds,
                decode_seconds=generation.decode_seconds,
                rows=len(asked),
            )
        )
    return answers
