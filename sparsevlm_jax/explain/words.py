"""Words of the prompt, each with how strongly it concerns the image and whether it rates the patches.

Axis letters: l sequence length, t text tokens behind the last image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sparsevlm_jax.inputs.processor import MARKER, VIDEO_MARKER, Processor
from sparsevlm_jax.pruning.sparsify import rate_text, text_after_image
from sparsevlm_jax.pruning.tokens import Tokens

# Whole sequences with masks, as one program each: another question of the same bucket compiles nothing.
_rate_text, _text_after_image = jax.jit(rate_text), jax.jit(text_after_image)

Span = tuple[int, int]
_MARKERS = f"{MARKER}|{VIDEO_MARKER}"


class Word(NamedTuple):
    """One word, of one or more tokens.

    Attributes:
      text: as it was written.
      relevance: to the image, of its strongest token; those of all tokens add up to 1.
      rates: one of its tokens is a rater.
      asked: it is the question's, not the chat template's.
    """

    text: str
    relevance: float
    rates: bool
    asked: bool


class Words(NamedTuple):
    """The prompt's text: what stands in front of the last image cannot rate, every word behind it may."""

    before: str
    after: list[Word]
    mean: float  # a token rates where its relevance is above this


def read_words(ids: Int[np.ndarray, "l"], start: Tokens, question: str, prompt: str, processor: Processor) -> Words:
    """Rates the words of a prompt of one row.

    Args:
      ids: the prompt, images as markers, unpadded.
      start: the sequence that enters the decoder.
      question: as it was asked; what else stands in the prompt is the template's.
      prompt: the text that was tokenized.
    """
    behind = np.asarray(_text_after_image(start.visual, start.lengths))[0, : len(ids)]
    rates, relevance = rate(start, behind)
    text, spans = written(ids[behind], prompt, processor)
    asked = spot(re.split(_MARKERS, question)[-1].strip(), text)
    words = []
    for first, stop in pairwise([*word_starts(text, spans), len(spans)]):
        begin, end = spans[first][0], spans[stop - 1][1]
        strongest, any_rates = float(relevance[first:stop].max()), bool(rates[first:stop].any())
        is_asked = begin < asked[1] and end > asked[0]
        words.append(Word(text[begin:end].strip() or "⏎", strongest, any_rates, is_asked))
    return Words(_in_front(text, spans), words, 1 / max(len(spans), 1))


def rate(start: Tokens, behind: Bool[np.ndarray, "l"]) -> tuple[Bool[np.ndarray, "t"], Float[np.ndarray, "t"]]:
    """`sparsify.rate_text` of the text behind the image in a sequence of one row: raters and relevance."""
    if not behind.any():
        return np.zeros(0, bool), np.zeros(0, np.float32)
    text = np.zeros(start.visual.shape, bool)
    text[0, : len(behind)] = behind
    rates, relevance = _rate_text(start.hidden, start.hidden, start.visual, jnp.asarray(text))
    return np.asarray(rates)[text], np.asarray(relevance)[text]


def written(ids: Int[np.ndarray, "t"], prompt: str, processor: Processor) -> tuple[str, list[Span]]:
    """The text that the last tokens of a prompt were made of, and where in it each of them stands.

    A tokenizer that keeps no offsets gives its own spelling.
    """
    if processor.tokenizer.is_fast:
        offsets = processor.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        return prompt, [(int(begin), int(end)) for begin, end in offsets[len(offsets) - len(ids) :]]
    parts = pieces(ids, processor)
    ends = np.cumsum([len(part) for part in parts], dtype=int).tolist()
    return "".join(parts), list(pairwise([0, *ends]))


def pieces(ids: Sequence[int] | Int[np.ndarray, "t"], processor: Processor) -> list[str]:
    """What each token adds to a text. A character made of several tokens comes with the last of them."""
    said, found = "", []
    for stop in range(1, len(ids) + 1):
        text = processor.tokenizer.decode([int(i) for i in ids[:stop]]).rstrip("\ufffd")
        found.append(text[len(said) :])
        said = max(said, text, key=len)
    return found


def word_starts(text: str, spans: Sequence[Span]) -> list[int]:
    """Numbers of the tokens that begin a word: not joined, letter to letter or by its space, to the one before."""
    starts, last = [], (0, 0)
    for number, (begin, end) in enumerate(spans):
        same_character = begin < last[1]
        letters = text[begin - 1 : begin].isalnum() and text[begin : begin + 1].isalnum()
        behind_space = not text[slice(*last)].strip(" ")
        if not number or not (same_character or (begin == last[1] and (letters or behind_space))):
            starts.append(number)
        last = (begin, end)
    return starts


def spot(question: str, text: str) -> Span:
    """Where the question stands in the text; all of it where it is not found as it was asked."""
    at = text.rfind(question)
    return (at, at + len(question)) if at >= 0 else (0, len(text))


def _in_front(text: str, spans: Sequence[Span]) -> str:
    """The text in front of the words that may rate, without markers."""
    first = spans[0][0] if spans else len(text)
    return re.sub(_MARKERS, " ", text[:first]).strip()
