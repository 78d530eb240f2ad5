"""What a request refuses before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import jax
import numpy as np

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.inputs.packing import TiledImages
from sparsevlm_jax.models.stages import ImageFeatures


def require_limit(name: str, value: object) -> None:
    """Refuses what is no number of tokens.

    Raises:
      UserError: not an int, or below 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} is {value!r}: a whole number is expected")
    if value < 1:
        raise UserError(f"{name} {value}: at least 1")


def check_settings(
    config: ModelConfig,
    rows: Sequence[np.ndarray],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    """Refuses settings that cannot be, prompts that are empty, and those that leave no room for their answer.

    Raises:
      UserError: as it says.
    """
    require_limit("max_new_tokens", max_new_tokens)
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, Real):
            raise UserError(f"{name} is {value!r}: a number is expected")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:  # nan is neither
        raise UserError(f"temperature {temperature} must be 0 or more and top_p {top_p} must be in (0, 1]")
    longest = max((len(row) for row in rows), default=0)
    if not longest:
        raise UserError("no prompt, or an empty one: nothing to answer")
    require_room(config, longest, max_new_tokens)


def require_room(config: ModelConfig, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuses a prompt that leaves no room for its answer.

    Raises:
      UserError: both together are longer than the model's context.
    """
    if prompt_tokens + max_new_tokens > config.text.max_position_embeddings:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens and the answer may take {max_new_tokens}: "
            f"more than the model's {config.text.limit}; shorten the question or use fewer images"
        )


def check_markers(
    config: ModelConfig, rows: Sequence[np.ndarray], images: np.ndarray | TiledImages | ImageFeatures | None
) -> None:
    """Refuses rows of ids whose image markers are not as many as the visual tokens of what is given for them.

    Raises:
      UserError: they are not.
    """
    markers = [int(np.sum(row == config.image_token_id)) for row in rows]
    visual, own = _visual_tokens(images, config)
    fit = sum(markers) == visual if own is None or len(own) == 1 else markers == own
    if not fit and any(count != visual for count in markers):
        raise UserError(
            f"the ids hold {sum(markers)} image markers, but the images given become {visual} visual tokens: "
            "write one marker for each visual token of an image"
        )


def _visual_tokens(
    images: np.ndarray | TiledImages | ImageFeatures | None, config: ModelConfig
) -> tuple[int, list[int] | None]:
    """How many visual tokens images become, all together, and in each row where that is known."""
    if images is None:
        return 0, None
    rows = images.packing.rows if isinstance(images, TiledImages) else None
    if isinstance(images, ImageFeatures):
        rows = images.rows
        if rows is None:
            return len(images.tokens), None
    if rows is not None:
        own = jax.device_get(rows).tolist()
        return sum(own), own
    if config.packs_images and len(images):
        raise UserError(f"{config.model_type} takes images with their packing: give the processor's `Inputs.images`")
    return len(images) * config.tokens_per_image, None
