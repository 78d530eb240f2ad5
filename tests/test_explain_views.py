"""What is drawn of images that are more than one square of patches: tiles, newlines, and patches without a token."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

import sparsevlm_jax as sv
from sparsevlm_jax.explain import drawing, summary
from sparsevlm_jax.explain.figure import draw_figure
from sparsevlm_jax.explain.page import render
from sparsevlm_jax.explain.provenance import ABSENT, DROPPED, KEPT
from sparsevlm_jax.explain.trace_run import Explanation, explain
from sparsevlm_jax.explain.views import LINE_END
from tests.hf import tiny_llava

TILE, GRID, PATCH = 112, 14, 8
CANVASES = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]
WIDE, TALL = (80, 200), (200, 120)  # height and width
SEEN = {WIDE: (12, 28), TALL: (28, 16)}  # rows and columns of patches of their canvases, without the padding


@cache
def next_model() -> sv.Model:
    with TemporaryDirectory() as folder:
        settings = {"family": "llava_next", "layers": 4, "kv_heads": 2, "top": {"image_grid_pinpoints": CANVASES}}
        return sv.load(tiny_llava(Path(folder), image_size=TILE, patch_size=PATCH, **settings))


def slope(size: tuple[int, int]) -> Image.Image:
    """Red rises to the right, green to the bottom."""
    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(20, 230, width)
    pixels[..., 1] = np.linspace(20, 230, height)[:, None]
    return Image.fromarray(pixels)


@cache
def explained(*sizes: tuple[int, int], method: str = "v1.5") -> Explanation:
    return explain(next_model(), [slope(size) for size in sizes], "what is it?", sv.sparsity(method), max_new_tokens=2)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_an_image_of_tiles_has_a_base_and_a_canvas(size: tuple[int, int]) -> None:
    base, canvas = explained(size).views
    assert (base.name, base.shape, base.newlines) == ("base", (GRID, GRID), False)
    assert (canvas.name, canvas.shape, canvas.newlines) == ("canvas", SEEN[size], True)
    assert explained(size).newlines == SEEN[size][0]


@pytest.mark.parametrize("sizes", [(WIDE,), (TALL, WIDE)])
def test_every_visual_token_is_drawn_exactly_once(sizes: tuple[tuple[int, int], ...]) -> None:
    explanation = explained(*sizes)
    drawn = np.concatenate([view.tokens.reshape(-1) for view in explanation.views])
    assert sorted(drawn.tolist()) == list(range(explanation.stages[0].visual))
    assert [view.image for view in explanation.views] == sorted([*range(len(sizes))] * 2)
    for stage in explanation.stages:
        outcomes = np.concatenate([view.of(stage.outcomes).reshape(-1) for view in explanation.views])
        assert stage.visual == np.sum(outcomes == KEPT) + len(set(outcomes[outcomes > 0].tolist()))
        assert np.sum(outcomes == DROPPED) == np.sum(stage.outcomes == DROPPED)


def test_the_canvas_shows_the_tiles_put_together_without_their_padding() -> None:
    """A slope stays one: a tile, row or border in a wrong place would break it."""
    _, canvas = explained(WIDE).views
    rows, columns = canvas.shape
    image = canvas.pixels[:, : columns * PATCH].astype(int)
    assert image.shape == (rows * PATCH, columns * PATCH, 3)
    inside = image[PATCH:-PATCH, PATCH:-PATCH]
    for channel, axis in ((0, 1), (1, 0)):
        steps = np.diff(inside[..., channel], axis=axis)
        assert steps.min() >= -1 and steps.max() <= 5
        assert np.ptp(inside[..., channel]) > 160
    assert (canvas.pixels[:, columns * PATCH :] == LINE_END).all()


def test_a_newline_is_drawn_behind_a_gap() -> None:
    explanation = explained(WIDE)
    _, canvas = explanation.views
    cell, (rows, columns) = drawing.cell_size(canvas.tokens.shape), canvas.shape
    drawn = np.asarray(drawing.draw_view(canvas))
    assert drawn.shape == (rows * cell, columns * cell + max(cell // 2, 3) + cell, 3)
    assert (drawn[:, columns * cell : -cell] == 255).all()
    assert (drawn[:, -cell // 2 :] == LINE_END).all()


def test_the_page_and_the_sheet_name_base_and_canvas() -> None:
    explanation = explained(WIDE)
    page = render(explanation)
    stages, prunings = len(explanation.stages), sum(stage.pruning is not None for stage in explanation.stages)
    alts = re.findall(r'alt="([^"]*)"', page)
    assert len(alts) == len(set(alts)) == 2 * (1 + stages + prunings)
    for name in ("base", "canvas"):
        assert sum(name in alt.lower() for alt in alts) == len(alts) / 2
        assert f"<figcaption>{name.capitalize()}: " in page
    assert "14 × 14 patches" in page and "12 × 28 patches, a newline behind each row" in page
    assert "12 of 12 newlines left" in page and "Patches and newlines as they were" in page
    first = drawing.draw_stage(explanation, explanation.stages[0])
    assert draw_figure(explanation).width >= stages * max(image.width for image in first)


def test_views_of_several_images_say_which() -> None:
    page = render(explained(TALL, WIDE))
    for named in ("Image 1, base", "Image 1, canvas", "Image 2, base", "Image 2, canvas"):
        assert f"<figcaption>{named}: " in page


def test_savings_count_the_images_own_tokens_not_their_padding() -> None:
    explanation = explained(WIDE)
    rows, columns = SEEN[WIDE]
    own = GRID**2 + rows * (columns + 1)
    padded = explanation.dense.plan.visual_tokens
    assert explanation.stages[0].visual == own < padded
    assert summary.savings(explanation)[0].dense == str(own)
    assert any(f"padded from {own} to {padded}" in note for note in summary.notes(explanation))


def test_a_patch_without_a_token_is_left_blank(tmp_path: Path) -> None:
    """A SigLIP tower whose first hidden state, a patch, is dropped."""
    with pytest.warns(UserWarning, match="first patch is lost"):
        model = sv.load(tiny_llava(tmp_path, layers=4, tower="siglip_vision_model", image_size=84))
    explanation = explain(model, [slope((84, 84))], "what is it?", sv.sparsity("v1.5", keep=9), max_new_tokens=2)
    (view,) = explanation.views
    assert view.tokens.reshape(-1).tolist() == [ABSENT, *range(35)]
    assert (view.pixels[:14, :14] == 255).all() and view.pixels[:14, 14:28, 2].max() < 255
    cell = drawing.cell_size(view.tokens.shape)
    for image in drawing.draw_stage(explanation, explanation.stages[-1]):
        assert (np.asarray(image)[4 : cell - 4, 4 : cell - 4] == 255).mean() > 0.9
    assert any("1 patch of the image, left blank here" in note for note in summary.notes(explanation))
    assert "35 patches kept" in render(explanation)
