"""Options that several commands share, each group a dataclass that knows what its options mean together.

A command under `spread_options` names a group as one parameter and gets it as one object; typer sees its fields.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sparsevlm_jax import bounds
from sparsevlm_jax.checkpoints.load import Model, load
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import open_regular
from sparsevlm_jax.inputs.images import open_image
from sparsevlm_jax.inputs.video import RULES, SAMPLING, Sampling, frame_indices
from sparsevlm_jax.pruning.methods import METHODS, sparsity
from sparsevlm_jax.pruning.settings import BUDGETS, Sparsity
from sparsevlm_jax.text import printable

ImageFiles = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="An image; repeat it for several, leave it out for none.")
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer.")]
Seed = Annotated[int, typer.Option(metavar="S", min=0, max=2**32 - 1, help="Of sampling, and of --method random.")]
Aspect = Annotated[
    str | None, typer.Option(metavar="pad|crop", help="How images become square; default: as the checkpoint says.")
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")]

# What the library calls its settings in its messages, `name` or name=value, where an option has that name.
_SETTINGS = (
    "method|keep|keep_at|flops_share|cache_bytes|scale|bias|heads|dtype|vision_tower|visual_tokens|sides|device|ladder"
    "|per_frame|image|video|aspect|frames|sampling|shard|suffix|batch_size|max_new_tokens|mesh|quantize|offload_tower"
)
_SETTING = re.compile(rf"`({_SETTINGS})`|\b({_SETTINGS})=(\"[^\"]*\"|\([^)]*\)|[^\s:,;]+)")


@dataclass(frozen=True)
class ModelOptions:
    """Which model answers."""

    model: Annotated[str | None, typer.Option(metavar="DIR_OR_HF_ID", help="Default: the embedded demo model.")] = None
    revision: Annotated[str | None, typer.Option(metavar="R", help="Branch, tag or commit of a hub id.")] = None
    dtype: Annotated[
        str | None, typer.Option(metavar="D", help="float32, bfloat16 or float16; default: the checkpoint's.")
    ] = None

    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Hold the weights of the decoder's layers in eight bits.")
    ] = None
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare a converted checkpoint with its digests.")
    ] = True
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="tensor=N",
            help="Cut every layer over N devices; data=N shares a batch's rows; or both, by a comma.",
        ),
    ] = None

    offload_tower: Annotated[
        bool, typer.Option("--offload-tower", help="Keep the vision tower on the host but while it sees images.")
    ] = False

    def load(self) -> Model:
        held = {"quantize": self.quantize, "sharding": self.mesh, "offload_tower": self.offload_tower}
        if self.model is None:
            return load(demo_model.path(), dtype=self.dtype or demo_model.DTYPE, **held)
        return load(self.model, revision=self.revision, dtype=self.dtype, check=self.check, **held)


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a video."""

    frames: Annotated[
        int, typer.Option(metavar="N", min=1, max=bounds.FRAMES, help="Frames that are taken of each video.")
    ] = SAMPLING.frames
    sampling: Annotated[
        str,
        typer.Option(
            metavar="|".join(RULES), help="linspace: first frame to last; arange: the first of N equal parts."
        ),
    ] = SAMPLING.rule

    @property
    def rule(self) -> Sampling:
        """What the options ask for.

        Raises:
          UserError: no such rule.
        """
        frame_indices(self.frames, self.frames, self.sampling)
        return Sampling(self.frames, self.sampling)


@dataclass(frozen=True)
class VideoOptions(FrameOptions):
    """Which videos, and which of their frames."""

    video: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A video; repeat it for several.")] = None

    @property
    def files(self) -> list[Path]:
        return self.video or []

    def require_readable(self) -> None:
        """Looks at the files first, as `require_readable` does at images.

        Raises:
          UserError: a file that cannot be opened, or no such rule.
        """
        for file in self.files:
            open_regular(file).close()
        _ = self.rule


@dataclass(frozen=True)
class PruningOptions:
    """What is pruned, and how much of it."""

    method: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(METHODS)}.")] = "v1.5"
    keep: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Keep N equivalent visual tokens (mean over layers); default: a third, or as the method says.",
        ),
    ] = None
    keep_at: Annotated[
        str | None,
        typer.Option(metavar="L:K,...", help="After layer L (from 0; -1: before the first) keep K visual tokens."),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(metavar="L,...", help="Prune after these layers (from 0) instead of the method's own."),
    ] = None
    flops_share: Annotated[
        float | None, typer.Option(metavar="S", help="Or a budget: this share of the dense decoder's FLOPs, as 0.5.")
    ] = None
    cache_bytes: Annotated[
        int | None, typer.Option(metavar="BYTES", help="Or a budget for keys and values, at two bytes a value.")
    ] = None
    scale: Annotated[float | None, typer.Option(metavar="A", help="v1 only: keep int(rank * A + B) tokens.")] = None
    bias: Annotated[float | None, typer.Option(metavar="B", help="v1 only: see --scale.")] = None
    heads: Annotated[int | None, typer.Option(metavar="N", min=1, help="v2.0 only: heads to select; default: 14.")] = (
        None
    )

    per_frame: Annotated[
        bool, typer.Option("--per-frame", help="Spread what stays evenly over a video's frames; not in the papers.")
    ] = False

    def sparsity(self, **settings: float | int | None) -> Sparsity:
        """The settings that the options ask for, with further ones of the command's own.

        Raises:
          UserError: more than one budget, one that is malformed or not the method's, or layers where none prunes.
        """
        budgets = {name: getattr(self, name) for name in BUDGETS}
        given = [f"--{name.replace('_', '-')}" for name, value in budgets.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are different budgets: give one of them")
        if self.layers is not None and self.keep_at is not None:
            raise UserError("--keep-at names its layers itself: leave --layers out")
        budgets["keep_at"] = _parse_keep_at(self.keep_at)
        settings["per_frame"] = self.per_frame or None
        own = {"layers": _parse_layers(self.layers), "scale": self.scale, "bias": self.bias, "heads": self.heads}
        made = sparsity(self.method, **budgets, **own, **settings)
        if self.layers is not None and METHODS[self.method].score is None:
            raise UserError(f"--layers: {self.method} prunes after no layer")
        return made


def spread_options(command: Callable[..., None]) -> Callable[..., None]:
    """Every parameter that is a dataclass becomes one option per field, in its place."""
    groups = {
        name: hint for name, hint in get_type_hints(command).items() if isinstance(hint, type) and is_dataclass(hint)
    }
    options = {name: _options_of(group) for name, group in groups.items()}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{option.name: given.pop(option.name) for option in options[name]})
        command(**given)

    signature = inspect.signature(command, eval_str=True)
    spread = [option for name, own in signature.parameters.items() for option in options.get(name, [own])]
    vars(run)["__signature__"] = signature.replace(parameters=spread)
    return run


def as_flags(message: str) -> str:
    """The library's error, which speaks of keep=0 and `keep_at`, in the command line's words: --keep 0, --keep-at."""

    def flag(match: re.Match[str]) -> str:
        name = "--" + (match[1] or match[2]).replace("_", "-")
        if match[1]:
            return name
        pair = re.fullmatch(r"\((-?\d+), (-?\d+)\)", match[3])
        return f"{name} {pair[1]}:{pair[2]}" if pair else f"{name} {match[3]}"

    return _SETTING.sub(flag, message).replace("check=False", "--no-check")


def note(message: str) -> None:
    """A line about the run, on stderr; what a terminal would obey rather than print is written out."""
    if sys.stderr is not None:  # closed: print would take stdout instead
        print(f"sparsevlm: {printable(message)}", file=sys.stderr)


def require_readable(images: Sequence[Path], questions: Sequence[str]) -> None:
    """Looks at images and questions first: a wrong name should not cost the time to load a model.

    Raises:
      UserError: an image that cannot be read, or bytes that are no text.
    """
    if not all(_is_text(question) for question in questions):
        raise UserError("--question: not text in this terminal's encoding, which should be UTF-8")
    for image in images:
        open_image(image)


def _options_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]


def _is_text(argument: str) -> bool:
    """False where the argument has bytes that Python could not decode."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_keep_at(text: str | None) -> tuple[tuple[int, int], ...] | None:
    if text is None:
        return None
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(layer), int(count)) for layer, count in pairs)
    except ValueError:
        raise UserError(f'--keep-at "{text}": expected LAYER:COUNT,LAYER:COUNT,... as in 2:300,6:200,15:110') from None


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise UserError(f'--layers "{text}": expected L,L,... as in 2,6,15') from None
