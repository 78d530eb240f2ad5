"""The commands `sparsevlm score` and `sparsevlm submit`: from answers to a benchmark's numbers, or to what its server
takes. Neither loads a model."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from sparsevlm_jax import files
from sparsevlm_jax.cli.options import Json, note
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.evaluate.scorers import SCORERS
from sparsevlm_jax.evaluate.scorers import score as run_score
from sparsevlm_jax.evaluate.submit import SUBMISSIONS
from sparsevlm_jax.evaluate.submit import submit as run_submit
from sparsevlm_jax.text import count

Answers = Annotated[Path, typer.Option(metavar="A.jsonl", help="What `sparsevlm answer` wrote, or LLaVA's scripts.")]
Questions = Annotated[Path | None, typer.Option(metavar="Q", help="The file of questions that was answered.")]


def score(
    kind: Annotated[str, typer.Argument(metavar="|".join(SCORERS), help="Which benchmark.")],
    answers: Answers,
    truth: Annotated[Path, typer.Option(metavar="FILE_OR_DIR", help="The true answers, as the benchmark has them.")],
    questions: Questions = None,
    as_json: Json = False,
) -> None:
    """Scores answers by a benchmark's own rules, as LLaVA's published numbers were."""
    _require_known(kind, SCORERS)
    if SCORERS[kind].needs_questions and questions is None:
        raise UserError(f"score {kind}: --questions is needed too")
    answers, truth, questions = files.user_path(answers), files.user_path(truth), _user_path(questions)
    if not truth.exists():
        raise UserError(f"--truth {truth}: is not there; expected {SCORERS[kind].truth}")
    scores = run_score(kind, answers, truth, questions)
    if as_json:
        print(json.dumps(scores, indent=2))
        return
    width = max(map(len, scores))
    print("\n".join(f"{name:<{width}}  {value:9.2f}" for name, value in scores.items()))


def submit(
    kind: Annotated[str, typer.Argument(metavar="|".join(SUBMISSIONS), help="Which benchmark.")],
    answers: Answers,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.")],
    questions: Questions = None,
) -> None:
    """Writes the file that a benchmark's server takes; only the server knows the true answers."""
    _require_known(kind, SUBMISSIONS)
    output = files.require_writable(output)
    errors = run_submit(kind, files.user_path(answers), _user_path(questions), output)
    print(output)
    if errors:
        note(f"{count(errors, 'answer')} of {answers} with an error, an empty text in {output}")


def _user_path(file: Path | None) -> Path | None:
    return None if file is None else files.user_path(file)


def _require_known(kind: str, known: Collection[str]) -> None:
    if kind not in known:
        raise UserError(f"{kind}: expected one of {', '.join(known)}")
