"""What a plan costs: the paper's formula, and XLA's own count of the program that would run.

Both look at shapes only; no weights are made. The paper counts multiply-adds, XLA counts each as two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.inputs.packing import TiledImages, pack_images
from sparsevlm_jax.models.embedding import encode_images
from sparsevlm_jax.models.family import family_of
from sparsevlm_jax.models.parameters import abstract_params, abstract_pixels
from sparsevlm_jax.models.stages import Params, Prompt, prefill
from sparsevlm_jax.ops.attention import target
from sparsevlm_jax.pruning.budgets import cache_bytes, paper_flops
from sparsevlm_jax.pruning.plan import Plan


@dataclass(frozen=True)
class Cost:
    """Of one prompt's prefill in the decoder; the vision tower is counted apart.

    Attributes:
      paper_flops: multiply-adds by the paper's formula: no lm_head, no pruning.
      xla_flops: operations that XLA counts in the whole prefill: lm_head, scoring and recycling included.
      cache_bytes: keys and values after it, at two bytes a value.
    """

    paper_flops: int
    xla_flops: float
    cache_bytes: int


def cost(config: ModelConfig, plan: Plan, text_tokens: int) -> Cost:
    """Counts a prefill of `text_tokens` + `plan.visual_tokens` tokens, unpadded, layers unrolled, XLA attention."""
    tokens = [text_tokens + visual for visual in plan.entering()]
    return Cost(
        paper_flops(config.text, tokens), xla_flops(config, plan, text_tokens), cache_bytes(config.text, tokens, 2)
    )


def xla_flops(config: ModelConfig, plan: Plan, text_tokens: int) -> float:
    """XLA's cost analysis of the lowered decoder. Layers of a stage are alike: a second one tells what each adds."""
    layers = [stage.stop - stage.start for stage in plan.stages]
    few = [min(count, 1) for count in layers]
    flops = least = _decoder_flops(config, plan, few, text_tokens)
    for number, count in enumerate(layers):
        if count > 1:
            one_more = [*few[:number], 2, *few[number + 1 :]]
            flops += (count - 1) * (_decoder_flops(config, plan, one_more, text_tokens) - least)
    return flops


def _decoder_flops(config: ModelConfig, plan: Plan, layers: Sequence[int], text_tokens: int) -> float:
    """Of a decoder whose stages have so many layers each."""
    stops = tuple(accumulate(layers))
    stages = tuple(
        replace(stage, start=stop - count, stop=stop)
        for stage, count, stop in zip(plan.stages, layers, stops, strict=True)
    )
    plan = replace(plan, stages=stages, text_tokens=None)  # it may have been made for a padded prompt
    text = replace(config.text, num_hidden_layers=stops[-1])
    config = replace(config, text=text, attention="xla")  # a library's kernel would be opaque
    length = text_tokens + plan.visual_tokens
    prompt = jax.eval_shape(
        lambda: Prompt(
            embeddings=jnp.zeros((1, length, config.text.hidden_size), jnp.bfloat16),
            visual=jnp.zeros((1, length), bool),
            lengths=jnp.zeros(1, jnp.int32),
            saliency=jnp.zeros((1, length), jnp.float32),
        )
    )
    run = partial(prefill, config=config, plan=plan, max_new_tokens=0)
    return _flops(run, abstract_params(config, jnp.bfloat16), prompt)


def tower_xla_flops(config: ModelConfig, plan: Plan) -> float:
    """XLA's cost analysis of tower and projector for one image: of a family with tiles for as many as it has at most,
    to which every image is padded."""
    images: Any = abstract_pixels(config, config.most_tiles, jnp.bfloat16)
    if config.packs_images:
        packing = pack_images([[config.image_layout(config.fullest_image)]], config)
        images = TiledImages(images, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, packing)))
    run = partial(encode_images, config=config, plan=plan)
    return _flops(run, abstract_params(config, jnp.bfloat16), images)


def frame_xla_flops(config: ModelConfig) -> float:
    """XLA's cost analysis of tower and projector for one frame of a video."""
    encode = family_of(config).encode_frames
    assert encode is not None

    def run(params: Params, pixel_values: Array) -> tuple[Array, Array]:
        return encode(params, pixel_values, config)

    return _flops(run, abstract_params(config, jnp.bfloat16), abstract_pixels(config, 1, jnp.bfloat16))


def _flops(function, *shapes) -> float:  # noqa: ANN001, ANN002
    """Counted for the CPU, wherever the program will run: plugins of accelerators count nothing before they compile.

    Attention is written out as for accelerators: XLA counts a loop's body once.
    """
    with jax.default_device(_cpu()), target("tpu"):
        counts: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return counts["flops"]


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        settings: Any = jax.config
        platforms = settings.jax_platforms
        raise UserError(
            f"XLA counts operations on its CPU backend, which JAX_PLATFORMS={platforms} leaves out: "
            f"set JAX_PLATFORMS={platforms},cpu"
        ) from error
