"""The command `sparsevlm warmup`: compiles before the first question is asked."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

from sparsevlm_jax.cli.options import ImageFiles, MaxNewTokens, ModelOptions, PruningOptions, note, spread_options
from sparsevlm_jax.cli.waiting import compilation_notice
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.api import require_processor, settings_for
from sparsevlm_jax.generation.request import GenerationRequest
from sparsevlm_jax.inputs.packing import TEXT_BUCKETS, bucket


@spread_options
def warmup(
    *,
    image: ImageFiles = None,
    text: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=1, help="Text tokens of a prompt; repeat it. Default: the three shortest buckets."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Questions at a time.")] = 1,
    source: ModelOptions,
    pruning: PruningOptions,
    max_new_tokens: MaxNewTokens = 128,
) -> None:
    """Compiles the programs that later runs will need, and keeps them.

    Prompts are compiled for by length: 60 text tokens and 64 share a program. Images count by their number, and where
    a model cuts them into tiles by their size: --image stands for those to come (default: one square).
    """
    wanted = {bucket(count, TEXT_BUCKETS, "--text") for count in text or ()}
    loaded = source.load()
    settings = settings_for(loaded, pruning.sparsity(), max_new_tokens)
    side = loaded.config.vision.image_size
    inputs = require_processor(loaded)([image or [np.zeros((side, side, 3), np.uint8)]], ["?"])
    (ids,) = inputs.ids
    words = int(np.sum(ids != loaded.config.image_token_id))
    possible = [count for count in TEXT_BUCKETS if count >= words]
    if wanted and min(wanted) < words:
        raise UserError(f"--text {min(wanted)}: around an empty question a prompt has {words} text tokens already")
    for count in sorted(wanted) or possible[:3]:
        longer = np.concatenate([ids, np.full(count - words, ids[-1], ids.dtype)])
        with compilation_notice():
            request = GenerationRequest(loaded.params, loaded.config, [longer] * batch, inputs.images, **settings)
            request.decode(request.prefill(), 1)
        note(f"{count} text tokens, {request.packed.visual} visual: {request.compile_seconds:.1f} s")
