"""`sparsevlm explain`: what is read from a trace, how it is drawn, and what the command writes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sparsevlm_jax as sv
from sparsevlm_jax.cli import main, options
from sparsevlm_jax.explain import drawing, summary, words
from sparsevlm_jax.explain.figure import draw_figure
from sparsevlm_jax.explain.page import render
from sparsevlm_jax.explain.provenance import DROPPED, KEPT, chosen, origins, outcomes, scores
from sparsevlm_jax.explain.trace_run import first_difference
from sparsevlm_jax.explain.views import as_seen
from sparsevlm_jax.pruning import sparsify
from sparsevlm_jax.pruning.methods import Scores
from sparsevlm_jax.pruning.prune import PruningStep
from sparsevlm_jax.pruning.tokens import Tokens
from tests.explanations import GRID, QUESTION, SIDE, explained, image, image_size, model, processor

# Provenance: six patches between one word before and one behind them


def sequence() -> Tokens:
    visual = jnp.array([[False, *[True] * 6, False]])
    return Tokens(
        hidden=jnp.arange(8, dtype=jnp.float32)[None, :, None] * jnp.ones((1, 8, 4)),
        positions=jnp.arange(8)[None, :, None],
        visual=visual,
        rater_rows=jnp.array([[0, 7]]),
        rater_count=jnp.array([2]),
        text_count=jnp.array([2]),
        lengths=jnp.array([8]),
        saliency=None,
    )


def pruned(before: Tokens, ratings: Sequence[float], keep: int, pool: int) -> PruningStep:
    """Keeps the best-rated visual tokens and merges the next best into one; ratings of visual tokens, in order."""
    places = np.flatnonzero(np.asarray(before.visual)[0])
    values = np.zeros(before.visual.shape, np.float32)
    values[0, places] = ratings
    counts = (jnp.array([keep]), jnp.array([pool]), jnp.array([min(pool, 1)]))
    selection = sparsify.select(jnp.asarray(values), before.visual, *counts, keep=keep, pool=pool)
    recycled = None
    if pool:
        recycled = sparsify.recycle(sparsify.take(before.hidden, selection.pool), *counts[1:], clusters=1)
    length = 2 + keep + min(pool, 1)
    after, source = sparsify.rebuild(before, selection, recycled, length=length, renumber=True)
    return PruningStep(0, before, Scores(jnp.asarray(values)), selection, recycled, source, after)


@pytest.fixture(scope="module")
def first() -> PruningStep:
    """Keeps patches 0, 1 and 4, merges 2 and 3, drops 5. The merged token stands last."""
    return pruned(sequence(), [6, 5, 3, 2, 4, 1], keep=3, pool=2)


def fates_of(*events: PruningStep) -> list[np.ndarray]:
    return outcomes(events, origins(events[0].before, events))


def test_patches_are_kept_merged_and_dropped(first: PruningStep) -> None:
    before, after = fates_of(first)
    assert before.tolist() == [KEPT] * 6
    assert after.tolist() == [KEPT, KEPT, 1, 1, KEPT, DROPPED]


def test_a_merged_token_that_is_kept_keeps_its_number(first: PruningStep) -> None:
    second = pruned(first.after, [1, 2, 3, 4], keep=2, pool=0)
    assert fates_of(first, second)[2].tolist() == [DROPPED, DROPPED, 1, 1, KEPT, DROPPED]


def test_a_merged_token_that_is_merged_again_brings_all_its_patches(first: PruningStep) -> None:
    second = pruned(first.after, [4, 2, 1, 3], keep=1, pool=2)
    assert fates_of(first, second)[2].tolist() == [KEPT, 2, 2, 2, DROPPED, DROPPED]


def test_a_merged_token_that_is_dropped_takes_its_patches_along(first: PruningStep) -> None:
    second = pruned(first.after, [4, 3, 2, 1], keep=3, pool=0)
    assert fates_of(first, second)[2].tolist() == [KEPT, KEPT, DROPPED, DROPPED, KEPT, DROPPED]


def test_a_token_merged_twice_holds_shares_of_shares(first: PruningStep) -> None:
    second = pruned(first.after, [4, 2, 1, 3], keep=1, pool=2)
    *_, after = origins(sequence(), [first, second])
    inside, shares = after.of(2)
    assert inside.tolist() == [1, 2, 3], "patch 1, and both of the merged token"
    np.testing.assert_allclose(shares, [1 / 2, 1 / 4, 1 / 4], atol=1e-5)
    assert [numbers.tolist() for numbers, _ in map(after.of, (0, 1, 3))] == [[], [0], []]


def test_a_patch_has_the_score_of_the_token_it_is_in(first: PruningStep) -> None:
    second = pruned(first.after, [4, 3, 2, 9], keep=2, pool=0)
    before = origins(first.before, [first])[1]
    np.testing.assert_array_equal(scores(second, before), [4, 3, 9, 9, 2, np.nan])
    assert chosen(second, before).tolist() == [True, False, True, True, False, False]


# Drawing


@pytest.fixture(scope="module")
def seen() -> np.ndarray:
    return np.asarray(image())


@pytest.fixture(scope="module")
def drawn(seen: np.ndarray) -> Image.Image:
    """Row 0: kept, merged into 1, dropped, merged into 2; everything below is kept."""
    grid = np.full((GRID, GRID), KEPT)
    grid[0, :4] = KEPT, 1, DROPPED, 2
    return drawing.draw_fates(seen, grid)


def corner(image: Image.Image, row: int, column: int) -> np.ndarray:
    """Pixels of a patch clear of its border and of what is written in its middle, float [_, _, 3]."""
    cell = drawing.cell_size((GRID, GRID))
    top, left, size = row * cell + cell // 8, column * cell + cell // 8, cell // 8
    return np.asarray(image, np.float32)[top : top + size, left : left + size]


def test_kept_patches_are_drawn_as_the_model_saw_them(seen: np.ndarray, drawn: Image.Image) -> None:
    clear = np.asarray(drawing.enlarge(seen, (GRID, GRID)))
    cell = drawing.cell_size((GRID, GRID))
    np.testing.assert_array_equal(np.asarray(drawn)[2 * cell :], clear[2 * cell :])
    np.testing.assert_array_equal(corner(drawn, 0, 0), corner(drawing.enlarge(seen, (GRID, GRID)), 0, 0))


@pytest.mark.parametrize("column, number", [(1, 1), (3, 2)])
def test_merged_patches_are_tinted_by_their_token(
    seen: np.ndarray, drawn: Image.Image, column: int, number: int
) -> None:
    clear = corner(drawing.enlarge(seen, (GRID, GRID)), 0, column)
    expected = 0.45 * clear + 0.55 * np.array(drawing.tint(number))
    np.testing.assert_allclose(corner(drawn, 0, column), expected, atol=1)


def test_dropped_patches_are_dimmed(seen: np.ndarray, drawn: Image.Image) -> None:
    dropped = corner(drawn, 0, 2)
    assert np.ptp(dropped, axis=2).max() <= 1, "grey"
    assert dropped.min() > 0.75 * 246, "near the paper's colour"


def test_a_line_stands_between_patches_of_different_fates_only(drawn: Image.Image, seen: np.ndarray) -> None:
    cell = drawing.cell_size((GRID, GRID))
    pixels, clear = np.asarray(drawn), np.asarray(drawing.enlarge(seen, (GRID, GRID)))
    assert pixels[cell // 2, cell].tolist() == list(drawing.INK)
    assert pixels[cell // 8, 3 * cell].tolist() == list(drawing.INK)
    np.testing.assert_array_equal(pixels[cell + cell // 2, 4 * cell], clear[cell + cell // 2, 4 * cell])


def test_merged_tokens_of_the_same_tint_have_different_numbers(seen: np.ndarray) -> None:
    assert drawing.tint(1) == drawing.tint(8)
    one, eight = (np.asarray(drawing.draw_fates(seen, np.full((GRID, GRID), n))) for n in (1, 8))
    assert (one != eight).any()


def test_the_colour_map_rises_evenly_in_lightness() -> None:
    lightness = drawing.colour_map(np.linspace(0, 1, 50)) @ np.array([0.299, 0.587, 0.114])
    steps = np.diff(lightness)
    assert steps.min() > 0 and steps.max() < 3 * steps.mean()


def test_score_maps_frame_what_stays_and_leave_out_what_is_gone() -> None:
    values = np.linspace(0, 1, GRID * GRID).reshape(GRID, GRID)
    values[0, 0] = np.nan
    stays = np.zeros((GRID, GRID), bool)
    stays[7, 7] = True
    image = drawing.draw_scores(values, stays, 0.0, 1.0)
    cell = drawing.cell_size((GRID, GRID))
    assert corner(image, 0, 0).min() == drawing.PAPER[0]
    assert corner(image, 7, 6).tolist() != corner(image, 0, 1).tolist()
    assert np.asarray(image)[7 * cell + 1, 7 * cell + cell // 2].tolist() == list(drawing.INK)
    assert np.asarray(image)[7 * cell + 1, 6 * cell + cell // 2].tolist() != list(drawing.INK)


# Words


def test_tokens_are_joined_to_words() -> None:
    text = "a tab on?\nB"
    spans = [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8), (8, 9), (9, 10), (10, 11)]  # a, " t", ab, " ", on, ?, line end, B
    assert words.word_starts(text, spans) == [0, 1, 3, 5, 6, 7]


def test_tokens_of_one_character_are_one_word() -> None:
    assert words.word_starts("é b", [(0, 1), (0, 1), (2, 3)]) == [0, 2]


def test_the_words_behind_the_image_are_those_of_the_prompt() -> None:
    found = explained().words
    assert [word.text for word in found.after] == ["⏎", "what", "is", "on", "the", "table", "?", "ASSISTANT", ":"]
    assert found.before == "USER:"


def test_the_templates_words_are_set_apart() -> None:
    apart = [word.text for word in explained().words.after if not word.asked]
    assert apart == ["⏎", "ASSISTANT", ":"]


def test_words_rate_where_their_strongest_token_is_above_the_mean() -> None:
    found = explained().words
    assert 0 < sum(word.rates for word in found.after) < len(found.after)
    assert [word.rates for word in found.after] == [word.relevance > found.mean for word in found.after]


def test_a_tokenizer_without_offsets_gives_its_own_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.array(processor().tokenizer("the table", add_special_tokens=False)["input_ids"], np.int32)
    monkeypatch.setattr(type(processor().tokenizer), "is_fast", False)
    text, spans = words.written(ids, "", processor())
    assert text.split() == ["the", "table"]
    assert [text[begin:end] for begin, end in spans] == words.pieces(ids, processor())


def test_a_question_that_the_prompt_spells_otherwise_is_all_of_it() -> None:
    assert words.spot("x y", "USER: xy") == (0, 8)


# The record


def test_images_are_recorded_as_the_model_saw_them() -> None:
    wide = Image.new("RGB", (2 * SIDE, SIDE), "red")
    wide.paste(image(), (SIDE // 2, 0))
    pixels = processor()([[wide]], [QUESTION]).pixel_values
    found = as_seen(pixels, processor().image_processor, explained().pruned.plan, model().config)[0]
    assert np.abs(found.astype(int) - np.asarray(image()).astype(int)).max() <= 1


def test_the_pruned_answer_is_that_of_generate() -> None:
    explanation = explained()
    said = sv.generate(model(), [image()], QUESTION, sparsity=sv.sparsity("v1.5"), max_new_tokens=2)
    assert processor().decode(explanation.pruned.tokens[0]) == said


@pytest.mark.parametrize("method, images", [("v1.5", 1), ("v1.5", 2), ("v1", 1), ("vision", 1)])
def test_tokens_and_patches_add_up_at_every_stage(method: str, images: int) -> None:
    explanation = explained(method, images)
    assert len(explanation.stages) > 1
    for stage, later in zip(explanation.stages, [*explanation.stages[1:], None], strict=True):
        assert stage.visual == np.sum(stage.outcomes == KEPT) + summary.merged_tokens(stage)
        if later is not None:
            assert stage.pruning.kept + stage.pruning.recycled + stage.pruning.dropped == stage.visual
            assert stage.pruning.kept + stage.pruning.merged == later.visual
            assert np.array_equal(np.isnan(stage.pruning.scores), stage.outcomes == DROPPED)


def test_the_class_token_is_no_patch() -> None:
    explanation = explained(class_token=True)
    assert explanation.stages[0].visual == GRID * GRID + 1
    (view,) = explanation.views
    assert view.tokens.tolist() == np.arange(1, 1 + GRID * GRID).reshape(GRID, GRID).tolist()
    assert any("class token" in note for note in summary.notes(explanation))


@pytest.mark.parametrize(
    "a, b, expected", [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [4], 0), ([], [], None)]
)
def test_answers_part_at_their_first_difference(a: list[int], b: list[int], expected: int | None) -> None:
    assert first_difference(a, b) == expected


def test_dense_is_the_same_as_dense() -> None:
    explanation = explained("dense")
    assert summary.verdict(explanation) == "Same answer, token for token."
    savings = [*summary.savings(explanation), summary.program_saving(explanation)]
    assert {saving.change for saving in savings} == {"the same"}


def test_counts_of_tokens_are_those_of_the_plan() -> None:
    explanation = explained()
    saving = summary.savings(explanation)[0]
    assert float(saving.pruned) == pytest.approx(explanation.pruned.plan.entering_tokens(), abs=0.05)
    assert saving.dense == str(GRID * GRID)


# Page and sheet


@cache
def page(method: str) -> str:
    return render(explained(method))


@pytest.mark.parametrize(
    "method, said",
    [
        ("dense", "Nothing is pruned here"),
        ("pool", "enters as 4 × 4 larger cells"),
        ("downsample", "enters as 4 × 4 larger cells"),
        ("vision", "vision does not ask the question"),
        ("v1", "v1 decides from the image"),
    ],
)
def test_the_page_says_what_is_special_about_a_method(method: str, said: str) -> None:
    assert said in page(method)


def test_the_page_escapes_what_it_is_given() -> None:
    text = render(explained(question="is a <i>table</i> here?"))
    assert "<i>table</i>" not in text and "&lt;i&gt;table&lt;/i&gt;" in text


def test_the_page_asks_for_nothing_but_itself() -> None:
    text = page("v1.5")
    sources = re.findall(r'(?:src|href)="([^"]{0,5})', text)
    assert sources and set(sources) == {"data:"}
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text


def test_the_sheet_has_a_column_per_stage() -> None:
    sheets = {method: draw_figure(explained(method)) for method in ("v1.5", "v1")}
    columns = {method: len(explained(method).stages) for method in sheets}
    assert columns["v1"] > columns["v1.5"]
    side = drawing.cell_size((GRID, GRID)) * GRID
    assert all(sheet.width >= columns[method] * side for method, sheet in sheets.items())


# The command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `sparsevlm explain` on the small model: exit code, stdout and stderr."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(options, "load", lambda *_, **__: model())
    image().save(tmp_path / "image.png")

    def call(*arguments: object, question: str = QUESTION) -> tuple[int, str, str]:
        command = ["sparsevlm", "explain", "--model", "small", "--question", question, "--max-new-tokens", "2"]
        monkeypatch.setattr(sys, "argv", [*command, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


def test_the_command_replaces_the_page_and_leaves_nothing_else(run: Run, tmp_path: Path) -> None:
    html, png = tmp_path / "page.html", tmp_path / "page.png"
    html.write_text("old")
    code, out, err = run("--image", tmp_path / "image.png", "-o", html, "--png")
    assert code == 0, err
    assert out.split() == [str(html), str(png)]
    assert QUESTION in html.read_text()
    assert image_size(png)[0] > 900
    assert {file.name for file in tmp_path.iterdir()} == {"image.png", "page.html", "page.png"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-o", "page.html"], "give at least one --image"),
        (["-o", "page.txt", "--image", "image.png"], "-o page.txt: a page is written"),
        (["-o", "gone/page.html", "--image", "image.png"], "there is no folder gone"),
        (["-o", "page.html", "--image", "gone.png"], "gone.png: no such file"),
        (["--image", "image.png"], "--output"),
        (["-o", "page.html", "--image", "image.png", "--keep", "8", "--keep-at", "0:3"], "different budgets"),
    ],
)
def test_bad_input_is_one_line_and_no_page(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in err and len(err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_a_pipe_by_the_name_of_the_page_is_not_replaced(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "page.html")
    code, _, err = run("-o", tmp_path / "page.html", "--image", tmp_path / "image.png")
    assert code == 2 and "page.html: a pipe, socket or device is there" in err
    assert (tmp_path / "page.html").is_fifo()
