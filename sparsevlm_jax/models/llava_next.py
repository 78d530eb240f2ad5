"""LLaVA-NeXT (1.6): an image as a small whole and as tiles of a canvas, rows closed by a newline token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.inputs.any_resolution import lay_out
from sparsevlm_jax.layout import ImageLayout, Size
from sparsevlm_jax.models.llava import NAMES as LLAVA_NAMES
from sparsevlm_jax.models.llava import Llava, LlavaConfig
from sparsevlm_jax.models.names import Row, Table
from sparsevlm_jax.models.stages import Params

# Visual tokens to which one image is padded, as shares of the most that it can have: these hold the photographs of
# common shapes (4:3, 3:2, 16:9, square, both ways) with 5 % of padding on average.
_BUCKETS = (1216, 1792, 2144, 2368, 2656, 2928)
MOST_CANVASES = 64

NAMES = Table(
    (*LLAVA_NAMES.rows, Row("", "", (("image_newline", "image_newline"),))),
    {**LLAVA_NAMES.spellings, "image_newline": ("image_newline", "model.image_newline")},
    LLAVA_NAMES.harmless,
)


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """As LLaVA-1.5, on tiles of a canvas."""

    model_type: str = "llava_next"
    # (height, width) in pixels, which images are scaled into before they are cut into tiles
    canvases: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

    def __post_init__(self) -> None:
        super().__post_init__()
        tile = self.vision.image_size
        for height, width in self.canvases:
            if height % tile or width % tile:
                raise UserError(f"image_grid_pinpoints: {height} x {width} is not made of tiles of {tile} x {tile}")
            patches = (1 + height * width // tile**2) * self.tile_tokens
            if patches > bounds.VISUAL_TOKENS:
                raise UserError(
                    f"image_grid_pinpoints: an image of {height} x {width} becomes {patches:,} visual tokens, expected "
                    f"at most {bounds.VISUAL_TOKENS:,}"
                )
        if self.tile_tokens != self.vision.grid**2:
            raise UserError(
                f'vision_feature_select_strategy is "{self.vision_feature_select_strategy}": llava_next lays out whole '
                "squares of patches, without a class token"
            )

    @property
    def image_grid(self) -> int | None:
        return None

    @property
    def tokens_per_image(self) -> int:
        """Of the image that has most: one that fills the canvas of most patches, row ends included."""
        return _fullest(self)[1]

    @property
    def most_tiles(self) -> int:
        return 1 + max(height * width for height, width in self.canvases) // self.vision.image_size**2

    @property
    def fullest_image(self) -> Size:
        return _fullest(self)[0]

    @property
    def image_options(self) -> dict[str, Any]:
        return {"image_grid_pinpoints": [list(canvas) for canvas in self.canvases]}

    def image_layout(self, size: Size) -> ImageLayout:
        return lay_out(size, self.vision.image_size, self.vision.grid, self.canvases)

    def visual_bucket(self, tokens: int) -> int:
        """Of one image one of six sizes; of more, whole images of the largest and one of the six."""
        most = self.tokens_per_image
        whole, rest = divmod(tokens, most)
        buckets = (-(-bucket * most // _BUCKETS[-1]) for bucket in _BUCKETS)
        return whole * most + (next(bucket for bucket in buckets if bucket >= rest) if rest else 0)

    @classmethod
    def own_fields(cls, full: dict[str, Any], source: str) -> dict[str, Any]:
        return super().own_fields(full, source) | {"canvases": _canvases(full["image_grid_pinpoints"], source)}


class LlavaNext(Llava):
    """`Llava` and the newline token."""

    def setup(self) -> None:
        super().setup()
        self.image_newline = self.param(
            "image_newline", nn.initializers.normal(self.config.text.hidden_size**-0.5), (self.config.text.hidden_size,)
        )


def newline_row(params: Params) -> Float[Array, "1 d"]:
    """What stands behind the patches for the packer."""
    return params["image_newline"][None]


@cache
def _fullest(config: LlavaNextConfig) -> tuple[Size, int]:
    """The canvas of most visual tokens, and how many they are."""
    counts = {canvas: config.image_layout(canvas).tokens for canvas in config.canvases}
    return max(counts.items(), key=lambda item: item[1])


def _canvases(found: Any, source: str) -> tuple[Size, ...]:
    """`image_grid_pinpoints`, whose pairs are (height, width)."""
    name, most = f"{source}: image_grid_pinpoints", bounds.SIZES["image_size"]
    if not isinstance(found, list) or not 0 < len(found) <= MOST_CANVASES:
        raise UserError(f"{name} is {shown(found)}, expected a list of up to {MOST_CANVASES} pairs")
    for pair in found:
        sides = pair if isinstance(pair, list) else []
        if len(sides) != 2 or not all(type(side) is int and 0 < side <= most for side in sides):
            raise UserError(f"{name} holds {shown(pair)}, expected [height, width] in pixels, each at most {most:,}")
    return tuple((height, width) for height, width in found)
