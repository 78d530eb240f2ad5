"""GQA: an answer is right if it is the one word of the truth, whatever its capitals and the period behind it."""

from __future__ import annotations

from sparsevlm_jax.evaluate.scorers.base import Given, Scores, entry, read_document, share


def score(given: Given) -> Scores:
    """The accuracy in percent over all questions of the split.

    Raises:
      UserError: answers and truth do not belong together.
    """
    truth = read_document(given.truth, dict)
    right = []
    for key, answer in zip(truth, given.by_name(truth), strict=True):
        name = f"{given.truth}: {key}"
        true = entry(truth[key], dict, name).get("answer")
        right.append(answer.text.rstrip(".").lower() == entry(true, str, f"{name}: `answer`"))
    return {"accuracy": share(right), "answers": float(len(right))}
