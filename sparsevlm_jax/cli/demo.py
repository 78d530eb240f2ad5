"""The command `sparsevlm demo`: held-out images that the embedded model has never seen, dense against pruned."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import typer
from PIL import Image

from sparsevlm_jax import files
from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.cli.options import ModelOptions, PruningOptions, spread_options
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.api import require_finite, require_processor, settings_for
from sparsevlm_jax.generation.request import GenerationRequest
from sparsevlm_jax.pruning.settings import Sparsity

if TYPE_CHECKING:  # rich is imported when something is printed
    from rich.table import Table
    from rich.text import Text

IMAGES, PREFILLS, MAX_NEW_TOKENS = 3, 5, 8
PIXELS_PER_PATCH = 4  # in a terminal, where a character is two pixels high


class Reply(NamedTuple):
    """An answer, and what its prefill took in.

    Attributes:
      visual_tokens: those that entered each stage.
      prefill_seconds: median of several, the first left out.
    """

    answer: str
    visual_tokens: list[int]
    mean_tokens: float
    prefill_seconds: float
    compile_seconds: float


@spread_options
def walk_through(
    *,
    pruning: PruningOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the images of what was kept go.")
    ] = Path("out/demo"),
) -> None:
    """Asks the embedded model about three images, dense and pruned, and shows what was kept."""
    from rich.console import Console

    from sparsevlm_jax.explain.drawing import draw_stage, png
    from sparsevlm_jax.explain.figure import draw_figure
    from sparsevlm_jax.explain.trace_run import explain

    sparsity, console = pruning.sparsity(), Console(highlight=False)
    _make_folder(output)
    model = ModelOptions().load()
    for number, sample in enumerate(demo_model.samples()[:IMAGES], start=1):
        question, truth = sample.questions[0]
        replies = {s.method: reply(model, sample.image, question, s) for s in (Sparsity.dense(), sparsity)}
        explanation = explain(model, [sample.image], question, sparsity, max_new_tokens=MAX_NEW_TOKENS)
        file = output / f"{number}-{sample.image.stem}.png"
        files.write(file, png(draw_figure(explanation)))
        console.print(
            f"\n{number}. {sample.image.name}: {question}  (true answer: {truth})", style="bold", markup=False
        )
        console.print(_table(replies))
        if console.is_terminal:
            console.print(in_characters(draw_stage(explanation, explanation.stages[-1])[0], model.config.vision.grid))
        console.print(f"what was kept: {file}", markup=False, soft_wrap=True)


def reply(model: Model, image: Path, question: str, sparsity: Sparsity) -> Reply:
    """Answers, and times the prefill: compiling apart, then once to warm up, then the median of a few."""
    processor = require_processor(model)
    inputs = processor([[image]], [question])
    settings = settings_for(model, sparsity, MAX_NEW_TOKENS)
    run = GenerationRequest(model.params, model.config, inputs.ids, inputs.images, **settings)
    state, seconds = run.prefill(), []
    compile_seconds = run.compile_seconds
    for _ in range(PREFILLS):
        state = run.prefill()
        seconds.append(run.prefill_seconds)
    result = require_finite(run.result(run.decode(state, MAX_NEW_TOKENS)), model.params)
    visual = result.visual_tokens[0]
    answer = processor.decode(result.tokens[0])
    return Reply(answer, visual, result.plan.entering_tokens(visual), statistics.median(seconds), compile_seconds)


def in_characters(image: Image.Image, grid: int) -> Text:
    """An image as half blocks, two pixels to a character."""
    from rich.text import Text

    side = grid * PIXELS_PER_PATCH
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX))
    text = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            text.append("▀", "rgb({},{},{}) on rgb({},{},{})".format(*above, *below))
        text.append("\n")
    return text


def _table(replies: dict[str, Reply]) -> Table:
    from rich.table import Table

    table = Table("", "answer", "visual tokens entering", "per layer", "prefill", "compile")
    for name, said in replies.items():
        entering = " > ".join(map(str, said.visual_tokens))
        prefill, compiling = f"{1000 * said.prefill_seconds:.1f} ms", f"{said.compile_seconds:.1f} s"
        table.add_row(name, said.answer, entering, f"{said.mean_tokens:.1f}", prefill, compiling)
    return table


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made: {error.strerror or error}") from error
