"""Whether parameters, prompt, cache, plan and model belong together.

What shapes tell raises before anything runs. What only data can tell turns the logits of a row into NaN: it cannot pass
for an answer, and costs a comparison per row.

Axis letters: b batch, l packed sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.inputs.packing import TiledImages
from sparsevlm_jax.models.names import DECODER
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan, require_count

if TYPE_CHECKING:  # it imports this module
    from sparsevlm_jax.models.stages import Cache, ImageFeatures, Prompt


def require_prompt(params: Any, prompt: Prompt, config: ModelConfig, plan: Plan, max_new_tokens: int) -> None:
    """Refuses a prompt that the plan was not made for, and a plan that the model was not.

    Raises:
      ValueError: naming both sides.
    """
    _require_depth(params, config, plan.stops)
    require_count("max_new_tokens", max_new_tokens)
    batch, columns, width = prompt.embeddings.shape
    if prompt.visual.shape != (batch, columns) or prompt.lengths.shape != (batch,):
        raise ValueError(
            f"the prompt's embeddings are {prompt.embeddings.shape}, but visual is {prompt.visual.shape} and lengths "
            f"{prompt.lengths.shape}: expected {(batch, columns)} and {(batch,)}"
        )
    wanted = (batch, columns, config.text.rope.position_axes)
    if prompt.positions is not None and prompt.positions.shape != wanted:
        raise ValueError(f"the prompt's positions are {prompt.positions.shape}, expected {wanted}")
    if width != config.text.hidden_size:
        raise ValueError(f"the prompt's embeddings have width {width}, the decoder has {config.text.hidden_size}")
    if prompt.add is not None:
        _require_add(prompt.add.shape, (batch, columns, config.text.num_hidden_layers, width))
    if columns < plan.visual_tokens:
        raise ValueError(f"the prompt has {columns} columns, the plan is for {plan.visual_tokens} visual tokens")
    if plan.text_tokens is not None and columns != plan.visual_tokens + plan.text_tokens:
        raise ValueError(
            f"the prompt has {columns} columns, the plan is for {plan.visual_tokens} visual and {plan.text_tokens} "
            f"other tokens, which are {plan.visual_tokens + plan.text_tokens}"
        )
    method = METHODS.get(plan.sparsity.method)
    if method is None:
        raise ValueError(f'the plan\'s method is "{plan.sparsity.method}", METHODS has {", ".join(METHODS)}')
    if method.needs_saliency and len(plan.stages) > 1 and prompt.saliency is None:
        raise ValueError(f"method {method.name} reads prompt.saliency, which is None: make the prompt with embed()")
    if plan.sparsity.per_frame and len(plan.stages) > 1 and prompt.frame is None and plan.visual_tokens:
        raise ValueError(
            "per_frame reads prompt.frame, which is None: make the prompt with embed(), of a family with videos"
        )


def require_cache(params: Any, token: Array, cache: Cache, config: ModelConfig, stops: Sequence[int]) -> None:
    """Refuses a cache of another plan or model.

    Raises:
      ValueError: naming both sides.
    """
    _require_depth(params, config, stops)
    if len(cache.keys) != stops[-1] or len(cache.values) != stops[-1]:
        raise ValueError(f"the cache has {len(cache.keys)} layers, the plan {stops[-1]}")
    stages, batch = cache.lengths.shape
    if stages != len(stops) or cache.positions.shape != cache.lengths.shape:
        raise ValueError(f"the cache has {stages} stages, the plan {len(stops)}: it was made under another plan")
    if token.shape != (batch,):
        raise ValueError(f"the tokens are {token.shape}, the cache has rows for {(batch,)}")
    slots = [key.shape[1] for key in cache.keys]
    for start, stop in zip((0, *stops), stops, strict=False):
        if len(set(slots[start:stop])) > 1:
            raise ValueError(
                f"the cache's layers {start} to {stop - 1} hold {slots[start:stop]} tokens, but are one stage of the "
                "plan: it was made under another plan"
            )


def require_tiles(images: Any, config: ModelConfig) -> None:
    """Refuses plain pixels for a family whose images are tiles, the other way round, tiles of another size, and frames
    where none are taken.

    Raises:
      ValueError: naming the family.
    """
    tiled = isinstance(images, TiledImages)
    if tiled and images.frames is not None and config.video_token_id is None:
        raise ValueError(f"{config.model_type} takes no videos")
    if tiled != config.packs_images:
        wanted = "TiledImages, which the processor makes" if config.packs_images else "pixels [m, 3, S, S]"
        raise ValueError(f"images of {config.model_type} are {wanted}")
    if not tiled:
        return
    tiles, side = config.most_tiles, config.vision.image_size
    for pixels, each in ((images.pixel_values, tiles), (images.frames, 1)):
        if pixels is not None and (pixels.shape[1:] != (3, side, side) or pixels.shape[0] % each):
            raise ValueError(f"the tiles are {pixels.shape}, expected {each} [3, {side}, {side}] for each image")


def require_features(images: ImageFeatures, rows: int, config: ModelConfig, plan: Plan | None) -> None:
    """Refuses visual tokens that are not the plan's, or not as wide as the decoder.

    Raises:
      ValueError: naming both sides.
    """
    tokens, width = images.tokens.shape
    if width != config.text.hidden_size:
        raise ValueError(f"the images' tokens have width {width}, the decoder has {config.text.hidden_size}")
    if images.rows is not None and images.rows.shape[0] not in (1, rows):
        raise ValueError(f"the images are those of {images.rows.shape[0]} rows, the prompt has {rows}")
    if plan is None or images.rows is not None:
        return
    if plan.grid is not None and images.grid is None:
        raise ValueError(f"the images are not shrunk, the plan shrinks each to {plan.grid**2} visual tokens")
    if tokens > rows * plan.visual_tokens:
        raise ValueError(
            f"the images have {tokens} visual tokens, the plan has {plan.visual_tokens} in each of {rows} rows"
        )


def holds(prompt: Prompt, plan: Plan) -> Bool[Array, "b"]:
    """Rows with no more visual tokens than the plan, nor fewer than it knows, and, where it prunes, no more others than
    there is room for."""
    visual = jnp.sum(prompt.visual, axis=1, dtype=jnp.int32)
    fits = visual <= plan.visual_tokens
    if plan.rows is not None:
        fits &= (visual == 0) | (visual >= plan.rows.counts[0])
    if len(plan.stages) > 1:
        fits &= prompt.lengths - visual <= plan.stages[0].text_tokens(prompt.visual.shape[1])
    return fits


def has_space(cache: Cache, stops: Sequence[int]) -> Bool[Array, "b"]:
    """Rows whose next token has a place in every layer."""
    fits = jnp.ones(cache.lengths.shape[1:], bool)
    for index, (start, stop) in enumerate(zip((0, *stops), stops, strict=False)):
        if start < stop:
            fits &= cache.lengths[index] < cache.keys[start].shape[1]
    return fits


def or_nan(values: Float[Array, "b *rest"], good: Bool[Array, "b"]) -> Float[Array, "b *rest"]:
    """The values of good rows, NaN in the others."""
    nothing = jnp.where(good, jnp.zeros((), values.dtype), jnp.full((), jnp.inf, values.dtype))
    nothing = (nothing - nothing).reshape(-1, *[1] * (values.ndim - 1))  # NaN is made only where a row is bad
    return jnp.where(nothing == 0, values, nothing)


def _require_add(found: tuple[int, ...], most: tuple[int, int, int, int]) -> None:
    """One addition for each of the first layers, as many as there are layers at most."""
    batch, columns, layers, width = most
    if len(found) != 4 or found != (batch, columns, found[2], width) or not 0 < found[2] <= layers:
        wanted = f"({batch}, {columns}, 1 to {layers} layers, {width})"
        raise ValueError(f"the prompt's add is {found}, expected {wanted}")


def _require_depth(params: Any, config: ModelConfig, stops: Sequence[int]) -> None:
    depth = config.text.num_hidden_layers
    if stops[-1] != depth:
        raise ValueError(f"the plan has {stops[-1]} layers, the model {depth}")
    held = sum(name.startswith("layers_") for name in params[DECODER])
    if held != depth:
        raise ValueError(f"the parameters have {held} decoder layers, the model's config says {depth}")
