"""Scores of small hand-made answers, worked out by other means; and what does not belong together."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from sparsevlm_jax import UserError
from sparsevlm_jax.cli import main
from sparsevlm_jax.evaluate.normalize import normalize
from sparsevlm_jax.evaluate.scorers import SCORERS, score
from sparsevlm_jax.evaluate.scorers.mme import COGNITION, PERCEPTION, verdict
from sparsevlm_jax.evaluate.scorers.pope import says_yes
from sparsevlm_jax.evaluate.scorers.scienceqa import letter
from sparsevlm_jax.evaluate.scorers.textvqa import accuracy, question_of
from tests.evaluate.sets import write_lines


def answers(tmp_path: Path, rows: Sequence[tuple[Any, str, str]]) -> Path:
    """A file of answers from ids, prompts and texts."""
    keys = ("question_id", "prompt", "text")
    return write_lines(tmp_path / "a.jsonl", [dict(zip(keys, row, strict=True)) for row in rows])


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(content))
    return file


# EvalAI's spelling


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Cat.", "cat"),
        ("a  red,  ball", "red ball"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("y'alldve", "y'alldve"),  # two left out are not mended
        ("wed", "wed"),
        ("im here", "im here"),  # nor is what the released table has with a capital
        ("somebody'd", "somebodyd"),
        ("1,000", "1000"),
        ("3.14", "3.14"),
        ("3. 14", "3 14"),
        ("U.S.A", "usa"),
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("red-blue - green", "redblue green"),  # one mark beside a space takes all of its kind along
        ("red-blue", "red blue"),
        ("what's up?", "what 's up"),
        ("\n\tblue\tsky\n", "blue sky"),
        ("the", ""),
        ("", ""),
    ],
)
def test_answers_are_spelt_as_evalai_spells_them(text: str, expected: str) -> None:
    assert normalize(text) == expected


# POPE


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Yes", True),
        ("No", False),
        ("no, there is not.", False),
        ("No.", False),
        ("NO", True),  # as released: only these three spellings
        ("There is. No doubt", True),  # the first sentence alone
        ("Not at all", True),
        ("there is not one", False),
        ("nothing", True),
        ("no\nmore", True),  # words are what spaces part
        ("", True),
    ],
)
def test_a_pope_answer_is_a_no_by_its_words(text: str, expected: bool) -> None:
    assert says_yes(text) is expected


def pope(tmp_path: Path, said: Sequence[str], truth: Sequence[str], categories: Sequence[str]) -> tuple[Path, ...]:
    """Files of answers, truth and questions, each about an image of its own."""
    folder, questions = tmp_path / "coco", []
    folder.mkdir()
    for number, category in enumerate(categories):
        image = f"{number}.jpg"
        questions.append({"question_id": number, "image": image, "text": f"q{number}", "category": category})
    for category in set(categories):
        own = [number for number, name in enumerate(categories) if name == category]
        labels = [{"question_id": 99, "image": f"{number}.jpg", "label": truth[number]} for number in own]
        write_lines(folder / f"coco_pope_{category}.json", labels)
    rows = [(number, f"q{number}", text) for number, text in enumerate(said)]
    return answers(tmp_path, rows[::-1]), folder, write_lines(tmp_path / "q.jsonl", questions)


def test_pope_is_the_mean_f1_of_its_categories(tmp_path: Path) -> None:
    #           random: TP FP FN TN                adversarial: TP TP FN
    said = ["Yes", "Yes, a dog.", "No", "no", "Yes", "yes", "No."]
    truth = ["yes", "no", "yes", "no", "yes", "yes", "yes"]
    found = score("pope", *pope(tmp_path, said, truth, ["random"] * 4 + ["adversarial"] * 3))
    f1 = [Fraction(2, 2 + 1 + 1), Fraction(2 * 2, 2 * 2 + 0 + 1)]
    assert found["mean F1"] == pytest.approx(float(100 * sum(f1) / 2))
    assert found["random accuracy"] == found["random precision"] == found["random recall"] == 50
    assert found["adversarial precision"] == 100 and found["adversarial recall"] == pytest.approx(200 / 3)
    assert found["adversarial yes"] == pytest.approx(200 / 3)


def test_pope_of_another_release_is_refused(tmp_path: Path) -> None:
    files = pope(tmp_path, ["Yes"] * 3, ["yes"] * 3, ["random"] * 3)
    labels = files[1] / "coco_pope_random.json"
    write_lines(labels, [{"image": f"{number}.jpg", "label": "yes"} for number in (0, 2, 1)])
    with pytest.raises(UserError, match='line 2: is about "2.jpg", the question in its place about "1.jpg"'):
        score("pope", *files)
    write_lines(labels, [{"image": "0.jpg", "label": "yes"}])
    with pytest.raises(UserError, match="has 1 labels for 3 questions"):
        score("pope", *files)


def test_pope_without_the_labels_of_a_category_is_refused(tmp_path: Path) -> None:
    files = pope(tmp_path, ["Yes"] * 2, ["yes"] * 2, ["random", "popular"])
    (files[1] / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match="no coco_pope_popular.json, a category of the questions"):
        score("pope", *files)


# MME


@pytest.mark.parametrize(
    "text, expected",
    [("Yes", "yes"), ("No.", "no"), ("No, it is", "no"), (" yes", "yes"), ("It is", "other"), ("", "other")]
    + [("Nobody", "no"), ("eyes", "yes"), ("is no", "other"), ("A yes", "other"), ("Answer: yes", "other")],
)
def test_an_mme_answer_is_read_from_its_first_letters(text: str, expected: str) -> None:
    assert verdict(text) == expected


def test_mme_adds_what_is_right_and_images_with_both_right(tmp_path: Path) -> None:
    truth, rows = tmp_path / "mme", []
    hint, own = "\nAnswer the question using a single word or phrase.", " Please answer yes or no."
    places = {"count": "{}.txt", "OCR": "questions_answers_YN/{}.txt", "code_reasoning": "{}.txt"}
    for task, place in places.items():
        for image in ("0001", "0002"):
            file = truth / task / place.format(image)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"Is it  one?{own}\tYes\nIs it two? {own}\tNo\n")
    said = {"count": ("Yes", "No", "Yes", "Yes"), "OCR": ("no", "maybe", "Yes.", "no"), "code_reasoning": ("no",) * 4}
    for task, texts in said.items():
        asked = itertools.product(("0001", "0002"), ("Is it one?", "Is it two?"))
        rows += [(f"{task}/{i}.png", q + hint, text) for (i, q), text in zip(asked, texts, strict=True)]
    found = score("mme", answers(tmp_path, rows), truth)
    count, ocr, code = 100 * 3 / 4 + 100 * 1 / 2, 100 * 2 / 4 + 100 * 1 / 2, 100 * 2 / 4 + 0
    assert found["count"] == count and found["OCR"] == ocr and found["code_reasoning"] == code
    assert (found["partial_perception"], found["partial_cognition"]) == (count + ocr, code)
    assert (found["partial_total"], found["tasks"]) == (count + ocr + code, 3)
    for changed, message in (
        (rows[:-1], "1 images have questions without an answer, such as code_reasoning/0002"),
        (rows[:-2], "1 images have questions without an answer, such as code_reasoning/0002"),
        ([*rows, rows[0]], "was not asked .* by MME, or has two answers"),
        ([*rows, ("count/0003.png", "Is it one?", "Yes")], "0003.txt: no such file"),
        ([*rows, ("7", "Is it one?", "Yes")], 'question_id "7": expected TASK/IMAGE'),
    ):
        with pytest.raises(UserError, match=message):
            score("mme", answers(tmp_path, changed), truth)


def test_mme_calls_a_sum_whole_only_where_all_its_tasks_are(tmp_path: Path) -> None:
    rows = []
    for task in (*PERCEPTION, *COGNITION):
        file = tmp_path / "mme" / task / "1.txt"
        file.parent.mkdir(parents=True)
        file.write_text("Is it one?\tYes\n")
        rows.append((f"{task}/1.png", "Is it one?", "Yes"))
    found = score("mme", answers(tmp_path, rows), tmp_path / "mme")
    assert (found["total"], found["perception"], found["cognition"]) == (2800, 2000, 800) and "tasks" not in found
    shutil.rmtree(tmp_path / "mme" / COGNITION[-1])
    found = score("mme", answers(tmp_path, rows[:-1]), tmp_path / "mme")
    assert (found["partial_total"], found["perception"], found["partial_cognition"]) == (2600, 2000, 600)
    assert found["tasks"] == 13 and not {"total", "cognition"} & found.keys()


# TextVQA


def left_out(said: str, people: Sequence[str]) -> float:
    """The accuracy as it is defined: every person left out in turn."""
    scores = []
    for number in range(len(people)):
        others = [normalize(p) for i, p in enumerate(people) if i != number]
        scores.append(min(Fraction(1), Fraction(others.count(normalize(said)), 3)))
    return float(sum(scores) / len(people))


@pytest.mark.parametrize("same", range(11))
def test_a_textvqa_answer_counts_by_how_many_people_gave_it(same: int) -> None:
    people = ["The Stop."] * same + [f"other {i}" for i in range(10 - same)]
    assert accuracy("stop", people) == pytest.approx(left_out("stop", people) if same else 0.0)


def test_a_textvqa_answer_of_three_people_is_nine_tenths() -> None:
    assert accuracy("Coca-Cola", ["coca cola"] * 3 + ["pepsi"] * 7) == pytest.approx(0.9)


@pytest.mark.parametrize(
    "prompt",
    [
        "What is it?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "Reference OCR token: A, B\nWhat is it?\nAnswer the question using a single word or phrase.",
        "What is it?\nAnswer the question using a single word or phrase.",
        "OCR tokens: A, B. Question: What is it? Short answer:",
        "What is it?",
    ],
)
def test_the_question_of_a_textvqa_prompt_is_found(prompt: str) -> None:
    assert question_of(prompt) == "What is it?"


def test_textvqa_is_the_mean_over_its_questions(tmp_path: Path) -> None:
    people = {"What is it?": ["stop"] * 10, "What Colour?": ["red"] * 2 + ["dark red"] * 8}
    data = [
        {"image_id": "x1", "question": q, "answers": a, "question_id": i} for i, (q, a) in enumerate(people.items())
    ]
    truth = write_json(tmp_path / "val.json", {"data": data})
    rows = [
        ("x1", f"{q}\nReference OCR token: STOP\nAnswer.", text)
        for q, text in zip(people, ("STOP", "red"), strict=True)
    ]
    assert score("textvqa", answers(tmp_path, rows), truth)["accuracy"] == pytest.approx(100 * (1 + 0.6) / 2)
    with pytest.raises(UserError, match="1 of 2 questions have no answer"):
        score("textvqa", answers(tmp_path, rows[:1]), truth)
    with pytest.raises(UserError, match="1 answers are to questions that .*val.json does not have"):
        score("textvqa", answers(tmp_path, [*rows, ("x2", "What is it?\nAnswer.", "a")]), truth)
    with pytest.raises(UserError, match=r"two answers to .*what is it\?"):
        score("textvqa", answers(tmp_path, [*rows, rows[0]]), truth)


# Sets with one true answer


def test_gqa_counts_equal_words(tmp_path: Path) -> None:
    truth = write_json(
        tmp_path / "gqa.json", {str(i): {"answer": a} for i, a in enumerate(["yes", "red", "cat", "cat"])}
    )
    rows = [("0", "q", "Yes."), ("1", "q", "Red"), ("2", "q", "a cat"), ("3", "q", "cat ")]
    assert score("gqa", answers(tmp_path, rows), truth)["accuracy"] == 50
    with pytest.raises(UserError, match='2 of 4 questions have no answer, such as "0"'):
        score("gqa", answers(tmp_path, rows[2:]), truth)
    with pytest.raises(UserError, match='1 answers are to questions that .* such as "9"'):
        score("gqa", answers(tmp_path, [*rows, ("9", "q", "cat")]), truth)
    with pytest.raises(UserError, match='two answers to question_id "0"'):
        score("gqa", answers(tmp_path, [*rows, rows[0]]), truth)
    with pytest.raises(UserError, match="is .*, expected an object"):
        score("gqa", answers(tmp_path, rows), write_json(truth, [1]))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("B", "B"),
        (" B\n", None),
        ("B. blue", "B"),
        ("B) blue", None),
        ("The answer is C.", "C"),
        ("The answer is D", None),
        ("The answer is D, as", "D"),
        ("The answer is A. The answer is B.", None),
    ]
    + [("I think. The answer is A. No, B.", "A"), ("B.", None), ("b", None), ("", None), ("blue", None), ("F", None)]
    + [("B\nbecause", None), (" B", None), ("AB", None)],
)
def test_a_scienceqa_answer_names_a_letter(text: str, expected: str | None) -> None:
    assert letter(text) == expected


def test_scienceqa_tells_questions_with_an_image_from_others(tmp_path: Path) -> None:
    problems = {
        str(i): {"choices": ["x", "y", "z"], "answer": a, "image": image}
        for i, (a, image) in enumerate([(0, "image.png"), (1, "image.png"), (2, "image.png"), (0, None), (1, None)])
    }
    write_json(tmp_path / "sqa" / "problems.json", {**problems, "9": {}})
    write_json(tmp_path / "sqa" / "pid_splits.json", {"test": list(problems), "train": ["9"]})
    rows = [("0", "q", "A"), ("1", "q", "A"), ("2", "q", "C. z"), ("3", "q", "The answer is A."), ("4", "q", "none")]
    found = score("scienceqa", answers(tmp_path, rows), tmp_path / "sqa")
    assert found["accuracy with image"] == pytest.approx(200 / 3)
    assert (found["accuracy without"], found["accuracy"]) == (50, 60)
    with pytest.raises(UserError, match="1 of 5 questions have no answer"):
        score("scienceqa", answers(tmp_path, rows[1:]), tmp_path / "sqa")


def test_seed_takes_the_letter_alone(tmp_path: Path) -> None:
    kinds = [("image", 1), ("image", 1), ("image", 2), ("video", 10)]
    listed = [
        {"question_id": str(i) if i < 3 else "v3", "answer": "A", "data_type": kind, "question_type_id": number}
        for i, (kind, number) in enumerate(kinds)
    ]
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    truth = write_json(tmp_path / "seed.json", {"questions": listed, "question_type": types})
    rows = [(0, "q", "A"), (1, "q", "A."), (2, "q", "A"), ("v3", "q", "B")]
    found = score("seed", answers(tmp_path, rows), truth)
    assert (found["accuracy"], found["video"], found["image"]) == (50, 0, pytest.approx(200 / 3))
    assert (found["Scene Understanding"], found["Instance Identity"], found["Action Recognition"]) == (50, 100, 0)


def test_exact_takes_one_of_the_true_answers(tmp_path: Path) -> None:
    true = [
        {"question_id": 1, "answer": "Red"},
        {"question_id": 2, "answer": ["two", "2"]},
        {"question_id": 3, "answer": "no"},
    ]
    truth = write_lines(tmp_path / "t.jsonl", true)
    rows = [(1, "q", " red.\n"), (2, "q", "2"), (3, "q", "no way")]
    assert score("exact", answers(tmp_path, rows), truth)["accuracy"] == pytest.approx(200 / 3)
    for answer in (None, [], ["a", 1], 7):
        write_lines(truth, [{"question_id": 1, "answer": answer}])
        with pytest.raises(UserError, match="line 1: `answer` is .*, expected a text or a list of texts"):
            score("exact", answers(tmp_path, rows), truth)


# Files


def test_answers_that_are_errors_are_counted_beside_the_scores(tmp_path: Path) -> None:
    truth = write_lines(tmp_path / "t.jsonl", [{"question_id": i, "answer": "a"} for i in range(3)])
    errors = [{"error": "no such file"}, {"new_tokens": 1}, None]
    rows = [{"question_id": i, "text": "a" if i else "", "metadata": each} for i, each in enumerate(errors)]
    found = score("exact", write_lines(tmp_path / "a.jsonl", rows), truth)
    assert found == {"accuracy": pytest.approx(200 / 3), "answers": 3, "errors": 1}
    assert "errors" not in score(
        "exact", write_lines(tmp_path / "a.jsonl", [*rows[1:], rows[2] | {"question_id": 0}]), truth
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no answers in it"),
        ("[1]\n", "line 1: expected a JSON object, found list"),
        ('{"question_id": 1}\n', "line 1: `text` is None, expected a text"),
        ('{"question_id": 1.5, "text": "a"}\n', "line 1: `question_id` is 1.5, expected"),
        ('{"question_id": true, "text": "a"}\n', "line 1: `question_id` is True, expected"),
        ('{"question_id": 1, "text": "a"\n', "line 1: cannot be read as JSON"),
        ('\n{"question_id": 1, "text": "a", "text": "b"}\n', "line 2: cannot be read as JSON: repeats 'text'"),
        ('{"a":' * 50 + "1" + "}" * 50, "nested more than 40 deep"),
    ],
)
def test_a_file_that_is_none_of_answers_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        score("exact", file, write_lines(tmp_path / "t.jsonl", [{"question_id": 1, "answer": "a"}]))


def test_the_command_prints_numbers_and_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write_lines(tmp_path / "t.jsonl", [{"question_id": 1, "answer": "a"}])
    file = answers(tmp_path, [(1, "q", "A")])

    def call(*arguments: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as stop:
            main.main(["score", *map(str, arguments)])
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    assert call("exact", "--answers", file, "--truth", truth)[:2] == (0, "accuracy     100.00\nanswers        1.00\n")
    code, out, _ = call("exact", "--answers", file, "--truth", truth, "--json")
    assert json.loads(out) == {"accuracy": 100.0, "answers": 1.0}
    for kind, message in (("nothing", "expected one of pope, mme"), ("pope", "--questions is needed")):
        code, _, err = call(kind, "--answers", file, "--truth", truth)
        assert code == 2 and message in err
    for kind in SCORERS:
        code, _, err = call(kind, "--answers", file, "--truth", tmp_path / "none", "--questions", truth)
        assert code == 2 and "is not there; expected" in err
