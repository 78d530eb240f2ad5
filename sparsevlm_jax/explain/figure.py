"""An explanation as one image, for slides and papers: the question, the words, and a column per stage.

Its letters are Pillow's own Latin font, the same on every machine; the page has all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from sparsevlm_jax.explain import summary
from sparsevlm_jax.explain.drawing import INK, colour_map, draw_pruning, draw_stage, font
from sparsevlm_jax.explain.trace_run import Explanation, Stage
from sparsevlm_jax.explain.views import View, in_rows
from sparsevlm_jax.explain.words import Word

GAP, LETTERS, LARGE = 24, 24, 40  # pixels
IN_A_ROW = 8  # frames
SOFT, ACCENT, WHITE = (89, 89, 89), (0, 63, 107), (255, 255, 255)


def draw_figure(explanation: Explanation) -> Image.Image:
    """The whole of it."""
    dense, pruned = summary.answers(explanation)
    method = explanation.pruned.plan.sparsity.method
    columns = [_column(explanation, stage) for stage in explanation.stages]
    stages = _below(columns, GAP) if explanation.videos else _beside(columns)
    width = max(stages.width, 900)
    savings = [f"{s.name}: {s.pruned} of {s.dense} ({s.change})" for s in summary.savings(explanation)]
    said = [f"Dense: {dense.text}", f"Pruned ({method}): {pruned.text}", summary.verdict(explanation)]
    key = (
        f"Framed words rate {summary.shown(explanation)}. Clear patches were kept, tinted and numbered ones merged, "
        "struck-through ones dropped. "
        f"Maps: scores ({summary.scored_by(explanation)}), the kept framed."
    )
    parts = [_text(explanation.question, width, LARGE), *(_text(line, width) for line in said)]
    parts += [_words(explanation.words.after, width), stages, _text(key, width, colour=SOFT)]
    parts += [_text(line, width, colour=SOFT) for line in [*savings, *summary.notes(explanation)]]
    inner = _below(parts)
    figure = Image.new("RGB", (inner.width + 2 * GAP, inner.height + 2 * GAP), WHITE)
    figure.paste(inner, (GAP, GAP))
    return figure


def _column(explanation: Explanation, stage: Stage) -> Image.Image:
    """A stage from top to bottom: name, counts, images, what the pruning did, score maps."""
    views, drawings, pruning = explanation.views, draw_stage(explanation, stage), stage.pruning
    names = [summary.view_name(view, explanation) for view in views]
    counts = [summary.fates_of(view, stage) for view in views]
    told = [name and f"{name}: {count}" for name, count in zip(names, counts, strict=True)]
    drawn = _named(views, told, drawings, lines=4 if explanation.videos else 2)
    width = max(part.width for part in drawn)
    parts = [
        _text(summary.stage_name(stage), width, 1.2 * LETTERS),
        _text(summary.entering(stage), width, colour=SOFT, lines=2),
    ]
    parts += drawn
    if pruning is not None:
        maps, low, high = draw_pruning(explanation, pruning)
        parts.append(_text(f"Then {summary.outcome(pruning)}", width, lines=2))
        parts += _named(views, names, maps, lines=1)
        parts.append(_scale(width, low, high))
    return _below(parts, gap=GAP // 3)


def _named(
    views: Sequence[View], names: Sequence[str], drawings: Sequence[Image.Image], lines: int
) -> list[Image.Image]:
    """Drawings, each below its name where it has one; the frames of a video beside each other."""
    cells = []
    for name, drawing in zip(names, drawings, strict=True):
        head = [_text(name, drawing.width, 0.75 * LETTERS, SOFT, lines)] if name else []
        cells.append(_below([*head, drawing], gap=GAP // 3))
    rows = (row[at : at + IN_A_ROW] for row in in_rows(views, cells) for at in range(0, len(row), IN_A_ROW))
    return [_beside(row, gap=GAP // 2) for row in rows]


def _words(words: Sequence[Word], width: int) -> Image.Image:
    """The words that may rate, relevance below each; raters framed, the template's words grey."""
    chips = [_chip(word) for word in words]
    rows, used = [[]], 0
    for chip in chips:
        if rows[-1] and used + chip.width > width:
            rows, used = [*rows, []], 0
        rows[-1].append(chip)
        used += chip.width + GAP // 3
    return _below([_beside(row, gap=GAP // 3) for row in rows if row], gap=GAP // 3)


def _chip(word: Word) -> Image.Image:
    share = f"{100 * word.relevance:.1f} %"
    label = word.text.replace("⏎", "(line end)")
    width = int(max(font(LETTERS).getlength(label), font(LETTERS * 0.7).getlength(share))) + GAP
    chip = Image.new("RGB", (width, 2 * LETTERS + GAP // 2), WHITE)
    draw = ImageDraw.Draw(chip)
    draw.text((width / 2, LETTERS * 0.85), label, INK if word.asked else SOFT, font(LETTERS), anchor="mm")
    draw.text((width / 2, LETTERS * 1.85), share, SOFT, font(LETTERS * 0.7), anchor="mm")
    if word.rates:
        draw.rectangle((0, 0, width - 1, chip.height - 1), outline=ACCENT, width=3)
    return chip


def _scale(width: int, low: float, high: float) -> Image.Image:
    """The colour map with its ends."""
    bar = colour_map(np.linspace(0, 1, width))[None].repeat(LETTERS // 2, axis=0)
    ends = _text(f"{low:.2g} to {high:.2g} and more", width, LETTERS * 0.75, SOFT)
    return _below([Image.fromarray(np.round(bar).astype(np.uint8)), ends], gap=4)


def _text(
    text: str, width: int, size: float | int = LETTERS, colour: tuple[int, int, int] = INK, lines: int = 1
) -> Image.Image:
    """Wrapped text, at least so many lines high."""
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        found = [*found[:-1], longer] if font(size).getlength(longer) <= width else [*found, word]
    height = round(1.3 * size)
    image = Image.new("RGB", (width, height * max(len(found), lines)), WHITE)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(found):
        draw.text((0, number * height), line, colour, font(size))
    return image


def _below(images: Sequence[Image.Image], gap: int = GAP // 2) -> Image.Image:
    """Images from top to bottom."""
    size = max((i.width for i in images), default=1), sum(i.height + gap for i in images) - gap * bool(images)
    whole, y = Image.new("RGB", (size[0], max(size[1], 1)), WHITE), 0
    for image in images:
        whole.paste(image, (0, y))
        y += image.height + gap
    return whole


def _beside(images: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Images from left to right."""
    turned = [image.transpose(Image.Transpose.TRANSPOSE) for image in images]
    return _below(turned, gap).transpose(Image.Transpose.TRANSPOSE)
