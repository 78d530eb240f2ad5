"""SEED-Bench: the letter of the right option, and nothing else."""

from __future__ import annotations

from collections import defaultdict

from sparsevlm_jax.evaluate.scorers.base import Given, Scores, entry, read_document, share


def score(given: Given) -> Scores:
    """The accuracy in percent over all questions, those about images, those about videos, and every type.

    Raises:
      UserError: answers and truth do not belong together.
    """
    truth = read_document(given.truth, dict)
    listed = entry(truth.get("questions"), list, f"{given.truth}: `questions`")
    rows = [entry(row, dict, f"{given.truth}: an entry of `questions`") for row in listed]
    types = {number: name for name, number in entry(truth.get("question_type", {}), dict, str(given.truth)).items()}
    keys = [row.get("question_id") for row in rows]
    right: dict[str, list[bool]] = defaultdict(list)
    for key, row, answer in zip(keys, rows, given.by_name(keys), strict=True):
        found = answer.text == entry(row.get("answer"), str, f"{given.truth}: question_id {key}: `answer`")
        for part in ("accuracy", row.get("data_type"), types.get(row.get("question_type_id"))):
            if part is not None:
                right[str(part)].append(found)
    return {part: share(found) for part, found in right.items()}
