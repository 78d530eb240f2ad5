"""Frames out of video files and arrays: which they are, that they are those of the file, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsevlm_jax import UserError, bounds
from sparsevlm_jax.inputs.video import frame_indices, read_video
from tests.videos import noise, write_sound, write_video

ALL = noise(20)


@pytest.mark.parametrize(
    "total, frames, rule, expected",
    [
        (50, 8, "linspace", [0, 7, 14, 21, 28, 35, 42, 49]),
        (50, 8, "arange", [0, 6, 12, 18, 25, 31, 37, 43]),
        (3, 8, "linspace", [0, 0, 0, 0, 1, 1, 1, 2]),
        (1, 4, "linspace", [0, 0, 0, 0]),
        (8, 8, "arange", [0, 1, 2, 3, 4, 5, 6, 7]),
        (10, 1, "linspace", [0]),
    ],
)
def test_the_frames_taken_are_those_of_the_rule(total, frames, rule, expected) -> None:
    assert frame_indices(total, frames, rule).tolist() == expected


@pytest.mark.parametrize(
    "total, frames, rule, message",
    [
        (7, 8, "arange", "has 7 of the 8 frames"),
        (0, 8, "linspace", "has no frames"),
        (8, 0, "linspace", "frames=0: expected 1 to 768"),
        (8, bounds.FRAMES + 1, "linspace", "frames=769"),
        (8, 8, "uniform", 'sampling="uniform": expected linspace or arange'),
    ],
)
def test_frames_that_cannot_be_taken_are_refused(total, frames, rule, message) -> None:
    with pytest.raises(UserError, match=message):
        frame_indices(total, frames, rule)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_every_frame_is_the_one_that_was_written(tmp_path: Path, suffix: str) -> None:
    file = write_video(tmp_path / f"clip{suffix}", ALL)
    np.testing.assert_array_equal(read_video(file, 20, "arange"), ALL)
    for rule in ("linspace", "arange"):
        np.testing.assert_array_equal(read_video(str(file), 8, rule), ALL[frame_indices(20, 8, rule)])


def test_an_array_is_sampled_as_a_file_is() -> None:
    np.testing.assert_array_equal(read_video(ALL, 8, "linspace"), ALL[frame_indices(20, 8, "linspace")])
    np.testing.assert_array_equal(read_video(ALL[:8], 8, "arange"), ALL[:8])


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_frames_are_turned_as_the_file_says(tmp_path: Path, turned: int) -> None:
    file = write_video(tmp_path / "clip.mp4", ALL[:3], turned=turned)
    np.testing.assert_array_equal(read_video(file, 3, "arange"), np.rot90(ALL[:3], turned // 90, axes=(1, 2)))


def test_frames_are_counted_whatever_their_times_are(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).integers(5, 400, 20)).tolist()
    file = write_video(tmp_path / "clip.mkv", ALL, times=times)
    np.testing.assert_array_equal(read_video(file, 8, "linspace"), ALL[frame_indices(20, 8, "linspace")])


def test_a_video_of_one_frame_repeats_it(tmp_path: Path) -> None:
    file = write_video(tmp_path / "clip.mkv", ALL[:1])
    np.testing.assert_array_equal(read_video(file, 4, "linspace"), np.repeat(ALL[:1], 4, axis=0))


def test_grey_frames_of_8_and_10_bit_become_rgb(tmp_path: Path) -> None:
    grey = ALL[:3, :, :, 0]
    file = write_video(tmp_path / "grey.mkv", grey, given="gray", stored="gray")
    np.testing.assert_array_equal(read_video(file, 3, "arange"), np.repeat(grey[..., None], 3, axis=3))
    deep = np.random.default_rng(0).integers(0, 1024, (3, 34, 46), dtype=np.uint16)
    found = read_video(write_video(tmp_path / "deep.mkv", deep, given="gray10le", stored="gray10le"), 3, "arange")
    assert np.abs(found - deep[..., None] / 1023 * 255).max() < 1.5


def test_transparent_parts_of_frames_are_white(tmp_path: Path) -> None:
    frames = noise(3, channels=4)
    frames[..., 3] = np.where(frames[..., 3] > 127, 255, 0)
    file = write_video(tmp_path / "clip.mkv", frames, given="rgba", stored="bgra")
    expected = np.where(frames[..., 3:] == 255, frames[..., :3], 255)
    np.testing.assert_array_equal(read_video(file, 3, "arange"), expected)


def damaged(folder: Path) -> dict[str, str]:
    """Files that are no videos, each with what is said about it."""
    whole = {suffix: write_video(folder / f"w{suffix}", ALL).read_bytes() for suffix in (".mp4", ".avi", ".mkv")}
    (folder / "half.mp4").write_bytes(whole[".mp4"][: len(whole[".mp4"]) // 2])
    (folder / "half.avi").write_bytes(whole[".avi"][: len(whole[".avi"]) // 2])
    (folder / "half.mkv").write_bytes(whole[".mkv"][: len(whole[".mkv"]) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all " * 50)
    playlist = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nw.avi\n#EXT-X-ENDLIST\n"
    (folder / "playlist.mp4").write_text(playlist)
    (folder / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    write_sound(folder / "sound.wav")
    Image.fromarray(ALL[0]).save(folder / "image.png")
    (folder / "folder.mp4").mkdir()
    return {
        "half.mp4": "not a video, of a kind that is not read, or damaged",
        "half.avi": "damaged or cut short",
        "half.mkv": "damaged or cut short: it ends after 0.4 of 0.8 seconds",
        "empty.mp4": "is empty",
        "text.mp4": "not a video, of a kind that is not read, or damaged",
        "playlist.mp4": "not a video, of a kind that is not read, or damaged",
        "pointer.mp4": "a Git LFS pointer",
        "sound.wav": "has no video, only sound",
        "image.png": "not a video, of a kind that is not read, or damaged",
        "folder.mp4": "cannot be read: Is a directory",
        "missing.mp4": "no such file",
    }


def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, message in damaged(tmp_path).items():
        with pytest.raises(UserError) as raised:
            read_video(tmp_path / name, 2, "linspace")
        assert str(raised.value).startswith(f"{tmp_path / name}: {message}"), raised.value
        assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_too_many_pixels_are_refused_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_video(tmp_path / "clip.mkv", ALL[:2])
    monkeypatch.setattr(bounds, "VIDEO_PIXELS", 34 * 46 * 2)
    assert read_video(file, 2, "arange").shape == (2, 34, 46, 3)
    with pytest.raises(UserError, match="3 frames of 46 x 34 are more pixels than are taken"):
        read_video(file, 3, "linspace")
    monkeypatch.setattr(bounds, "PIXELS", 34 * 46 - 1)
    with pytest.raises(UserError, match="has more pixels than are taken"):
        read_video(file, 1, "linspace")
    monkeypatch.undo()
    monkeypatch.setattr(bounds, "VIDEO_FRAMES", 1)
    with pytest.raises(UserError, match="has more than 1 frames: cut it first"):
        read_video(file, 1, "linspace")


@pytest.mark.parametrize(
    "source, message",
    [
        (ALL.astype(np.float32), r"video: an array of float32 \[20, 34, 46, 3\], expected uint8"),
        (ALL[0], r"video: an array of uint8 \[34, 46, 3\]"),
        (ALL[:0], "video: has no frames"),
        (3, "video: int is none"),
    ],
)
def test_what_is_no_video_in_memory_is_refused(source, message) -> None:
    with pytest.raises(UserError, match=message):
        read_video(source, 2, "linspace")


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_video(tmp_path / "clip.mkv", ALL[:2])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"needs PyAV: install sparsevlm_jax\[video\]"):
        read_video(file, 2, "linspace")


# The peak of this process alone: what the kernel counts for getrusage is that of the one that started it, too.
PEAK = """
import re, sys
from sparsevlm_jax.inputs.video import read_video
shape = read_video(sys.argv[1], 8, "linspace").shape
print(shape, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_three_minutes_of_video_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    """1,800 frames of 512 x 384, ten a second, which are 1,062 MB as RGB."""
    shades = (np.full((384, 512, 3), number * 37 % 256, np.uint8) for number in range(1800))
    times = [number * 100 for number in range(1800)]
    file = write_video(tmp_path / "long.mp4", shades, times=times)
    run = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    shape, peak = run.stdout.rsplit(maxsplit=1)
    assert shape == "(8, 384, 512, 3)" and int(peak) < 1000
    taken = frame_indices(1800, 8, "linspace")
    assert read_video(file, 8, "linspace")[:, 0, 0, 0].tolist() == (taken * 37 % 256).tolist()
