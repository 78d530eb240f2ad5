"""The command `sparsevlm explain`. What draws is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsevlm_jax import files
from sparsevlm_jax.cli.options import (
    Aspect,
    MaxNewTokens,
    ModelOptions,
    PruningOptions,
    Seed,
    VideoOptions,
    require_readable,
    spread_options,
)
from sparsevlm_jax.errors import UserError


@spread_options
def explain(
    *,
    question: Annotated[str, typer.Option(metavar="TEXT", help="The question about the images or videos.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.html", help="The page to write.")],
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="An image; repeat it for several in one prompt.")
    ] = None,
    videos: VideoOptions,
    png: Annotated[bool, typer.Option("--png", help="Also write the same as one image, OUT.png.")] = False,
    source: ModelOptions,
    pruning: PruningOptions,
    max_new_tokens: MaxNewTokens = 128,
    seed: Seed = 0,
    aspect: Aspect = None,
) -> None:
    """Shows on one page what was kept, merged and dropped of an image or a video, and why."""
    from sparsevlm_jax.explain.drawing import png as encode_png
    from sparsevlm_jax.explain.figure import draw_figure
    from sparsevlm_jax.explain.page import render
    from sparsevlm_jax.explain.trace_run import explain as record
    from sparsevlm_jax.explain.trace_run import require_shown

    sparsity = pruning.sparsity(seed=seed)
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"-o {output}: a page is written, give a name that ends in .html")
    files.require_writable(output)
    require_readable(image or [], [question])
    videos.require_readable()
    require_shown(image or [], videos.files)
    shown = {"aspect": aspect, "videos": videos.files, "sampling": videos.rule}
    explanation = record(source.load(), image or [], question, sparsity, max_new_tokens=max_new_tokens, **shown)
    written = [output]
    files.write(output, render(explanation).encode())
    if png:
        written.append(output.with_suffix(".png"))
        files.write(written[-1], encode_png(draw_figure(explanation)))
    print("\n".join(map(str, written)))
