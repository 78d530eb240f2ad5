"""Small video files, written frame by frame with PyAV by lossless codecs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

LOSSLESS = {
    ".mp4": ("libx264rgb", "rgb24", {"qp": "0", "preset": "ultrafast"}),
    ".mkv": ("ffv1", "bgr0", {}),
    ".avi": ("ffv1", "bgr0", {}),
}


def noise(frames: int, height: int = 34, width: int = 46, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [frames, height, width, channels], no two frames alike."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def write_video(
    file: Path,
    frames: Iterable[np.ndarray],
    *,
    given: str = "rgb24",
    stored: str | None = None,
    turned: int = 0,
    times: Sequence[int] | None = None,
) -> Path:
    """Writes frames to a file whose name says how.

    Args:
      given: pixel format of the frames.
      stored: that of the file; by default the codec's for RGB.
      turned: degrees that a player turns the frames by, counterclockwise.
      times: of each frame in milliseconds; by default 25 frames a second.
    """
    codec, pixels, options = LOSSLESS[file.suffix]
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=dict(options))
        stream.pix_fmt = stored or pixels
        if turned:
            stream.set_display_rotation(turned)
        for number, array in enumerate(frames):
            if number == 0:
                stream.height, stream.width = array.shape[:2]
            frame = av.VideoFrame.from_ndarray(array, format=given)
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def write_sound(file: Path) -> Path:
    """A file with half a second of silence and nothing else."""
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file
