"""Tiles and their order in the prompt, against transformers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from sparsevlm_jax.inputs.any_resolution import best_canvas, lay_out
from sparsevlm_jax.layout import NEWLINE
from sparsevlm_jax.models.presets import PRESETS

CANVASES = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
TILE, GRID = 336, 24
RANDOM = np.random.default_rng(0)
SIZES = [tuple(int(n) for n in RANDOM.integers(40, 2600, 2)) for _ in range(60)]


def packed_by_transformers(size: tuple[int, int], features: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=TILE, patch_size=TILE // GRID),
        image_grid_pinpoints=[list(canvas) for canvas in CANVASES],
    )
    model: Any = SimpleNamespace(config=config)
    (packed,), _ = LlavaNextModel.pack_image_features(model, [features], [list(size)], "default", newline)
    return packed


@pytest.mark.parametrize("size", SIZES)
def test_patches_stand_where_transformers_puts_them(size: tuple[int, int]) -> None:
    layout = lay_out(size, TILE, GRID, CANVASES)
    features = torch.arange(layout.tiles * GRID**2, dtype=torch.float64).reshape(layout.tiles, GRID**2, 1)
    packed = packed_by_transformers(size, features, torch.tensor([float(NEWLINE)], dtype=torch.float64))
    np.testing.assert_array_equal(layout.index[:, 0], packed[:, 0].numpy())


@pytest.mark.parametrize(
    "size, tokens, canvas",
    [
        ((336, 336), 1176, (336, 672)),
        ((100, 100), 1176, (336, 672)),
        ((480, 640), 2340, (672, 672)),
        ((640, 480), 2352, (672, 672)),
        ((427, 640), 2144, (672, 672)),
        ((1080, 1920), 1948, (672, 672)),
        ((200, 1000), 1598, (336, 1008)),
        ((1000, 200), 1656, (1008, 336)),
        ((672, 672), 2928, (672, 672)),
        ((1024, 1024), 2928, (672, 672)),
    ],
)
def test_counts_are_those_of_published_tables(size: tuple[int, int], tokens: int, canvas: tuple[int, int]) -> None:
    for name in ("llava-next-7b", "llava-next-13b", "llava-next-mistral-7b", "llava-next-llama3-8b"):
        config = PRESETS[name]()
        assert config.image_layout(size).tokens == tokens <= config.tokens_per_image == 2928
        assert tokens <= config.visual_bucket(tokens) <= 1.6 * tokens
    assert best_canvas(size, CANVASES) == canvas


def test_places_name_the_patch() -> None:
    layout = lay_out((480, 640), TILE, GRID, CANVASES)
    base, rest = layout.places[: GRID**2], layout.places[GRID**2 :]
    assert base[25].tolist() == [0, 1, 1]
    newlines = rest[layout.index[GRID**2 :, 0] == NEWLINE]
    assert np.all(layout.line[layout.index[:, 0] == NEWLINE] == np.flatnonzero(layout.index[:, 0] == NEWLINE))
    assert newlines[:, 1].tolist() == list(range(36)) and set(newlines[:, 2]) == {48}
