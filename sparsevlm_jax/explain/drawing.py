"""Images of what was kept, merged and dropped, and of scores. NumPy and Pillow only.

Kept patches are clear, merged ones tinted and numbered, dropped ones faded and struck through: no statement is made by
colour alone.

Axis letters: h rows and w columns of a view, v values.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from sparsevlm_jax.explain.provenance import ABSENT, DROPPED
from sparsevlm_jax.explain.trace_run import Explanation, Pruning, Stage
from sparsevlm_jax.explain.views import View, values_at

SIDE = 480  # pixels of a drawing's longer side, about: patches are all of the same size
FRAME_SIDE = 240  # of a frame, beside others
MARK = 48  # of a class token
READABLE = 14  # pixels of a patch at least, for the number in it
RGB = tuple[int, int, int]
# Okabe and Ito's palette, without black, ordered so that neighbours differ in lightness too.
TINTS: tuple[RGB, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
)
# Cividis (Nunez, Anderton, Renslow 2018) at nine even steps: lightness rises evenly, for every kind of colour vision.
CIVIDIS: tuple[RGB, ...] = (
    (0, 34, 78),
    (28, 54, 110),
    (66, 77, 109),
    (96, 100, 112),
    (124, 123, 120),
    (155, 147, 118),
    (188, 174, 108),
    (222, 202, 88),
    (254, 232, 56),
)
INK, PAPER, STROKE = (26, 26, 26), (246, 246, 246), (168, 168, 168)


def tint(number: int) -> RGB:
    """Colour of a merged token. Colours come again after seven, numbers do not."""
    return TINTS[(number - 1) % len(TINTS)]


def draw_view(view: View) -> Image.Image:
    """What the model saw."""
    return _set_apart(enlarge(view.pixels, view.tokens.shape, _side(view)), view)


def draw_stage(explanation: Explanation, stage: Stage) -> list[Image.Image]:
    """What a stage's layers see of every view; where the method shrinks images, the cells that it makes."""
    if explanation.pruned.plan.grid is not None:
        return [draw_cells(view.pixels, len(view.tokens)) for view in explanation.views]

    def draw(view: View, tokens: Int[np.ndarray, "h w"], side: int) -> Image.Image:
        return draw_fates(view.pixels, values_at(tokens, stage.outcomes, ABSENT), side)

    return [_with_class_token(view, draw) for view in explanation.views]


def draw_pruning(explanation: Explanation, pruning: Pruning) -> tuple[list[Image.Image], float, float]:
    """Heat maps of the scores in every view, and the ends of their scale."""
    low, high = score_range(pruning.scores)

    def draw(view: View, tokens: Int[np.ndarray, "h w"], side: int) -> Image.Image:
        return draw_scores(
            values_at(tokens, pruning.scores, -np.inf), values_at(tokens, pruning.chosen), low, high, side
        )

    return [_with_class_token(view, draw) for view in explanation.views], low, high


def draw_cells(image: UInt8[np.ndarray, "S S 3"], grid: int) -> Image.Image:
    """The image under lines between the cells that enter the decoder."""
    drawn, cell = enlarge(image, (grid, grid)), cell_size((grid, grid))
    draw = ImageDraw.Draw(drawn)
    for at in range(cell, drawn.width, cell):
        for line in ((at, 0, at, drawn.height), (0, at, drawn.width, at)):
            draw.line(line, (255, 255, 255), 4)
            draw.line(line, INK, 2)
    return drawn


def draw_fates(
    image: UInt8[np.ndarray, "height width 3"], outcomes: Int[np.ndarray, "h w"], side: int = SIDE
) -> Image.Image:
    """The image with its patches as they stand: see `provenance` for the outcomes, and `ABSENT`."""
    cell = cell_size(outcomes.shape, side)
    clear = np.asarray(enlarge(image, outcomes.shape, side))
    grey = np.asarray(Image.fromarray(clear).convert("L"), np.float32)[..., None]
    outcome = _by_pixel(outcomes, cell)[..., None]
    colours = np.array([tint(n) for n in range(1, max(int(outcomes.max()), 1) + 1)], np.float32)
    pixels = np.where(outcome == DROPPED, 0.2 * grey + 0.8 * np.array(PAPER), clear)
    pixels = np.where(outcome > 0, 0.45 * clear + 0.55 * colours[np.maximum(outcome[..., 0], 1) - 1], pixels)
    drawn = Image.fromarray(np.round(pixels).astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    _strike(draw, outcomes == DROPPED, cell)
    _outline(draw, outcomes, cell)
    for (row, column), number in np.ndenumerate(outcomes):
        if number > 0:
            _label(draw, str(number), (column + 0.5) * cell, (row + 0.5) * cell, cell)
    return drawn


def draw_scores(
    scores: Float[np.ndarray, "h w"], chosen: Bool[np.ndarray, "h w"], low: float, high: float, side: int = SIDE
) -> Image.Image:
    """A heat map from `low` to `high`; patches that stay are framed, those dropped before struck through (nan), and
    those without a token left blank (minus infinity)."""
    cell = cell_size(scores.shape, side)
    gone, blank = np.isnan(scores), ~np.isfinite(scores)
    share = np.clip((np.where(blank, low, scores) - low) / max(high - low, 1e-30), 0, 1)
    colours = np.where(blank[..., None], np.array(PAPER, np.float64), colour_map(share))
    image = Image.fromarray(np.round(_by_pixel(colours, cell)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    _strike(draw, gone, cell)
    for (row, column), stays in np.ndenumerate(chosen):
        if stays:
            box = (column * cell + 1, row * cell + 1, (column + 1) * cell - 2, (row + 1) * cell - 2)
            draw.rectangle(box, outline=INK if share[row, column] > 0.5 else (255, 255, 255), width=max(cell // 14, 1))
    return image


def score_range(scores: Float[np.ndarray, "v"]) -> tuple[float, float]:
    """Ends of the colour map: the lowest score and the 98th percentile, so that one outlier does not flatten all."""
    return float(np.nanmin(scores)), float(np.nanpercentile(scores, 98))


def colour_map(share: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    """Cividis at shares of 0 to 1."""
    steps = np.linspace(0, 1, len(CIVIDIS))
    return np.stack([np.interp(share, steps, channel) for channel in np.array(CIVIDIS).T], axis=-1)


def enlarge(image: UInt8[np.ndarray, "height width 3"], shape: tuple[int, int], side: int = SIDE) -> Image.Image:
    """A view of so many rows and columns at the size of drawings, a whole number of pixels per patch."""
    cell, (rows, columns) = cell_size(shape, side), shape
    return Image.fromarray(image).resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)


def cell_size(shape: tuple[int, ...], side: int = SIDE) -> int:
    """Pixels per side of a patch in drawings of so many rows and columns, whose longer side has about `side`."""
    return max(round(side / max(shape)), READABLE)


def font(size: float | int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size)


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _side(view: View) -> int:
    return FRAME_SIDE if view.is_frame else SIDE


def _with_class_token(view: View, draw: Callable[[View, np.ndarray, int], Image.Image]) -> Image.Image:
    """A view as `draw` has it; its class token, above a gap, as all of the view in a small square.

    Args:
      draw: given the view, the numbers of visual tokens [h, w] and pixels of the longer side.
    """
    image = _set_apart(draw(view, view.tokens, _side(view)), view)
    if view.class_token == ABSENT:
        return image
    whole = Image.new("RGB", (image.width, image.height + MARK + MARK // 4), (255, 255, 255))
    whole.paste(draw(view, np.array([[view.class_token]]), MARK), (0, 0))
    whole.paste(image, (0, MARK + MARK // 4))
    return whole


def _set_apart(image: Image.Image, view: View) -> Image.Image:
    """The newline tokens of a canvas as a column of its own, behind a gap."""
    if not view.newlines:
        return image
    rows, columns = view.shape
    cell = image.height // rows
    gap = max(cell // 2, 3)
    apart = Image.new("RGB", (image.width + gap, image.height), (255, 255, 255))
    apart.paste(image.crop((0, 0, columns * cell, image.height)), (0, 0))
    apart.paste(image.crop((columns * cell, 0, image.width, image.height)), (columns * cell + gap, 0))
    return apart


def _by_pixel(values: Shaped[np.ndarray, "h w *rest"], cell: int) -> Shaped[np.ndarray, "height width *rest"]:
    return values.repeat(cell, axis=0).repeat(cell, axis=1)


def _strike(draw: ImageDraw.ImageDraw, where: Bool[np.ndarray, "h w"], cell: int) -> None:
    """A diagonal stroke through patches."""
    inset = cell // 4
    for row, column in np.argwhere(where):
        left, top = int(column) * cell, int(row) * cell
        draw.line((left + inset, top + cell - inset, left + cell - inset, top + inset), STROKE, max(cell // 20, 1))


def _outline(draw: ImageDraw.ImageDraw, outcomes: Int[np.ndarray, "h w"], cell: int) -> None:
    """A line wherever neighbouring patches have different outcomes."""
    width = max(cell // 14, 1)
    for row, column in np.argwhere(outcomes[:, 1:] != outcomes[:, :-1]).tolist():
        x = (column + 1) * cell
        draw.line((x, row * cell, x, (row + 1) * cell), INK, width)
    for row, column in np.argwhere(outcomes[1:] != outcomes[:-1]).tolist():
        y = (row + 1) * cell
        draw.line((column * cell, y, (column + 1) * cell, y), INK, width)


def _label(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, cell: int) -> None:
    size = cell * (0.55 if len(text) < 3 else 0.4)
    draw.text((x, y), text, INK, font(size), anchor="mm", stroke_width=max(cell // 16, 1), stroke_fill=(255, 255, 255))
