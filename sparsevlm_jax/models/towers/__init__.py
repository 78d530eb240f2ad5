"""Vision towers: pixels to features, and to saliency where a tower has any."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from sparsevlm_jax.config import SiglipConfig, TowerConfig, VisionConfig
from sparsevlm_jax.models.towers.clip import ClipTower
from sparsevlm_jax.models.towers.siglip import SiglipTower

_TOWERS: dict[type[TowerConfig], type[Any]] = {VisionConfig: ClipTower, SiglipConfig: SiglipTower}


def tower_of(config: TowerConfig, feature_layers: tuple[int, ...], name: str | None = None) -> nn.Module:
    """The tower of a configuration: (pixel values [m, 3, height, width]) -> (hidden states of the feature layers [m, v,
    d], saliency [m, v])."""
    return _TOWERS[type(config)](config, feature_layers, name=name)
