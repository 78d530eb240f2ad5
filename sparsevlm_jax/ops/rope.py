"""Rotary position embeddings: which frequencies a checkpoint turns its channels by, and the turning.

Axis letters: b batch, l sequence length, n heads, h head dim, a axes of a position (one for text; three, for time,
height and width, in M-RoPE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsevlm_jax.errors import UserError

TYPES = ("default", "linear", "llama3", "yarn")  # "dynamic" and "longrope" hang on the running length


@dataclass(frozen=True)
class Rope:
    """The turning of each pair of channels. Hashable: part of a static configuration.

    Attributes:
      frequencies: radians per position of each pair, h / 2 of them, exact in float32.
      axes: which axis of a position turns each pair; all 0 where positions have one axis.
      scale: what cosines and sines are multiplied by (YaRN, section 3.4).
    """

    frequencies: tuple[float, ...]
    axes: tuple[int, ...]
    scale: float = 1.0

    @property
    def head_dim(self) -> int:
        return 2 * len(self.frequencies)


def plain_rope(head_dim: int, theta: float) -> Rope:
    """1 / theta^(2i/h) on one axis (RoFormer, section 3.2.2)."""
    return _one_axis(_inverse_powers(head_dim, theta))


def rope_from_hf(parameters: Mapping[str, Any], head_dim: int, source: str) -> Rope:
    """The rotary embedding that a text configuration asks for.

    Args:
      parameters: `rope_parameters` of transformers 5.x; `rope_scaling` with `rope_theta` of 4.x has the same names.
      source: what to call the file in errors.

    Raises:
      UserError: a type whose frequencies hang on the running length, or an entry that is missing or no number.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in TYPES:
        raise UserError(f'{source}: rope type "{kind}" is not supported, only {", ".join(TYPES)}')

    def number(key: str, default: float | None = None) -> float:
        value = parameters.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise UserError(f"{source}: {key} of the rope parameters is {value}, expected a positive number")
        return float(value)

    frequencies = _inverse_powers(head_dim, number("rope_theta"))
    if kind == "linear":
        return _one_axis(frequencies / np.float32(number("factor")))
    if kind == "llama3":
        reach = number("original_max_position_embeddings")
        low, high = number("low_freq_factor"), number("high_freq_factor")
        return _one_axis(_llama3(frequencies, number("factor"), low, high, reach))
    if kind == "yarn":
        return _yarn(head_dim, parameters, number, source)
    return _one_axis(frequencies)


def turn(positions: Int[Array, "b l a"], rope: Rope) -> tuple[Float[Array, "b l half"], Float[Array, "b l half"]]:
    """Cosine and sine of every pair's angle, float32: position on the pair's axis times its frequency."""
    axes = sorted(set(rope.axes))
    on_axis = positions.astype(jnp.float32)
    on_axis = on_axis[..., axes[0] : axes[0] + 1] if len(axes) == 1 else on_axis[..., np.asarray(rope.axes)]
    angles = on_axis * np.asarray(rope.frequencies, np.float32)[None, None, :]
    if rope.scale == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * np.float32(rope.scale), jnp.sin(angles) * np.float32(rope.scale)


def apply_rope(x: Float[Array, "b l n h"], positions: Int[Array, "b l a"], rope: Rope) -> Float[Array, "b l n h"]:
    """Rotates queries or keys by their positions; channel i pairs with i + h/2, as in Hugging Face's Llama."""
    cos, sin = (table[:, :, None, :] for table in turn(positions, rope))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _one_axis(frequencies: np.ndarray, scale: float = 1.0) -> Rope:
    return Rope(tuple(float(f) for f in frequencies.astype(np.float32)), (0,) * len(frequencies), scale)


def _inverse_powers(head_dim: int, theta: float) -> Float[np.ndarray, "half"]:
    """1 / theta^(2i/h) in float32.

    Made on the host and rounded as PyTorch rounds them, power first: v2.0 divides by sums of their cosines, which
    come near zero, so the last bit shows.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _llama3(frequencies: np.ndarray, factor: float, low: float, high: float, reach: float) -> np.ndarray:
    """Llama 3.1's rule: waves that fit into the original context less than `low` times are stretched by `factor`, those
    that fit more than `high` times are left alone, and in between the two are blended."""
    turns = reach * frequencies.astype(np.float64) / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float32)


def _yarn(head_dim: int, parameters: Mapping[str, Any], number: Any, source: str) -> Rope:
    """YaRN (arXiv 2309.00071, section 3): stretched by `factor` but where a channel turns often enough, blended by the
    channel's number; cosines and sines grow with the logarithm of the factor."""
    theta, factor = number("rope_theta"), number("factor")
    reach = number("original_max_position_embeddings")

    def channel_of(turns: float) -> float:
        """The (fractional) channel that turns so often within the original context."""
        return head_dim * math.log(reach / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel_of(number("beta_fast", 32.0)), channel_of(number("beta_slow", 1.0))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = (last - first) or 0.001
    stretched = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(span), 0, 1)
    frequencies = _inverse_powers(head_dim, theta)
    blended = frequencies / np.float32(factor) * stretched + frequencies * (1 - stretched)
    return _one_axis(blended, _yarn_scale(parameters, number, factor, source))


def _yarn_scale(parameters: Mapping[str, Any], number: Any, factor: float, source: str) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return number("attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return grown(number("mscale")) / grown(number("mscale_all_dim"))
    return grown(1.0)
