"""Video-LLaVA: images and videos, each through a CLIP tower of its own, behind one projector.

Source: transformers' `video_llava`. The class token is a visual token in each frame of a video, and dropped in images.
The authors' own layout is another model, whose video tower attends over frames: `config.refuse_temporal_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from sparsevlm_jax.config import token_id
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.layout import ImageLayout, whole_frames
from sparsevlm_jax.models.decoder import Llama
from sparsevlm_jax.models.llava import LlavaConfig, Projector, encode_by
from sparsevlm_jax.models.names import (
    DECODER_SPELLINGS,
    Table,
    decoder_rows,
    harmless,
    projector_rows,
    vision_rows,
)
from sparsevlm_jax.models.stages import Params
from sparsevlm_jax.models.towers import tower_of

IMAGE, VIDEO = "image_tower", "video_tower"
_TOWERS = {name: f"{name}.vision_model." for name in (IMAGE, VIDEO)}  # in the parameter tree and in checkpoints
_PROJECTOR = ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2.")

NAMES = Table(
    (
        *(row for name, module in _TOWERS.items() for row in vision_rows(module, name)),
        *projector_rows("linear_1", "linear_2"),
        *decoder_rows(),
    ),
    {
        **{module: (module, f"{name}.", f"model.{name}.", f"model.{module}") for name, module in _TOWERS.items()},
        **{name: (name, f"model.{name}") for name in _PROJECTOR},
        **DECODER_SPELLINGS,
    },
    harmless(*_TOWERS.values()),
)


@dataclass(frozen=True)
class VideoLlavaConfig(LlavaConfig):
    """As LLaVA-1.5, with videos; `vision` describes both towers, the strategy is about images only."""

    model_type: str = "video_llava"
    video_token_id: int | None = 32001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.video_token_id == self.image_token_id:
            raise UserError(f"image_token_index and video_token_index are both {self.image_token_id}")

    @property
    def image_grid(self) -> int | None:
        return None

    @property
    def most_tiles(self) -> int:
        return 1

    def video_layout(self, frames: int) -> ImageLayout:
        """Frame by frame, 257 tokens each for a tower of 224 pixels: the class token, then the patches row by row."""
        return whole_frames(frames, self.vision.grid, self.vision.class_tokens)

    @classmethod
    def own_fields(cls, full: dict[str, Any], source: str) -> dict[str, Any]:
        name = f"{source}: video_token_index"
        return super().own_fields(full, source) | {"video_token_id": token_id(full["video_token_index"], name)}


class VideoLlava(nn.Module):
    """As `llava.Llava`, with two towers."""

    config: VideoLlavaConfig

    def setup(self) -> None:
        self.image_tower, self.video_tower = (tower_of(self.config.vision, self.config.feature_layers) for _ in _TOWERS)
        self.multi_modal_projector = Projector(self.config)
        self.language_model = Llama(self.config.text)

    def __call__(self, pixel_values: Array, input_ids: Array) -> Array:
        """Touches every parameter once, for initialisation."""
        for tower in (self.image_tower, self.video_tower):
            features, _ = tower(pixel_values)
            self.multi_modal_projector(features)
        return self.language_model(input_ids)


def encode_image_tiles(
    params: Params, pixel_values: Float[Array, "t 3 height width"], config: VideoLlavaConfig
) -> tuple[Float[Array, "t v d"], Float[Array, "t v"]]:
    return encode_by(params, pixel_values, config, IMAGE, config.dropped)


def encode_frames(
    params: Params, pixel_values: Float[Array, "t 3 height width"], config: VideoLlavaConfig
) -> tuple[Float[Array, "t v d"], Float[Array, "t v"]]:
    """Each frame by itself; the class token stays, whatever the strategy."""
    return encode_by(params, pixel_values, config, VIDEO, 0)
