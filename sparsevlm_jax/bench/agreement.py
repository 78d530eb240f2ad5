"""Whether sides compute the same thing, before anything about their speed is said.

In float32 selections and tokens have to be equal. In 16 bit they drift on every side: there a side is compared with
its own float32 run, both forced along the float32 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.bench.shapes import Side

Answer = Mapping[str, Any]  # {"tokens": [b][t], "selections": [layer][b][kept]}


class Verdict(NamedTuple):
    """`status`: "agrees", "disagrees" (no figure is shown), "alone" (no other side runs this method), "failed"."""

    status: str
    detail: str


def shown(verdict: Verdict) -> bool:
    """Whether anything may be said about the side's speed."""
    return verdict.status in ("agrees", "alone")


class Drift(NamedTuple):
    """A 16-bit run against the same side's float32 run, forced along the same tokens.

    Attributes:
      kl: mean over positions of the divergence of 16 bit from float32, in nats.
      top1: share of positions whose likeliest token is the same.
      overlap: share of the tokens kept in float32 that are kept in 16 bit too, by pruning layer.
    """

    kl: float
    top1: float
    overlap: list[float]


def verdicts(answers: Mapping[Side, Answer | str]) -> dict[str, Verdict]:
    """Compares every side with the first that runs the same method at the same budget.

    Args:
      answers: in float32; a string says why a side has none.
    """
    first: dict[Any, tuple[Side, Answer]] = {}
    found = {}
    for side, answer in answers.items():
        if isinstance(answer, str):
            found[side.name] = Verdict("failed", answer)
            continue
        reference = first.setdefault(side.counterpart, (side, answer))
        if reference[0] is not side:
            found[side.name] = compare(answer, reference[1], reference[0])
            continue
        others = [s for s, a in answers.items() if s.counterpart == side.counterpart and not isinstance(a, str)]
        found[side.name] = Verdict("agrees", "the reference") if len(others) > 1 else Verdict("alone", "")
    return found


def compare(answer: Answer, reference: Answer, side: Side) -> Verdict:
    """Equal selections and tokens, or where the first difference is."""
    for layer, (ours, theirs) in enumerate(zip(answer["selections"], reference["selections"], strict=False)):
        if ours != theirs:
            differ = sum(len(set(a) ^ set(b)) for a, b in zip(ours, theirs, strict=False))
            return Verdict("disagrees", f"pruning layer {layer}: {differ} tokens kept by one of it and {side.name}")
    if len(answer["selections"]) != len(reference["selections"]):
        return Verdict("disagrees", f"prunes at another number of layers than {side.name}")
    if answer["tokens"] != reference["tokens"]:
        places = (np.asarray(answer["tokens"]) != np.asarray(reference["tokens"])).any(axis=0)
        return Verdict("disagrees", f"from new token {int(places.argmax())} on another than {side.name}")
    return Verdict("agrees", f"as {side.name}")


def drift(
    wide_logits: np.ndarray, logits: np.ndarray, wide: Sequence[Sequence[Any]], selections: Sequence[Sequence[Any]]
) -> Drift:
    """Compares logits [b, t, vocab] and selections of 16 bit with those of float32 (`wide`)."""
    p, q = _log_softmax(wide_logits), _log_softmax(logits)
    kl = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
    top1 = float(np.mean(p.argmax(axis=-1) == q.argmax(axis=-1)))
    return Drift(kl, top1, [_overlap(a, b) for a, b in zip(wide, selections, strict=True)])


def _overlap(wide: Sequence[Sequence[int]], narrow: Sequence[Sequence[int]]) -> float:
    shared = sum(len(set(a) & set(b)) for a, b in zip(wide, narrow, strict=True))
    return shared / max(1, sum(map(len, wide)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
