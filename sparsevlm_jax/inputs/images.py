"""Image files and arrays to 8-bit RGB, on Pillow."""

from __future__ import annotations

import ctypes
import io
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, first_line
from sparsevlm_jax.files import open_regular, refuse_pointer


@runtime_checkable
class OtherArray(Protocol):
    """An array of another library: jax, torch."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...


ImageLike = str | Path | Image.Image | np.ndarray | OtherArray

# Formats that hold one image and decode it in this process: none that starts another program (EPS), none that
# decodes before its size can be looked at (ICO).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "TGA", "PCX", "QOI")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = {_UPRIGHT[tag] for tag in (5, 6, 7, 8)}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:")  # a Path has one slash of two left; C:/ is a drive
_PREFIX = 64  # bytes that tell what a file is


def open_image(source: Any) -> Image.Image:
    """Reads an image, an `ImageLike`, as 8-bit RGB.

    A rotation noted in its EXIF data is applied. Transparent parts are composited on white. Grey (8 and 16 bit),
    palette and CMYK images are converted; of an animation the first frame is taken.

    Args:
      source: a file, a Pillow image, or an array of any library that NumPy can take (jax, torch on the CPU): [height,
        width] or [height, width, 1] (grey), [height, width, 3] (RGB) or [height, width, 4] (RGBA), of uint8 or of
        floats from 0 to 1; grey ones may be uint16.

    Raises:
      UserError: no such file, not an image, damaged, more than `bounds.PIXELS`, or colours without a defined
        meaning.
    """
    with _looked_at(source) as image:
        return _rgb(_upright(image))


def image_size(source: Any) -> tuple[int, int]:
    """Height and width of what `open_image` makes of a source; of a file no more is read than that takes.

    Raises:
      UserError: as `open_image` does before it decodes.
    """
    with _looked_at(source) as image:
        width, height = image.size
        return (width, height) if _turn(image) in _ON_ITS_SIDE else (height, width)


def check_pixels(width: int, height: int) -> None:
    """Before memory is taken for an image of that size.

    Raises:
      UserError: it has none, or more than `bounds.PIXELS`.
    """
    if width < 1 or height < 1:
        raise UserError("has no pixels")
    if width * height > bounds.PIXELS:
        raise UserError(f"has more pixels than are taken ({bounds.PIXELS:,}), scale it down or cut it first")


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image in the middle of a square of the processor's mean colour."""
    side = max(image.size)
    red, green, blue = (int(255 * channel) for channel in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def clip_settings(kind: str, side: int, **more: Any) -> dict[str, Any]:
    """preprocessor_config.json of an image processor of this kind that makes images of `side` pixels for CLIP."""
    return {
        "image_processor_type": kind,
        **more,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }


def image_name(source: Any) -> str:
    """What errors call it: its file, where it has one."""
    if isinstance(source, str | Path):
        return str(source)
    return getattr(source, "filename", "") or "image"


def silence_pillow() -> None:
    """For a program that owns its process: what Pillow and libtiff print about a damaged file is not shown, our own
    error says it. Libraries leave the process as it is."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    with suppress(AttributeError, OSError):  # a Pillow without libtiff, or with its symbols hidden
        library = ctypes.CDLL(Image.core.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


@contextmanager
def _looked_at(source: Any) -> Iterator[Image.Image]:
    """An image of a size that is taken, and whatever goes wrong with it an error that names it."""
    name = image_name(source)
    try:
        with _opened(source, name) as image:
            check_pixels(*image.size)
            yield image
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(name) else f"{name}: {message}") from None
    except Exception as error:  # a damaged file surfaces as any of many unrelated types
        raise UserError(f"{name}: damaged or cut short: {first_line(error)}") from error


@contextmanager
def _opened(source: Any, name: str) -> Iterator[Image.Image]:
    """The image, of a file not decoded yet."""
    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, str | Path):
        if _URL.match(name) and not Path(name).exists():
            raise UserError("a URL, and only files are read: download it first")
        with open_regular(Path(source)) as stream:
            yield identify(stream, Path(source))
    elif isinstance(source, OtherArray):
        yield _from_array(as_array(source))
    else:
        raise UserError(f"{type(source).__name__} is none: give the name of a file, a Pillow image or an array")


def identify(stream: BinaryIO | io.BytesIO, file: Path) -> Image.Image:
    """An image file of one of FORMATS, whose size is known and nothing else. As Pillow's own `open`, but for its check
    of the size: that one warns, and a warning can only be caught by changing the filters of the whole process."""
    Image.init()
    prefix = stream.read(_PREFIX)
    refuse_pointer(prefix, file)
    for kind in FORMATS:
        factory, accept = Image.OPEN.get(kind, (None, None))
        if factory is None or (accept is not None and accept(prefix[:16]) is not True):
            continue
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this format after all
            stream.seek(0)
            return factory(stream, str(file))
    raise UserError("not an image, or of a kind that is not read")


def as_array(source: Any) -> np.ndarray:
    """An array of another library, on the host.

    Raises:
      UserError: it cannot be taken.
    """
    try:
        return np.asarray(source)
    except Exception as error:  # of whose library it is; torch wants gradients and other devices left behind first
        raise UserError(f"{type(source).__name__} cannot be taken as an array: {first_line(error)}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    kind = "float" if _is_float(array.dtype) else array.dtype.name
    allowed = ("uint8", "uint16", "float") if array.ndim == 2 else ("uint8", "float")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or kind not in allowed or not array.size:
        raise UserError(
            f"an array of {array.dtype} {list(array.shape)}, expected uint8 or floats from 0 to 1, [height, width, 3] "
            "(RGB), [height, width, 4] (RGBA) or [height, width], or uint16 [height, width]"
        )
    check_pixels(array.shape[1], array.shape[0])
    if kind == "float":
        array = array.astype(np.float32)
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise UserError(
                f"an array of floats from {array.min():g} to {array.max():g}, expected 0 to 1: scale it, or give uint8"
            )
        array = np.round(array * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def _is_float(dtype: np.dtype) -> bool:
    """Of NumPy, or bfloat16 and its like."""
    return dtype.kind == "f" or "float" in dtype.name


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its orientation tag says; whatever else its EXIF data holds, damaged or not, is left alone."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # not even a table of tags
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError("floating-point pixels have no defined range, save it with 8 bits per channel")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts 16-bit grey off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError("32-bit pixels have no defined range, save it with 8 bits per channel")
        grey = np.empty(values.shape, np.uint8)
        for y, row in enumerate(values):  # row by row: the quotients are float64
            grey[y] = np.round(row / 257)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        return _over_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    return image.convert("RGB")


def over_white(pixels: np.ndarray) -> np.ndarray:
    """8-bit RGBA [height, width, 4] composited on white: RGB [height, width, 3]."""
    return np.asarray(_over_white(Image.fromarray(pixels)))


def _over_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGBA", image.size, "white")
    flat.alpha_composite(image)
    return flat.convert("RGB")
