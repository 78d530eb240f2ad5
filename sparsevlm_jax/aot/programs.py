"""The programs of an answer as shapes: what `generate` would compile for a batch of equal prompts, without arrays.

Axis letters: b batch, l packed sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.generation.loop import LoopConfig, SamplingParams, decode, shapes_of_state, start
from sparsevlm_jax.generation.request import plan_of_rows
from sparsevlm_jax.inputs.packing import NEW_TOKEN_BUCKETS, Packed, TiledImages, bucket, pack, pack_images
from sparsevlm_jax.layout import ImageLayout
from sparsevlm_jax.models.parameters import abstract_params, abstract_pixels
from sparsevlm_jax.ops.attention import target
from sparsevlm_jax.parallel.arrays import device_bytes, on_mesh_of, require_rows, shapes_on
from sparsevlm_jax.parallel.inside import BY_HEAD
from sparsevlm_jax.parallel.rules import WHOLE, Where, placement
from sparsevlm_jax.pruning.methods import METHODS
from sparsevlm_jax.pruning.plan import Plan
from sparsevlm_jax.pruning.prune import length_after
from sparsevlm_jax.pruning.settings import Sparsity


@dataclass(frozen=True)
class Prompts:
    """A batch of equal prompts.

    Attributes:
      layouts: the images and videos of one prompt.
      text_tokens: all others.
      new_tokens: the longest answer.
    """

    batch: int
    layouts: tuple[ImageLayout, ...]
    text_tokens: int
    new_tokens: int

    @property
    def visual_tokens(self) -> int:
        """Of one prompt."""
        return sum(layout.tokens for layout in self.layouts)


@dataclass(frozen=True)
class Lowered:
    """Two programs, lowered for a device, and what decides about them.

    Attributes:
      lengths: tokens that enter each stage, padding included.
      parameters, cache: bytes on each device.
      start, decode: prefill with the first token, and the decoding loop.
    """

    batch: int
    plan: Plan
    lengths: tuple[int, ...]
    parameters: int
    cache: int
    start: Any
    decode: Any


def lowered(
    config: ModelConfig,
    sparsity: Sparsity,
    prompts: Prompts,
    dtype: str,
    chip: Any,
    platform: str,
    quantize: str | None = None,
) -> Lowered:
    """Traces both programs for one chip, or for several.

    Args:
      chip: a device, or what stands for one; or a mesh of them.
      platform: of the chip; it decides how attention is computed.
      quantize: as for `load`.

    Raises:
      UserError: a budget that the prompts cannot meet, or a mesh that divides the model or the batch unevenly.
    """
    where, everywhere, by_head = _places(chip, config)
    placed = partial(shapes_on, sharding=everywhere)
    plan, packed = _planned(config, replace(sparsity, seed=None), prompts)
    decoding = LoopConfig(bucket(prompts.new_tokens, NEW_TOKEN_BUCKETS, "the answer"), greedy=True, end_tokens=(2,))
    shapes: dict[tuple[str, ...], Any]
    shapes = dict(traverse_util.flatten_dict(abstract_params(config, jnp.dtype(dtype), quantize)))
    params = traverse_util.unflatten_dict(
        {path: shapes_on(leaf, where(path, leaf.shape)) for path, leaf in shapes.items()}
    )
    require_rows(params, prompts.batch)
    sampler = placed(_sampler())
    draws = METHODS[sparsity.method].draws and sparsity.seed is not None
    seed = placed(jax.ShapeDtypeStruct((), jnp.uint32)) if draws else None
    arguments = (placed(_shape(packed.input_ids)), placed(_shape(packed.lengths)), placed(_images(config, prompts)))
    keys = placed(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts.batch)))
    with target(platform), on_mesh_of(params):
        begun = start.lower(params, *arguments, keys, sampler, seed, config=config, plan=plan, decoding=decoding)
        state = shapes_of_state(begun.out_info, everywhere, by_head)
        limit = placed(jax.ShapeDtypeStruct((), jnp.int32))
        looped = decode.lower(params, state, limit, sampler, config=config, stops=plan.stops, decoding=decoding)
        lengths = _lengths(plan, packed.text)
    return Lowered(prompts.batch, plan, lengths, device_bytes(params), device_bytes(state.cache), begun, looped)


def _places(chip: Any, config: ModelConfig) -> tuple[Where, Sharding, Sharding]:
    """Where parameters go by path and shape, where keys and values do, and everything else."""
    if isinstance(chip, Mesh):
        return placement(chip, config), NamedSharding(chip, WHOLE), NamedSharding(chip, BY_HEAD)
    one = SingleDeviceSharding(chip)
    return lambda path, shape: one, one, one


def _lengths(plan: Plan, text: int) -> tuple[int, ...]:
    found = [text + plan.visual_tokens]
    for stage in plan.stages[:-1]:
        found.append(length_after(stage, text, found[-1]))
    return tuple(found)


def _planned(config: ModelConfig, sparsity: Sparsity, prompts: Prompts) -> tuple[Plan, Packed]:
    """As `generate` plans and packs such rows; fewer visual tokens where the plan shrinks images."""
    plan = plan_of_rows(sparsity, config, _packed(config, prompts, prompts.visual_tokens))
    shrunk = None if plan.grid is None else plan.grid**2 * len(prompts.layouts)
    return plan, _packed(config, prompts, prompts.visual_tokens if shrunk is None else shrunk)


def _packed(config: ModelConfig, prompts: Prompts, visual: int) -> Packed:
    text = 0 if config.image_token_id else 1
    row = np.array([text] * prompts.text_tokens + [config.image_token_id] * visual)
    return pack([row] * prompts.batch, config.image_token_id, config.visual_bucket)


def _images(config: ModelConfig, prompts: Prompts) -> Any:
    """Their shapes as the processor hands them on; None for text alone."""
    images = sum(not layout.is_video for layout in prompts.layouts)
    if not prompts.layouts:
        return None
    if not config.packs_images:
        return abstract_pixels(config, prompts.batch * images, jnp.float32)
    packing = jax.tree.map(_shape, pack_images([prompts.layouts] * prompts.batch, config))
    frames = sum(layout.tiles for layout in prompts.layouts if layout.is_video)
    tiles, shown = (
        abstract_pixels(config, prompts.batch * number, jnp.float32) for number in (images * config.most_tiles, frames)
    )
    return TiledImages(tiles, packing, shown if frames else None)


def _sampler() -> SamplingParams:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return SamplingParams(temperature=scalar, top_p=scalar)  # pyright: ignore[reportArgumentType]


def _shape(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
