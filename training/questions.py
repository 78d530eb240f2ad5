"""Questions about scenes: nine kinds, one-word answers, and the patches that each answer is to be found in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from training.scenes import COLOURS, PLACES, Digit, Scene, patch_mask

MOST_COUNTED = 4  # answers of "how many" go from 0 to this


class Question(NamedTuple):
    """A question with its truth."""

    kind: str
    text: str
    answer: str
    mask: np.ndarray  # bool [patches]: those that the answer depends on; what is absent has to be looked for in all


Ask = Callable[[Scene, np.random.Generator], Question | None]


def ask(scene: Scene, random: np.random.Generator, kind: str) -> Question | None:
    """A question of this kind with one true answer, or None where the scene allows none."""
    return KINDS[kind](scene, random)


def ask_some(scene: Scene, random: np.random.Generator, count: int) -> list[Question]:
    """`count` questions, their kinds drawn evenly among those that the scene allows."""
    questions: list[Question] = []
    kinds = list(KINDS)
    while len(questions) < count:
        question = ask(scene, random, kinds[random.integers(len(kinds))])
        if question is not None:
            questions.append(question)
    return questions


def _unique(scene: Scene, attribute: str, random: np.random.Generator) -> Digit | None:
    """A digit that is the only one with its value or colour."""
    values = [getattr(digit, attribute) for digit in scene.digits]
    alone = [digit for digit in scene.digits if values.count(getattr(digit, attribute)) == 1]
    return alone[random.integers(len(alone))] if alone else None


def _what(random: np.random.Generator) -> str:
    return ("what", "which")[random.integers(2)]


def _digit_by_colour(scene: Scene, random: np.random.Generator) -> Question | None:
    if (digit := _unique(scene, "colour", random)) is None:
        return None
    text = f"{_what(random)} digit is {digit.colour}?"
    return Question("digit of colour", text, str(digit.value), patch_mask((digit,)))


def _colour_by_digit(scene: Scene, random: np.random.Generator) -> Question | None:
    if (digit := _unique(scene, "value", random)) is None:
        return None
    text = f"{_what(random)} colour is the {digit.value}?"
    return Question("colour of digit", text, digit.colour, patch_mask((digit,)))


def _digit_by_place(scene: Scene, random: np.random.Generator) -> Question | None:
    digit = scene.digits[random.integers(len(scene.digits))]
    text = f"{_what(random)} digit is at the {digit.place}?"
    return Question("digit at place", text, str(digit.value), patch_mask((digit,)))


def _colour_by_place(scene: Scene, random: np.random.Generator) -> Question | None:
    digit = scene.digits[random.integers(len(scene.digits))]
    text = f"{_what(random)} colour is the digit at the {digit.place}?"
    return Question("colour at place", text, digit.colour, patch_mask((digit,)))


def _place_by_digit(scene: Scene, random: np.random.Generator) -> Question | None:
    if (digit := _unique(scene, "value", random)) is None:
        return None
    return Question("place of digit", f"where is the {digit.value}?", digit.place, patch_mask((digit,)))


def _place_by_colour(scene: Scene, random: np.random.Generator) -> Question | None:
    if (digit := _unique(scene, "colour", random)) is None:
        return None
    return Question("place of colour", f"where is the {digit.colour} digit?", digit.place, patch_mask((digit,)))


def _count(scene: Scene, random: np.random.Generator) -> Question | None:
    """The number is drawn first, so that no answer is much more frequent than its neighbours."""
    by_count: dict[int, list[str]] = {}
    for colour in COLOURS:
        by_count.setdefault(len(_with(scene, colour=colour)), []).append(colour)
    counts = [count for count in by_count if count <= MOST_COUNTED]
    count = counts[random.integers(len(counts))]
    colour = by_count[count][random.integers(len(by_count[count]))]
    mask = patch_mask(_with(scene, colour=colour) or scene.digits)
    return Question("count", f"how many digits are {colour}?", str(count), mask)


def _presence(scene: Scene, random: np.random.Generator) -> Question | None:
    present = sorted({digit.value for digit in scene.digits})
    absent = sorted(set(range(10)) - set(present))
    values = present if random.random() < 0.5 else absent
    value = values[random.integers(len(values))]
    found = _with(scene, value=value)
    text = f"is there a {value}?"
    return Question("presence", text, "yes" if found else "no", patch_mask(found or scene.digits))


def _presence_in_colour(scene: Scene, random: np.random.Generator) -> Question | None:
    """Where the answer is no, the value or the colour is there in another digit."""
    digit = scene.digits[random.integers(len(scene.digits))]
    value, colour = digit.value, digit.colour
    if random.random() < 0.5:
        if random.random() < 0.5:
            value = int(random.integers(10))
        else:
            colour = list(COLOURS)[random.integers(len(COLOURS))]
    found = _with(scene, value=value, colour=colour)
    concerned = found or _with(scene, value=value) + _with(scene, colour=colour)
    text = f"is there a {colour} {value}?"
    return Question("presence in colour", text, "yes" if found else "no", patch_mask(concerned))


def _with(scene: Scene, **attributes: int | str) -> tuple[Digit, ...]:
    return tuple(d for d in scene.digits if all(getattr(d, name) == value for name, value in attributes.items()))


KINDS: dict[str, Ask] = {
    "digit of colour": _digit_by_colour,
    "colour of digit": _colour_by_digit,
    "digit at place": _digit_by_place,
    "colour at place": _colour_by_place,
    "place of digit": _place_by_digit,
    "place of colour": _place_by_colour,
    "count": _count,
    "presence": _presence,
    "presence in colour": _presence_in_colour,
}
ANSWERS = (*map(str, range(10)), *COLOURS, *PLACES, "yes", "no")
