"""Videos to a few frames of 8-bit RGB: files on PyAV (the extra `video`), and arrays. No jax, no torch.

Of a file only the frames that are asked for are held: one pass counts, decoding frame after frame, a second
one converts those that are taken. Frames are counted as they are decoded, so a variable frame rate needs no clock.

Axis letters: t frames, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from sparsevlm_jax import bounds
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.files import open_regular, refuse_pointer
from sparsevlm_jax.inputs.images import OtherArray, as_array, check_pixels, over_white

VideoLike = str | Path | np.ndarray | OtherArray
RULES = ("linspace", "arange")
# Containers of one file. Others are lists of further files and addresses, which FFmpeg would open.
FORMATS = (
    *("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "nut", "ivf", "mxf"),
    *("gif", "apng", "h264", "hevc", "m4v", "yuv4mpegpipe"),
    *("wav", "mp3", "flac", "aac"),  # to say that there is only sound
)
_START = 64  # bytes that tell what a file is
_MISSING = 0.1  # of the length that a file says it has, which need not be exact


class Sampling(NamedTuple):
    """How many frames are taken of a video, and by which rule: see `frame_indices`."""

    frames: int = 8
    rule: str = "linspace"


SAMPLING = Sampling()


def frame_indices(total: int, frames: int, rule: str) -> Int[np.ndarray, "t"]:
    """Which frames of a video are taken, ascending.

    Args:
      total: frames that the video has.
      frames: to take.
      rule: "linspace", from the first frame to the last, repeating some where there are fewer (the authors of
        Video-LLaVA and of SparseVLM, lmms-eval); "arange", the first frame of each of `frames` equal parts (the model
        cards on Hugging Face).

    Raises:
      UserError: another rule, no frames, more than `bounds.FRAMES`, or fewer in the video than "arange" takes.
    """
    if rule not in RULES:
        raise UserError(f"sampling={shown(rule)}: expected {' or '.join(RULES)}")
    if not isinstance(frames, int) or not 1 <= frames <= bounds.FRAMES:
        raise UserError(f"frames={shown(frames)}: expected 1 to {bounds.FRAMES}")
    if total < 1:
        raise UserError("has no frames")
    if rule == "linspace":
        return np.linspace(0, total - 1, frames, dtype=int)
    if total < frames:
        raise UserError(
            f'has {total} of the {frames} frames that sampling "arange" takes: ask for fewer, or use "linspace", which '
            "repeats some"
        )
    return np.arange(frames) * total // frames


def read_video(source: Any, frames: int, rule: str) -> UInt8[np.ndarray, "t h w 3"]:
    """Some frames of a video, as `frame_indices` chooses them.

    Args:
      source: a file, or an array of any library that NumPy can take: uint8 [t, h, w, 3], RGB.

    Raises:
      UserError: no such file, no video, damaged, audio only, empty, too large, or PyAV is not installed.
    """
    name = video_name(source)
    try:
        if isinstance(source, str | Path):
            return _of_file(Path(source), frames, rule)
        if isinstance(source, OtherArray):
            return _of_array(as_array(source), frames, rule)
        raise UserError(f"{type(source).__name__} is none: give the name of a file or an array [t, h, w, 3]")
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(name) else f"{name}: {message}") from None


def video_name(source: Any) -> str:
    """What errors call it."""
    return str(source) if isinstance(source, str | Path) else "video"


def _of_array(array: np.ndarray, frames: int, rule: str) -> UInt8[np.ndarray, "t h w 3"]:
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise UserError(f"an array of {array.dtype} {list(array.shape)}, expected uint8 [frames, height, width, 3]")
    _check_size(frames, array.shape[2], array.shape[1])
    return array[frame_indices(len(array), frames, rule)]


def _of_file(file: Path, frames: int, rule: str) -> UInt8[np.ndarray, "t h w 3"]:
    frame_indices(bounds.FRAMES, frames, rule)  # what is asked for is looked at before the file
    total = 0
    for total, _ in enumerate(_decoded(file, frames), start=1):
        if total > bounds.VIDEO_FRAMES:
            raise UserError(f"has more than {bounds.VIDEO_FRAMES:,} frames: cut it first")
    indices = frame_indices(total, frames, rule)
    taken = {}
    for number, frame in enumerate(_decoded(file, frames)):
        if number in indices:
            taken[number] = _rgb(frame)
        if number == indices[-1]:
            break
    sizes = {image.shape for image in taken.values()}
    if len(taken) < len(set(indices.tolist())):
        raise UserError("changed while it was read")
    if len(sizes) > 1:
        raise UserError(f"its frames change their size: {' and '.join(f'{w} x {h}' for h, w, _ in sorted(sizes))}")
    return np.stack([taken[index] for index in indices.tolist()])


def _decoded(file: Path, frames: int) -> Iterator[Any]:
    """Every frame of the video in turn, as PyAV has it."""
    with _opened(file) as container:
        stream = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
        if stream is None:
            raise UserError("has no video, only sound" if container.streams.audio else "has no video")
        _check_size(frames, stream.codec_context.width, stream.codec_context.height)
        ended = 0.0
        for packet in container.demux():  # of sound too: it may be what lasts longest
            if packet.pts is not None:
                ended = max(ended, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise UserError("damaged or cut short")
            for frame in packet.decode():
                _check_size(frames, frame.width, frame.height)
                yield frame
        _require_whole(container, ended)


def _require_whole(container: Any, ended: float) -> None:
    """Some containers are read to wherever they were cut, without a word: what they say of their length tells."""
    seconds = (container.duration or 0) / 1_000_000  # FFmpeg counts microseconds, and has none where it is not known
    if 0 < ended < (1 - _MISSING) * seconds:
        raise UserError(f"damaged or cut short: it ends after {ended:.1f} of {seconds:.1f} seconds")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An open container, whatever goes wrong with it a `UserError`."""
    try:
        import av
        import av.error
    except ImportError:
        raise UserError(
            "reading videos needs PyAV: install sparsevlm_jax[video], or give the frames as an array"
        ) from None
    with open_regular(file) as stream:
        refuse_pointer(start := stream.read(_START), file)
        stream.seek(0)
        if not start:
            raise UserError("is empty")
        try:
            with av.open(stream, options={"format_whitelist": ",".join(FORMATS)}) as container:
                yield container
        except av.error.FFmpegError as error:
            raise UserError("not a video, of a kind that is not read, or damaged") from error


def _is_cover(stream: Any) -> bool:
    """Whether this is the cover of a sound file."""
    import av.stream

    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _rgb(frame: Any) -> UInt8[np.ndarray, "h w 3"]:
    """A frame of any pixel format as 8-bit RGB, transparent parts on white, turned as its display matrix says."""
    if frame.is_corrupt:
        raise UserError("damaged or cut short")
    if any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8":
        image = over_white(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


def _check_size(frames: int, width: int, height: int) -> None:
    """Before memory is taken for that many frames of this size."""
    check_pixels(width, height)
    if frames * width * height > bounds.VIDEO_PIXELS:
        raise UserError(
            f"{frames} frames of {width} x {height} are more pixels than are taken ({bounds.VIDEO_PIXELS:,}): scale "
            "the video down, or ask for fewer frames"
        )
