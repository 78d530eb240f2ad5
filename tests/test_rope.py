"""Frequencies against transformers' own, and positions with several axes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.ops.rope import apply_rope
from sparsevlm_jax.rotary import Rope, plain_rope, rope_from_hf

PARAMETERS: list[dict[str, Any]] = [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: p["rope_type"])
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
    rope = rope_from_hf(parameters, head_dim, "config.json")
    np.testing.assert_allclose(rope.frequencies, expected.numpy(), rtol=3e-6, atol=0)
    assert rope.scale == pytest.approx(scale, rel=1e-12)
    assert rope.head_dim == head_dim


def test_yarn_at_factor_4_scales_as_the_paper_says() -> None:
    assert rope_from_hf(PARAMETERS[2], 128, "config.json").scale == pytest.approx(1.1386, abs=1e-4)


@pytest.mark.parametrize(
    "parameters, named",
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic"),
        ({"rope_type": "longrope", "rope_theta": 1e4}, "longrope"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        ({"rope_type": "default"}, "rope_theta"),
        ({"rope_type": "default", "rope_theta": float("nan")}, "rope_theta"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": "8"}, "original_max_position_embeddings"),
        (PARAMETERS[1] | {"high_freq_factor": 1.0}, "high_freq_factor"),
        (PARAMETERS[2] | {"rope_theta": 1}, "rope_theta"),
        (PARAMETERS[0] | {"factor": True}, "factor"),
    ],
)
def test_what_cannot_be_computed_is_named(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"config.json.*{named}"):
        rope_from_hf(parameters, 64, "config.json")


def test_three_equal_axes_turn_as_one_does() -> None:
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(0, 1, (2, 9, 3, 32)), jnp.float32)
    positions = jnp.asarray(random.integers(0, 3000, (2, 9, 1)), jnp.int32)
    plain = plain_rope(32, 1e4)
    sections = Rope(plain.frequencies, (0,) * 4 + (1,) * 6 + (2,) * 6)
    one = apply_rope(x, positions, plain)
    three = apply_rope(x, jnp.broadcast_to(positions, (2, 9, 3)), sections)
    np.testing.assert_array_equal(one, three)


def test_a_pair_turns_by_its_own_axis() -> None:
    rope = Rope((1.0, 1.0), (0, 1))
    x = jnp.asarray([[[[1.0, 1.0, 0.0, 0.0]]]])
    turned = apply_rope(x, jnp.asarray([[[0, 1]]]), rope)[0, 0, 0]
    np.testing.assert_allclose(turned, [1.0, np.cos(1.0), 0.0, np.sin(1.0)], atol=1e-6)


def test_a_rope_can_be_part_of_a_static_configuration() -> None:
    assert hash(plain_rope(64, 1e4)) == hash(plain_rope(64, 1e4)) and plain_rope(64, 1e4) != plain_rope(64, 5e5)
