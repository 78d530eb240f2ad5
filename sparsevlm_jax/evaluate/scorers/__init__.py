"""Benchmarks' own rules, as LLaVA's published numbers were scored; a file for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparsevlm_jax.evaluate.scorers import exact, gqa, mme, pope, scienceqa, seed, textvqa
from sparsevlm_jax.evaluate.scorers.base import Given, Scores


@dataclass(frozen=True)
class Scorer:
    """How a benchmark is scored.

    Attributes:
      score: from answers, the truth and, for some, the questions, to numbers by name.
      truth: what `--truth` is.
      needs_questions: whether the questions' own file is needed too.
    """

    score: Callable[[Given], Scores]
    truth: str
    needs_questions: bool = False


SCORERS = {
    "pope": Scorer(pope.score, "the folder of coco_pope_CATEGORY.json", needs_questions=True),
    "mme": Scorer(mme.score, "the folder MME_Benchmark_release_version"),
    "textvqa": Scorer(textvqa.score, "TextVQA_0.5.1_val.json"),
    "gqa": Scorer(gqa.score, "testdev_balanced_questions.json"),
    "scienceqa": Scorer(scienceqa.score, "the folder of problems.json and pid_splits.json"),
    "seed": Scorer(seed.score, "SEED-Bench.json"),
    "exact": Scorer(exact.score, "JSON lines with `question_id` and `answer`"),
}


def score(kind: str, answers: Path, truth: Path, questions: Path | None = None) -> Scores:
    """A benchmark's numbers.

    Raises:
      UserError: files that cannot be used, answers that are missing, or to other questions.
    """
    return SCORERS[kind].score(Given.read(answers, truth, questions))
