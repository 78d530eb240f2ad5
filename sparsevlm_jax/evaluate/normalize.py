"""Answers as EvalAI compares them for VQAv2, VizWiz and TextVQA: one spelling for what means the same.

The rules are those of the released evaluators, the odd ones included: what they do to an answer is what a published
number was made with.
"""

from __future__ import annotations

import re

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the released code hands re.UNICODE, which is 32, to where the count belongs

# Words whose apostrophes were left out, by what they become. Only these: "wed" is a word, "im" is left alone.
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    found = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():  # either of the two left out
        first, middle, last = word.split("'")
        found |= {f"{first}{middle}'{last}": word, f"{first}'{middle}{last}": word}
    found |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return found | {"somebody'd": "somebodyd"}  # the other way round, as released


_CONTRACTIONS = _contractions()


def normalize(text: str) -> str:
    """An answer without capitals, articles and marks, numbers up to ten as digits, apostrophes where they belong."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return " ".join(_words(_without_marks(text)))


def _without_marks(text: str) -> str:
    """A mark beside a space anywhere in the text is left out everywhere; another one becomes a space."""
    found = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space else " ")
    return _PERIOD.sub("", found, count=_MOST_PERIODS)


def _words(text: str) -> list[str]:
    words = [_DIGITS.get(word, word) for word in text.split()]
    return [_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES]
