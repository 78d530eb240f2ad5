"""The study of a public set: its files, what is learned from them, the committed model, and figures as committed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sparsevlm_jax as sv
from benchmarks.easy_vqa.__main__ import MODEL, RESULTS
from benchmarks.easy_vqa.answer import command, outcome, sparsevlm
from benchmarks.easy_vqa.data import KINDS, Asked, blind_accuracies, image_paths, prepare, split, write_lines
from benchmarks.easy_vqa.killed import _digest
from benchmarks.easy_vqa.report import kinds_table, row, table, unpacked
from benchmarks.easy_vqa.variants import BUDGETS, CUTS, SCALES, commands, cuts
from benchmarks.easy_vqa.words import questions
from sparsevlm_jax.bench.files import read_json
from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.evaluate.questions import read_questions
from training import shapes
from training.batches import normalise
from training.shapes import EASY_VQA, GRID, IDS, LAYERS, LONGEST, PATCH, holding, make_batch, mirrored, read_sample
from training.words import END, encode, tokenizer

ROOT = Path(__file__).parent.parent
SIZE = 64  # pixels of the set's images
DRAWN = (("red", "circle"), ("blue", "rectangle"), ("teal", "triangle"))
RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "teal": (0, 128, 128)}
TEXTS = ("what color is the shape?", "what shape is present?", "is there a red shape?", "is there not a circle?")


def draw_shape(colour: str, shape: str, box: tuple[int, int, int, int] = (14, 20, 40, 46)) -> Image.Image:
    """An image as the set's are: one shape on a light background."""
    image = Image.new("RGB", (SIZE, SIZE), (240, 247, 250))
    drawing, (left, top, right, bottom) = ImageDraw.Draw(image), box
    if shape == "circle":
        drawing.ellipse(box, fill=RGB[colour])
    elif shape == "rectangle":
        drawing.rectangle(box, fill=RGB[colour])
    else:
        drawing.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=RGB[colour])
    return image


def true_answers(colour: str, shape: str) -> list[str]:
    """Of TEXTS."""
    return [colour, shape, "yes" if colour == "red" else "no", "no" if shape == "circle" else "yes"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package, with images drawn here."""
    paths, asked = {}, []
    (tmp_path / "source").mkdir()
    for number, (colour, shape) in enumerate(DRAWN):
        paths[number] = str(tmp_path / "source" / f"{number}.png")
        draw_shape(colour, shape).save(paths[number])
        asked += [(text, answer, number) for text, answer in zip(TEXTS, true_answers(colour, shape), strict=True)]
    texts, answers, numbers = (list(column) for column in zip(*asked, strict=True))

    def found() -> tuple[list[str], list[str], list[int]]:
        return texts, answers, numbers

    stand_in = SimpleNamespace(
        get_train_questions=found,
        get_test_questions=found,
        get_train_image_paths=lambda: paths,
        get_test_image_paths=lambda: paths,
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", stand_in)
    shapes.samples.cache_clear()
    yield stand_in
    shapes.samples.cache_clear()


@pytest.fixture(scope="module")
def model() -> Model:
    return sv.load(str(MODEL), dtype="float32")


# The set


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(sv.UserError, match="pip install easy-vqa"):
        shapes.package()


def test_the_prepared_split_is_read_as_questions_about_its_images(package: Any, tmp_path: Path) -> None:
    files = prepare(tmp_path / "split")
    read = read_questions(files.questions, files.images)
    asked = split("test")
    assert [(each.text, each.images) for each in read] == [(each.text, (f"{each.image}.png",)) for each in asked]
    assert {path.name for path in files.images.iterdir()} == {"0.png", "1.png", "2.png"}
    truth = [json.loads(line) for line in files.truth.read_text().splitlines()]
    assert [each["answer"] for each in truth] == [each.answer for each in asked]
    assert [each["question_id"] for each in truth] == [each.question_id for each in read]


@pytest.mark.parametrize(
    ("text", "answer", "kind"),
    [
        ("what color is the circle?", "red", "named"),
        ("what is the red shape?", "circle", "named"),
        ("what shape is present?", "circle", "unnamed"),
        ("is there a red shape?", "yes", "there"),
        ("is there not a red shape?", "no", "there"),
        ("is there a blue shape?", "no", "not there"),
        ("is no blue shape present?", "yes", "not there"),
    ],
)
def test_kinds_say_what_the_words_of_a_question_name(text: str, answer: str, kind: str) -> None:
    assert Asked(text, answer, 0).kind == kind in KINDS


def test_answers_without_an_image_are_the_commonest_of_the_split_that_is_learned_from() -> None:
    learned = [Asked("a", "yes", 0), Asked("a", "yes", 0), Asked("b", "no", 0)]
    tested = [Asked("a", "yes", 0), Asked("b", "no", 0), Asked("b", "yes", 0), Asked("c", "no", 0)]
    assert blind_accuracies(learned, tested) == {"majority": 0.5, "majority_of_text": 0.5}


# What is learned from it


@pytest.mark.parametrize(
    ("asked", "answer", "words"),
    [
        ("what is the color of the circle?", "red", {"circle", "red"}),
        ("what shape is in the image?", "circle", {"circle"}),
        ("is there a red shape?", "yes", {"red"}),
        ("is there a blue shape?", "no", set()),
        ("does the image not contain a red shape?", "no", {"red"}),
        ("is no blue shape present?", "yes", set()),
    ],
)
def test_what_holds_for_an_image_follows_from_answers_that_name_or_affirm(
    asked: str, answer: str, words: set[str]
) -> None:
    assert set(holding([(asked, answer)])) == words


def test_patches_of_the_shape_are_those_that_it_covers() -> None:
    sample = read_sample(draw_shape("teal", "rectangle", (0, 16, 31, 63)), [("what shape is present?", "rectangle")])
    edge = PATCH * SIZE / shapes.PIXELS  # of a patch, in the image's own pixels
    inside = np.zeros((GRID, GRID), bool)
    inside[math.ceil(16 / edge) :, : int(32 / edge)] = True
    found = sample.mask.reshape(GRID, GRID)
    assert found[inside].all()
    assert not found[:2].any() and not found[:, math.ceil(33 / edge) :].any()


def test_a_mirrored_sample_has_its_shape_on_the_other_side() -> None:
    sample = read_sample(draw_shape("teal", "rectangle", (0, 0, 20, 63)), [])
    other = mirrored(sample)
    assert np.array_equal(other.mask, shapes.shape_mask(other.pixels)) and not np.array_equal(other.mask, sample.mask)


def test_a_batch_says_colour_and_shape_of_the_shapes_patches_and_nothing_of_others(package: Any) -> None:
    drawn, random = shapes.samples(), np.random.default_rng(0)
    batch = make_batch(drawn, random, 5, thinned=LAYERS)
    for sample, words, kept in zip(drawn, batch.words, batch.kept, strict=True):
        named = np.zeros(len(IDS), bool)
        named[[IDS[word] for word in sample.said]] = True
        assert np.array_equal(words, sample.mask[:, None] & named) and named.sum() == 2
        assert kept[:, sample.mask].all()
    asked = {(tuple(encode(text, IDS)), IDS[answer]) for sample in drawn for text, answer in sample.questions}
    for ids, end in zip(batch.questions.reshape(-1, LONGEST), batch.ends.reshape(-1), strict=True):
        assert (tuple(ids[:end].tolist()), ids[end + 1]) in asked
        assert ids[end] == IDS["assistant:"] and ids[end + 2] == END


def test_ids_are_those_of_the_committed_models_tokenizer() -> None:
    words = tokenizer(EASY_VQA.ids, EASY_VQA.spellings)
    assert (MODEL / "tokenizer.json").read_text(encoding="utf-8") == words.to_str(pretty=True) + "\n"
    assert words.encode(TEXTS[0], add_special_tokens=False).ids == encode(TEXTS[0], IDS)
    assert read_json(MODEL / "config.json") == EASY_VQA.config


# The model


def test_the_processor_makes_the_pixels_and_prompts_that_the_model_was_trained_on(package: Any, model: Model) -> None:
    asked = split("test")[:1]
    assert model.processor is not None and isinstance(model.config, ModelConfig)
    found = model.processor([[draw_shape(*DRAWN[0])]], [asked[0].text])
    taken = questions(asked, image_paths("test"), model.config)
    np.testing.assert_allclose(found.pixel_values[0], taken.pixels[0], atol=1e-5)
    assert np.asarray(found.ids)[0, : taken.lengths[0]].tolist() == taken.ids[0, : taken.lengths[0]].tolist()
    np.testing.assert_array_equal(taken.pixels[0], normalise(shapes.resized(draw_shape(*DRAWN[0]))))


def test_the_committed_model_answers_about_images_drawn_here(model: Model) -> None:
    images = [[np.asarray(draw_shape(colour, shape))] for colour, shape in DRAWN for _ in TEXTS]
    truth = [answer for drawn in DRAWN for answer in true_answers(*drawn)]
    said = sv.generate(model, images, list(TEXTS) * len(DRAWN), sparsity="dense", max_new_tokens=2)
    assert said == truth


def test_the_committed_weights_are_small_and_outside_the_package() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8 * 2**20
    assert not MODEL.is_relative_to(ROOT / "sparsevlm_jax")


# The study


def test_every_method_is_answered_with_at_three_budgets() -> None:
    found = [(each.label, each.keep) for each in commands()]
    pruning = set(sv.METHODS) - {"dense"}
    assert len(found) == 1 + 3 * len(pruning) and {label for label, _ in found[1:]} == pruning
    assert len(BUDGETS) == len(SCALES) == len(CUTS) == 3
    assert {each.guide for each in cuts()} == {"own", "other", "truth"}


def test_an_outcome_is_what_the_command_scores_of_the_first_answers(package: Any, tmp_path: Path) -> None:
    files, asked, answers = prepare(tmp_path / "split"), split("test"), tmp_path / "a.jsonl"
    said = [row.answer for row in asked[:5]] + ["no such thing"] * 7
    rows = [{"question_id": i, "text": text, "metadata": {"entering_tokens": i}} for i, text in enumerate(said)]
    write_lines(answers, rows)
    write_lines(Path(f"{answers}.run.json"), [{"sittings": []}])
    found = outcome(files, answers, asked[:6])
    assert found["right"].tolist() == [True] * 5 + [False]
    assert found["entering"] == 2.5


def test_a_command_that_fails_ends_the_study(package: Any, tmp_path: Path) -> None:
    files = prepare(tmp_path / "split")
    with pytest.raises(RuntimeError, match="--keep 48: exit code 2"):
        sparsevlm(command(files, tmp_path / "a.jsonl", tmp_path / "no model", ["--keep", "48"]))


def test_a_row_gives_back_which_answers_are_right() -> None:
    right = np.array([True, False, True, True, False, True, True, True, False, True])
    asked = [Asked(TEXTS[i % 4], true_answers("red", "circle")[i % 4], i // 4) for i in range(10)]
    found = row({"label": "random", "keep": 8}, right, ~right, asked)
    assert np.array_equal(unpacked(found, 10), right)
    assert found["accuracy"] == 0.7 and found["minus_dense"] == pytest.approx(0.4)
    assert found["interval"][0] <= 0.7 <= found["interval"][1]
    assert found["kinds"]["unnamed"] == pytest.approx(3 / 6)


def test_order_does_not_matter_to_a_digest_of_answers_and_a_missing_line_does(tmp_path: Path) -> None:
    whole, turned, parts = tmp_path / "a", tmp_path / "b", [tmp_path / "c", tmp_path / "d"]
    whole.write_bytes(b"1\n2\n3\n")
    turned.write_bytes(b"3\n1\n2\n")
    parts[0].write_bytes(b"3\n1\n")
    parts[1].write_bytes(b"2\n")
    assert _digest([whole]) == _digest([turned]) == _digest(parts) != _digest(parts[:1])


def test_the_committed_runs_that_were_killed_and_split_made_the_same_file() -> None:
    found = read_json(ROOT / RESULTS / "killed.json")
    assert found["uninterrupted"] == found["killed_and_resumed"] == found["shards"]
    assert found["same_without_sorting"] and len(found["kills"]) == 5
    assert sum(found["lines_of_shards"]) == found["questions"] == 1000
    assert any(0 < kill["lines"] < 1000 for kill in found["kills"])


def test_the_tables_in_the_documentation_are_those_of_the_committed_results() -> None:
    answers, single = (read_json(ROOT / RESULTS / f"{name}.json") for name in ("answers", "cuts"))
    text = (ROOT / "docs" / "easy_vqa.md").read_text(encoding="utf-8")
    assert f"<!-- easy_vqa -->\n{table(answers, single)}\n<!-- /easy_vqa -->" in text
    assert f"<!-- easy_vqa_kinds -->\n{kinds_table(single)}\n<!-- /easy_vqa_kinds -->" in text


def test_committed_accuracies_are_those_of_the_committed_answers() -> None:
    for name in ("answers", "cuts"):
        results = read_json(ROOT / RESULTS / f"{name}.json")
        for found in results["rows"]:
            assert found["accuracy"] == pytest.approx(unpacked(found, results["questions"]).mean())
