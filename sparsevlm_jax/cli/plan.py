"""The command `sparsevlm plan`: what a schedule keeps and what it costs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated, Any

import jax.numpy as jnp
import typer

from sparsevlm_jax import bounds
from sparsevlm_jax.checkpoints.manifest import is_converted, read_manifest
from sparsevlm_jax.cli.compile_for import CompileOptions, print_report
from sparsevlm_jax.cli.options import Json, PruningOptions, spread_options
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import user_path
from sparsevlm_jax.inputs.images import check_pixels
from sparsevlm_jax.layout import ImageLayout
from sparsevlm_jax.models.cost import Cost, cost, frame_xla_flops, tower_xla_flops
from sparsevlm_jax.models.family import config_of
from sparsevlm_jax.models.parameters import abstract_params, tree_bytes
from sparsevlm_jax.models.presets import PRESETS
from sparsevlm_jax.pruning.budgets import make_plan
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan
from sparsevlm_jax.pruning.settings import Sparsity
from sparsevlm_jax.text import in_bytes, in_si

# What is counted: far beyond any model's context, and well within what XLA can count.
MOST_IMAGES, MOST_TEXT_TOKENS = 100, 100_000


@spread_options
def plan(
    *,
    model: Annotated[str, typer.Option(metavar="NAME_OR_DIR", help=f"{', '.join(PRESETS)}, or a folder.")],
    pruning: PruningOptions,
    images: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=MOST_IMAGES, help="Images in the prompt; default: 1, or none beside a video."
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Height and width of each image, for a model that cuts images into tiles."),
    ] = None,
    video_frames: Annotated[
        int, typer.Option(metavar="N", min=0, max=bounds.FRAMES, help="Frames of a video in the prompt.")
    ] = 0,
    text_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOST_TEXT_TOKENS, help="All tokens that are not visual.")
    ] = 118,
    compiling: CompileOptions,
    as_json: Json = False,
) -> None:
    """Shows what a schedule keeps and what it costs, against dense. Needs no weights."""
    device, sparsity = compiling.device(), pruning.sparsity()
    config, held = _model(model)
    compiling = replace(compiling, quantize=held or compiling.quantize)
    if images is None:
        images = 0 if video_frames else 1
    layouts = [_layout(config, image_size)] * images if images else []
    if video_frames:
        layouts.append(config.video_layout(video_frames))
    visual, sides = sum(layout.tokens for layout in layouts), {"dense": Sparsity.dense(), "pruned": sparsity}
    dense, pruned = (make_plan(side, config, visual, text_tokens) for side in sides.values())
    dense_cost, pruned_cost = (cost(config, p, text_tokens) for p in (dense, pruned))
    tower = tower_xla_flops(config, pruned) * images if images else 0.0
    if video_frames:
        tower += frame_xla_flops(config) * video_frames
    weights = tree_bytes(abstract_params(config, jnp.bfloat16, compiling.quantize))
    compiled = compiling.report(device, config, layouts, text_tokens, sides) if device else None
    if as_json:
        report = {
            "model": model,
            "method": pruning.method,
            "text_tokens": text_tokens,
            "dense": plan_report(dense) | asdict(dense_cost),
            "pruned": plan_report(pruned) | asdict(pruned_cost),
            "tower_xla_flops": tower,
            "parameter_bytes": weights,
            **({"compiled": compiled} if compiled else {}),
        }
        print(json.dumps(report, indent=2))
    else:
        held = f"parameters, {compiling.quantize} and 16 bit" if compiling.quantize else "parameters, 16 bit"
        _print_plan(pruned, pruned_cost, dense, dense_cost, tower, text_tokens, (held, in_bytes(weights)))
        if compiled:
            print_report(compiled)


def _model(name: str) -> tuple[ModelConfig, str | None]:
    """The configuration, and how a converted checkpoint holds its weights; None as the dtype says.

    Raises:
      UserError: no such model, or whatever is wrong with its files.
    """
    if name in PRESETS:
        return PRESETS[name](), None
    folder = user_path(name)
    if not folder.exists():
        raise UserError(f"--model {name}: neither a folder nor one of {', '.join(PRESETS)}")
    return config_of(folder), read_manifest(folder).quantize if is_converted(folder) else None


def _layout(config: ModelConfig, image_size: str | None) -> ImageLayout:
    """The visual tokens of one image.

    Raises:
      UserError: a size that is none, or none where it decides.
    """
    if image_size is None:
        if config.most_tiles > 1:
            raise UserError(
                f"--image-size: how many visual tokens an image of {config.model_type} becomes depends on its size: "
                "give height and width in pixels, as in --image-size 672x672"
            )
        return config.image_layout(config.fullest_image)
    sides = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", image_size)
    if sides is None:
        raise UserError(f"--image-size {image_size}: expected height and width in pixels, as in 480x640")
    height, width = map(int, sides.groups())
    try:
        check_pixels(width, height)
    except UserError as error:
        raise UserError(f"--image-size {image_size}: {error}") from None
    return config.image_layout((height, width))


def plan_report(plan: Plan) -> dict[str, Any]:
    """A plan as JSON has it."""
    stages = [
        {"layers": [s.start, s.stop - 1], "entering": s.visual, "standing": s.standing, "kept": s.keep}
        for s in plan.stages
        if s.start < s.stop or s.keep is not None
    ]
    return {
        "stages": stages,
        "equivalent_tokens": plan.equivalent_tokens(),
        "entering_tokens": plan.entering_tokens(),
        "counts_are_upper_bounds": METHODS[plan.sparsity.method].counts_are_bounds,
    }


def _print_plan(
    plan: Plan,
    cost: Cost,
    dense: Plan,
    dense_cost: Cost,
    tower: float,
    text_tokens: int,
    parameters: tuple[str, str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    def against(what: str, scaled: Callable[[float | int], str], of: str = "") -> str:
        value, whole = getattr(cost, what), getattr(dense_cost, what)
        change = f"{abs(1 - value / whole):.1%} {'more' if value > whole else 'less'}"
        return f"{scaled(value)}{of} (dense {scaled(whole)}, {change})"

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    stages = Table("layers", "visual tokens entering", "kept", "merged", "standing after")
    for stage in plan.stages:
        if stage.start == stage.stop and stage.keep is None:
            continue
        layers = f"{stage.start} to {stage.stop - 1}" if stage.start < stage.stop else "before the first"
        kept, merged = ("-", "-") if stage.keep is None else (str(stage.keep), str(stage.standing - stage.keep))
        stages.add_row(layers, str(stage.visual), kept, merged, str(stage.standing))
    console.print(stages)
    if METHODS[plan.sparsity.method].counts_are_bounds:
        console.print("All counts are upper bounds: the prompt and the image decide how many tokens stay.")
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("equivalent tokens (standing after a layer)", f"{plan.equivalent_tokens():.2f} of {dense.visual_tokens}"),
        ("tokens entering a layer, which is what costs", f"{plan.entering_tokens():.2f} of {dense.visual_tokens}"),
        ("FLOPs by the paper's formula", against("paper_flops", in_si, " multiply-adds")),
        ("FLOPs of the program, by XLA", against("xla_flops", in_si, ", two per multiply-add")),
        ("vision tower and projector, by XLA", f"{in_si(tower)}, in addition"),
        ("keys and values, 16 bit", against("cache_bytes", in_bytes)),
        parameters,
        ("other tokens in the prompt", str(text_tokens)),
    ):
        facts.add_row(name, value)
    console.print(facts)
