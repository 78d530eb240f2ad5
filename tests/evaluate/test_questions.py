"""Files of questions in the forms that benchmarks have them, and files for servers."""

from __future__ import annotations

import base64
import json
import re
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sparsevlm_jax import UserError, bounds
from sparsevlm_jax.cli import main
from sparsevlm_jax.evaluate.questions import Question, locate, read_questions
from sparsevlm_jax.evaluate.submit import submit
from sparsevlm_jax.files import read_json_lines
from tests.evaluate.sets import lines, write_lines

HEADER = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source"]
HEADER += ["l2-category", "comment", "split"]


def write_table(file: Path, rows: list[dict[str, str]], header: list[str] | None = None) -> Path:
    columns = header or HEADER
    text = "\n".join("\t".join(row.get(name, "") for name in columns) for row in rows)
    file.write_text("\t".join(columns) + f"\n{text}\n")
    return file


def test_lines_become_questions_in_their_order(tmp_path: Path) -> None:
    rows = [
        {"question_id": "count/0001.png", "image": "count/0001.png", "text": "one?", "category": "count"},
        {"question_id": "count/0001.png", "image": "count/0001.png", "text": "two?", "category": "count"},
        {"question_id": 3, "text": "no image"},
        {"question_id": 3, "text": "two", "image": ["a.png", "b.png"]},
        {"question_id": "3", "text": "two", "video": "clip.mp4", "image": None},
        {"question_id": 3, "text": "two", "image": ["a.png", "b.png"]},
    ]
    found = read_questions(write_lines(tmp_path / "q.jsonl", rows))
    assert found[0] == Question(("count/0001.png", "one?", 0), ("count/0001.png",), (), "count")
    assert [question.images for question in found[2:4]] == [(), ("a.png", "b.png")]
    assert found[4].videos == ("clip.mp4",)
    assert [question.key for question in found[3:]] == [(3, "two", 0), ("3", "two", 0), (3, "two", 1)]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no questions in it"),
        ([{"question_id": 1}], "line 1: `text` is None, expected a text"),
        ([{"text": "a"}], "line 1: `question_id` is None"),
        ([{"question_id": [1], "text": "a"}], r"line 1: `question_id` is \[1\]"),
        ([{"question_id": 1, "text": "a", "image": 7}], "line 1: its image is 7, expected the name of a file"),
        ([{"question_id": 1, "text": "a", "image": [None]}], "line 1: its image is"),
        (
            [{"question_id": 1, "text": "a", "image": "a.png"}, {"question_id": 1, "text": "a", "image": "b.png"}],
            "line 2: question_id 1 is there with the same text and another image",
        ),
        ([{"question_id": 1, "text": "a" * 100_000}], "line 1: 100,000 characters, expected at most 100,000"),
        ([{"id": 1, "conversations": []}], "line 1: `conversations` is"),
    ],
)
def test_a_question_that_is_none_is_named_by_its_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_questions(write_lines(tmp_path / "q.jsonl", rows))


def test_lines_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(tmp_path / "q.jsonl", [{"question_id": i, "text": "a" * 50} for i in range(4)])
    monkeypatch.setattr(bounds, "LINES", 3)
    with pytest.raises(UserError, match="line 4: too many lines"):
        list(read_json_lines(file))
    monkeypatch.setattr(bounds, "LINE_BYTES", 60)
    with pytest.raises(UserError, match="line 1: more than 60 bytes"):
        list(read_json_lines(file))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.png", "a/../../x.png", "a/..", "", ".", "a\0.png", "link/x.png"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    if name == ".":
        assert locate(folder, "a/./b.png") == folder / "a/b.png"
        assert locate(folder / "link/images", "a.png") == folder / "link/images/a.png"
    with pytest.raises(UserError, match="folder of images"):
        locate(folder, name)


def test_scienceqa_has_conversations_and_marks_images(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    entries = [
        {"id": "4", "image": "4/image.png", "conversations": talk},
        {"id": "5", "conversations": [{"from": "human", "value": "Which?"}]},
    ]
    file = tmp_path / "llava_test_CQM-A.json"
    file.write_text(json.dumps(entries))
    first, second = read_questions(file)
    assert first == Question(("4", "<image>\nWhich?\nA. x\nB. y", 0), ("4/image.png",))
    assert second == Question(("5", "Which?", 0))
    assert second.asked(tmp_path, "Answer briefly.").conversation.question == "Which?\nAnswer briefly."
    file.write_text('{"a": 1}')
    with pytest.raises(UserError, match="expected a list of questions; JSON lines end in .jsonl"):
        read_questions(file)


def test_mmbench_is_a_table_with_its_images(tmp_path: Path) -> None:
    image = base64.b64encode(b"pixels").decode()
    row = {"index": "12", "question": "Which?", "A": "x", "B": "y", "image": image}
    rows = [row, {**row, "index": "13", "hint": '"two\nlines"', "C": "nan", "D": "z"}]
    table, folder = write_table(tmp_path / "mmbench.tsv", rows), tmp_path / "new" / "images"
    table.write_text(table.read_text() + "\n")
    found = read_questions(table, folder)
    assert found == [
        Question((12, "Which?\nA. x\nB. y", 0), ("12.jpg",)),
        Question((13, "two\nlines\nWhich?\nA. x\nB. y", 0), ("13.jpg",)),
    ]
    assert (folder / "13.jpg").read_bytes() == b"pixels"
    assert read_questions(table, folder) == found
    other = base64.b64encode(b"of another table").decode()
    for rows, header, message in (
        ([{**row, "image": other}], None, 'index "12": .*12.jpg is there already, another image'),
        ([{**row, "index": "14", "image": ""}], None, 'index "14": has no image'),
        ([{**row, "index": "../x"}], None, r'index "../x": is no whole number'),
        ([{**row, "index": "14", "image": "?"}], None, "its image is no base64"),
        ([row], ["question", "A"], "no columns `index` and `question`"),
        ([{**row, "A": "x\ty"}], None, "line 2: 15 columns, the first has 14"),
    ):
        with pytest.raises(UserError, match=message):
            read_questions(write_table(table, rows, header), folder)


def cells(file: Path) -> list[list[str]]:
    """The texts of an xlsx file's only sheet."""
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    space = re.match(r"\{.*\}", sheet.tag)
    assert space is not None
    return [["".join(cell.itertext()) for cell in row] for row in sheet.iter(f"{space[0]}row")]


def test_mmbenchs_sheet_has_the_answers_beside_the_questions(tmp_path: Path) -> None:
    row = {"index": "12", "question": "A & B <?", "A": "x", "B": "y", "answer": "B", "hint": "h", "split": "dev"}
    table = write_table(tmp_path / "mmbench.tsv", [row, {**row, "index": "3"}])
    answers = write_lines(
        tmp_path / "a.jsonl", [{"question_id": 3, "text": "B\x07"}, {"question_id": 12, "text": " A"}]
    )
    submit("mmbench", answers, table, tmp_path / "out.xlsx")
    assert cells(tmp_path / "out.xlsx") == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        ["12", "A & B <?", "x", "y", "", "", " A", "B", "dev"],
        ["3", "A & B <?", "x", "y", "", "", "B", "B", "dev"],
    ]
    write_lines(answers, lines(answers)[:1])
    with pytest.raises(UserError, match='index "12": the question has no answer'):
        submit("mmbench", answers, table, tmp_path / "out.xlsx")


def test_vqav2_and_vizwiz_get_evalais_spelling_in_the_order_of_the_questions(tmp_path: Path) -> None:
    asked = [{"question_id": i, "image": f"{i}.jpg", "text": "q"} for i in (5, 3, 4)]
    questions, out = write_lines(tmp_path / "q.jsonl", asked), tmp_path / "out.json"
    answers = write_lines(
        tmp_path / "a.jsonl", [{"question_id": i, "text": t} for i, t in ((3, "Two."), (5, "The cat"))]
    )
    submit("vqav2", answers, questions, out)
    expected = [(5, "cat"), (3, "2"), (4, "")]
    assert json.loads(out.read_text()) == [{"question_id": i, "answer": text} for i, text in expected]
    with pytest.raises(UserError, match="1 of 3 questions have no answer, such as 4"):
        submit("vizwiz", answers, questions, out)
    write_lines(questions, asked[:2])
    submit("vizwiz", answers, questions, out)
    assert json.loads(out.read_text()) == [{"image": "5.jpg", "answer": "cat"}, {"image": "3.jpg", "answer": "2"}]
    write_lines(questions, asked[:1])
    with pytest.raises(UserError, match="1 answers are to other questions, such as 3"):
        submit("vqav2", answers, questions, out)


def test_mmvet_needs_no_questions_and_the_command_says_who_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, out = write_lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "It is."}]), tmp_path / "out.json"

    def call(*arguments: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as stop:
            main.main(["submit", *map(str, arguments)])
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    assert call("mmvet", "--answers", answers, "-o", out)[:2] == (0, f"{out}\n")
    assert json.loads(out.read_text()) == {"v1_0": "It is."}
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves ~ alone behind --answers=
    out.unlink()
    assert call("mmvet", "--answers=~/a.jsonl", "--output=~/out.json")[:2] == (0, f"{out}\n") and out.exists()
    wrong = {"question_id": 1, "text": "", "metadata": {"error": "a.png: no such file"}}
    write_lines(answers, [{"question_id": 0, "text": "It is.", "metadata": {}}, wrong])
    code, _, err = call("mmvet", "--answers", answers, "-o", out)
    assert code == 0 and f"1 answer of {answers} with an error, an empty text in {out}" in err
    code, _, err = call("vizwiz", "--answers", answers, "-o", out)
    assert code == 2 and "vizwiz: the file of questions is needed too" in err
    code, _, err = call("pope", "--answers", answers, "-o", out)
    assert code == 2 and "expected one of vqav2, vizwiz, mmbench, mmvet" in err
