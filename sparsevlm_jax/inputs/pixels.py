"""Images and frames of videos to what a tower takes, by the checkpoint's image processor.

Axis letters: t tiles or frames, S pixels per side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sparsevlm_jax import bounds
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError, first_line
from sparsevlm_jax.inputs.images import ImageLike, image_name, open_image, pad_to_square
from sparsevlm_jax.inputs.video import Sampling, VideoLike, read_video, video_name
from sparsevlm_jax.layout import ImageLayout


class Visual(NamedTuple):
    """An image or a video, and its visual tokens."""

    pixels: np.ndarray  # float32 [t, 3, S, S]
    layout: ImageLayout


class Preparation:
    """What makes pixels for a model.

    Args:
      image_processor: as transformers loads it.
      config: the model that they are for.
    """

    def __init__(self, image_processor: Any, config: ModelConfig) -> None:
        self.image_processor = image_processor
        self.config = config

    def image(self, source: ImageLike | Visual, aspect: str | None) -> Visual:
        """An image, in one tile or padded to the most that an image of this family has; one that is prepared, as it is.

        Raises:
          UserError: it cannot be read, does not become [3, S, S], or the family knows no aspect.
        """
        if isinstance(source, Visual):
            return source
        image, name = open_image(source), image_name(source)
        layout, tiles = self.config.image_layout((image.height, image.width)), self.config.most_tiles
        if tiles == 1:
            return Visual(self._square(image, name, aspect)[None], layout)
        if aspect is not None:
            raise UserError(f"{name}: {self.config.model_type} shows an image in its own shape: leave `aspect` out")
        pixels = self._processed(image, name, self.config.image_options, layout.tiles)
        padded = np.pad(pixels, ((0, tiles - layout.tiles), *[(0, 0)] * 3))
        return Visual(padded, layout)

    def video(self, source: VideoLike | Visual, sampling: Sampling, aspect: str | None) -> Visual:
        """Some frames of a video, each prepared as an image; one that is prepared, as it is.

        Raises:
          UserError: it cannot be read, or the family has no videos.
        """
        if isinstance(source, Visual):
            return source
        layout, name = self.config.video_layout(sampling.frames), video_name(source)
        frames = read_video(source, *sampling)
        pixels = [self._square(Image.fromarray(frame), name, aspect) for frame in frames]
        return Visual(np.stack(pixels), layout)

    def _square(self, image: Image.Image, name: str, aspect: str | None) -> np.ndarray:
        """An image of one tile, float32 [3, S, S]."""
        side = self.config.vision.image_size
        square = {"height": side, "width": side}
        long, short = max(image.size), min(image.size)
        pads = aspect == "pad" or (aspect is None and getattr(self.image_processor, "do_pad", False))
        edge = side if aspect else max(side, _edge(self.image_processor))
        if (long**2 if pads else edge**2 * long / short) > bounds.PIXELS:
            size = f"{image.width} x {image.height}"
            raise UserError(f"{name}: {size} is too large or too narrow to prepare, scale or cut it first")

        options: dict[str, Any] = {}
        if aspect == "crop":
            options = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
        elif aspect == "pad":
            image = pad_to_square(image, self.image_processor.image_mean)
            options = {"size": square, "do_center_crop": False}
        if options:
            options |= {"do_resize": True, "do_pad": False}
        return self._processed(image, name, options, None)

    def _processed(self, image: Image.Image, name: str, options: dict[str, Any], tiles: int | None) -> np.ndarray:
        """What the checkpoint's image processor makes of an image, float32 [3, S, S], or of `tiles` such."""
        side = self.config.vision.image_size
        wanted = (3, side, side) if tiles is None else (tiles, 3, side, side)
        try:
            pixels = self.image_processor([image], return_tensors="np", **options)["pixel_values"][0]
        except Exception as error:  # the settings of a file, so any type
            raise UserError(f"{name}: the checkpoint's image processor fails: {first_line(error)}") from error
        if pixels.shape != wanted:
            mend = ": choose the aspect crop or pad" if tiles is None else ""
            raise UserError(
                f"{name}: the checkpoint's image processor makes {list(pixels.shape)}, but the model takes "
                f"{list(wanted)}{mend}"
            )
        pixels = np.asarray(pixels, np.float32)
        if not np.isfinite(pixels).all():
            raise UserError(f"{name}: the checkpoint's image processor makes NaN or infinity: its settings are wrong")
        return pixels


def _edge(image_processor: Any) -> int:
    """The longest side that an image processor scales an image's shorter one to, 0 where it states none."""
    return max(dict(getattr(image_processor, "size", None) or {}).values(), default=0)
