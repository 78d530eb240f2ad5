"""MME: two yes-or-no questions about every image. A task's score is the percentage of right answers, and in addition
that of images with both right; the published number adds the scores of all tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.evaluate.scorers.base import Given, Scores, share
from sparsevlm_jax.files import read_lines

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork"),
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
HINTS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")
PARTS = ("", "questions_answers_YN")  # of a task's folder, where its questions lie
Place = tuple[str, str]  # a task, and an image of it without its ending


def score(given: Given) -> Scores:
    """The score of every task, of perception and cognition, and their total.

    A sum over fewer tasks than MME has says so in its name, `partial_total`, and `tasks` says how many there are.

    Raises:
      UserError: answers and truth do not belong together.
    """
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    truth: dict[Place, dict[str, str]] = {}
    for answer in given.answers:
        place = _place(given, answer.question_id)
        if place not in truth:
            truth[place] = _truth(given.truth, place)
        asked = plain(answer.prompt)
        if asked not in truth[place]:
            raise UserError(
                f"{given.source}: question_id {shown(answer.question_id)} was not asked {shown(answer.prompt)} by MME, "
                "or has two answers"
            )
        right[place[0]][place[1]].append(verdict(answer.text) == truth[place].pop(asked))
    left = [place for place, questions in truth.items() if questions] + sorted(_images(given.truth) - truth.keys())
    if left:
        raise UserError(
            f"{given.source}: {len(left)} images have questions without an answer, such as {'/'.join(left[0])}"
        )
    tasks = {
        task: share(one for both in images.values() for one in both) + share(all(both) for both in images.values())
        for task, images in right.items()
    }
    sums = {_whole(name, part, tasks): sum(tasks.get(task, 0.0) for task in part) for name, part in _SUMS.items()}
    counted = {"tasks": float(len(tasks))} if len(tasks) < len(_SUMS["total"]) else {}
    return {**sums, **counted, **{task: tasks[task] for task in sorted(tasks)}}


def _whole(name: str, part: Sequence[str], tasks: Collection[str]) -> str:
    """What to call a sum over a part of MME's tasks, of which only some may be there."""
    return name if set(part) <= set(tasks) else f"partial_{name}"


def verdict(text: str) -> str:
    """ "yes", "no" or "other": the answer itself, or what its first four letters hold."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def plain(question: str) -> str:
    """A question without how it was to be answered, whatever the spaces."""
    for hint in HINTS:
        question = question.replace(hint, " ")
    return " ".join(question.split())


def _place(given: Given, question_id: int | str) -> Place:
    task, _, image = str(question_id).partition("/")
    if task not in PERCEPTION + COGNITION or not image:
        raise UserError(f"{given.source}: question_id {shown(question_id)}: expected TASK/IMAGE, as in count/0001.jpg")
    return task, image.rpartition("/")[2].split(".")[0]


def _images(folder: Path) -> set[Place]:
    """All that there are questions about."""
    return {
        (task, file.stem)
        for task in PERCEPTION + COGNITION
        for part in PARTS
        for file in (folder / task / part).glob("*.txt")
    }


def _truth(folder: Path, place: Place) -> dict[str, str]:
    """The questions about an image and their answers, in small letters."""
    task, image = place
    places = [folder / task / part / f"{image}.txt" for part in PARTS]
    file = next((each for each in places if each.is_file()), places[0])
    found = {}
    for number, line in read_lines(file):
        question, _, answer = line.decode("utf-8", "replace").strip().rpartition("\t")
        if not question and not answer:
            continue
        if answer.lower() not in ("yes", "no"):
            raise UserError(f"{file}: line {number}: expected a question, a tab, and Yes or No")
        found[plain(question)] = answer.lower()
    return found


_SUMS = {"total": PERCEPTION + COGNITION, "perception": PERCEPTION, "cognition": COGNITION}
