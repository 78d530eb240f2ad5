"""Rotary position embeddings as a checkpoint describes them: which frequencies turn its channels. No arrays of jax.

Where a token's position is decided: `pruning.positions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown

TYPES = ("default", "linear", "llama3", "yarn")  # "dynamic" and "longrope" hang on the running length


@dataclass(frozen=True)
class Rope:
    """The turning of each pair of channels. Hashable: part of a static configuration.

    Attributes:
      frequencies: radians per position of each pair, h / 2 of them, exact in float32.
      axes: which axis of a position turns each pair; all 0 where positions have one axis.
      scale: what cosines and sines are multiplied by (YaRN, section 3.4).
      theta: the base that the frequencies were made of, to describe them to others.
    """

    frequencies: tuple[float, ...]
    axes: tuple[int, ...]
    scale: float = 1.0
    theta: float = 0.0

    @property
    def head_dim(self) -> int:
        return 2 * len(self.frequencies)

    @property
    def position_axes(self) -> int:
        """How many axes a position has."""
        return 1 + max(self.axes)


def plain_rope(head_dim: int, theta: float) -> Rope:
    """1 / theta^(2i/h) on one axis (RoFormer, section 3.2.2)."""
    return _one_axis(_inverse_powers(head_dim, theta), theta)


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
        raise UserError(f"{source}: rope type {shown(kind)} is not supported, only {', '.join(TYPES)}")

    def number(key: str, default: float | None = None) -> float:
        value = parameters.get(key)
        return bounds.positive(default if value is None else value, f"{source}: {key} of text_config")

    theta = number("rope_theta")
    frequencies = _inverse_powers(head_dim, theta)
    if kind == "linear":
        return _one_axis(frequencies / np.float32(number("factor")), theta)
    if kind == "llama3":
        reach = number("original_max_position_embeddings")
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if not low < high:
            raise UserError(f"{source}: high_freq_factor of text_config is {high}, expected more than {low}")
        return _one_axis(_llama3(frequencies, number("factor"), low, high, reach), theta)
    if kind == "yarn":
        if theta == 1:
            raise UserError(f"{source}: rope_theta of text_config is 1: with yarn its logarithm must not be zero")
        return _yarn(head_dim, parameters, number)
    return _one_axis(frequencies, theta)


def _one_axis(frequencies: np.ndarray, theta: float, scale: float = 1.0) -> Rope:
    return Rope(tuple(float(f) for f in frequencies.astype(np.float32)), (0,) * len(frequencies), scale, theta)


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


def _yarn(head_dim: int, parameters: Mapping[str, Any], number: Callable[..., float]) -> Rope:
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
    return _one_axis(blended, theta, _yarn_scale(parameters, number, factor))


def _yarn_scale(parameters: Mapping[str, Any], number: Callable[..., float], factor: float) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return number("attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return grown(number("mscale")) / grown(number("mscale_all_dim"))
    return grown(1.0)
