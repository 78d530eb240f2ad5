"""Picture files and arrays to 8-bit RGB, on Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sparsevlm_jax.errors import UserError

ImageLike = str | Path | Image.Image | np.ndarray


def open_image(source: ImageLike) -> Image.Image:
    """Reads a picture as 8-bit RGB.

    A rotation noted in its EXIF data is applied. Transparent parts are composited on white. Grey (8 and 16 bit),
    palette and CMYK pictures are converted; of an animation the first frame is taken.

    Args:
      source: a file, a Pillow picture, or an array: uint8 [height, width], [height, width, 3] (RGB) or
        [height, width, 4] (RGBA), or uint16 [height, width].

    Raises:
      UserError: no such file, not a picture, damaged, too large, or colours without a defined meaning.
    """
    name = picture_name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, np.ndarray):
                return _rgb(_from_array(source))
            if isinstance(source, Image.Image):
                return _rgb(ImageOps.exif_transpose(source))
            with Image.open(source) as image:
                return _rgb(ImageOps.exif_transpose(image))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a picture, or of a kind that Pillow cannot read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{name}: has more pixels than Pillow's safety limit, scale it down first") from None
    except Exception as error:  # a damaged file surfaces as any of many unrelated types
        raise UserError(f"{name}: damaged or cut short: {str(error) or type(error).__name__}") from error


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The picture in the middle of a square of the processor's mean colour."""
    side = max(image.size)
    red, green, blue = (int(255 * channel) for channel in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def picture_name(source: ImageLike) -> str:
    """What errors call it: its file, where it has one."""
    if isinstance(source, str | Path):
        return str(source)
    return getattr(source, "filename", "") or "picture"


def _from_array(array: np.ndarray) -> Image.Image:
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    colour = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (grey or colour) or array.size == 0:
        raise UserError(
            f"an array of {array.dtype} {list(array.shape)}, expected uint8 [height, width, 3] (RGB), "
            "[height, width, 4] (RGBA) or [height, width], or uint16 [height, width]"
        )
    return Image.fromarray(array)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError("floating-point pixels have no defined range, save it with 8 bits per channel")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts 16-bit grey off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("32-bit pixels have no defined range, save it with 8 bits per channel")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
