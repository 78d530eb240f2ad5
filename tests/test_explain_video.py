"""What is drawn of videos: a strip of frames per stage, class tokens apart, and what each frame keeps."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

import sparsevlm_jax as sv
from sparsevlm_jax.cli import main, options
from sparsevlm_jax.explain import drawing, summary
from sparsevlm_jax.explain.figure import draw_figure
from sparsevlm_jax.explain.page import render
from sparsevlm_jax.explain.provenance import DROPPED, KEPT
from sparsevlm_jax.explain.trace_run import Explanation, explain
from sparsevlm_jax.explain.views import in_rows
from sparsevlm_jax.inputs.video import Sampling
from tests.hf import tiny_llava
from tests.videos import noise, write_video

SIDE, GRID, FRAMES = 56, 4, 3
TOKENS = GRID * GRID + 1  # of a frame


@cache
def model() -> sv.Model:
    with TemporaryDirectory() as folder:
        return sv.load(tiny_llava(Path(folder), family="video_llava", layers=4, image_size=SIDE))


@cache
def clip(seed: int) -> np.ndarray:
    """uint8 [3, 56, 56, 3]: as large as the tower takes them, so that nothing is scaled."""
    return noise(FRAMES, SIDE, SIDE, seed=seed)


@cache
def explained(images: int = 0, videos: int = 1, question: str = "what is it?", method: str = "v1.5") -> Explanation:
    shown = [Image.fromarray(clip(9)[number]) for number in range(images)]
    filmed = [clip(seed) for seed in range(videos)]
    how = sv.sparsity(method)
    return explain(model(), shown, question, how, max_new_tokens=2, videos=filmed, sampling=Sampling(FRAMES))


def test_every_frame_is_drawn_as_the_model_saw_it_in_order() -> None:
    for video, row in enumerate(in_rows(explained(videos=2).views, explained(videos=2).views)):
        assert [(view.image, view.name) for view in row] == [(video, f"frame {n}") for n in (1, 2, 3)]
        for view, frame in zip(row, clip(video), strict=True):
            assert np.abs(view.pixels.astype(int) - frame).max() <= 1


def test_patches_follow_the_class_token_of_their_frame() -> None:
    for number, view in enumerate(explained().views):
        assert view.class_token == number * TOKENS
        assert view.tokens.tolist() == (number * TOKENS + 1 + np.arange(16)).reshape(GRID, GRID).tolist()


@pytest.mark.parametrize("question", ["what is it?", "<video> and <image> and <video> what is it?"])
def test_every_visual_token_of_images_and_videos_is_drawn_exactly_once(question: str) -> None:
    explanation = explained(images=1, videos=2, question=question)
    drawn = np.concatenate([view.numbers for view in explanation.views])
    assert sorted(drawn.tolist()) == list(range(explanation.stages[0].visual)) == list(range(16 + 6 * TOKENS))
    assert (explanation.images, explanation.videos, explanation.class_tokens) == (1, 2, 6)


def test_images_and_frames_show_their_own_pixels_in_whatever_order() -> None:
    views = explained(images=1, videos=2, question="<video> and <image> and <video> what is it?").views
    assert [(view.is_frame, view.image) for view in views] == [(True, 0)] * 3 + [(False, 0)] + [(True, 1)] * 3
    for view, pixels in zip(views, [*clip(0), clip(9)[0], *clip(1)], strict=True):
        assert np.abs(view.pixels.astype(int) - pixels).max() <= 1


def test_what_frames_keep_adds_up_to_what_enters_each_stage() -> None:
    explanation = explained()
    left = summary.frames_left(explanation)
    assert [frame.name for frame in left] == ["Frame 1", "Frame 2", "Frame 3"]
    for number, stage in enumerate(explanation.stages):
        assert sum(frame.kept[number] for frame in left) == np.sum(stage.outcomes == KEPT)
        assert sum(frame.merged[number] for frame in left) == np.sum(stage.outcomes > 0)
    assert len({tuple(frame.kept) for frame in left}) > 1, "frames differ, or nothing is shown"


def test_a_class_token_stands_apart_above_its_frame_and_shows_its_fate() -> None:
    explanation = explained()
    outcomes = explanation.stages[-1].outcomes.copy()
    fates = {"frame 1": KEPT, "frame 2": 3, "frame 3": DROPPED}
    outcomes[[0, TOKENS, 2 * TOKENS]] = list(fates.values())
    stage = explanation.stages[-1]._replace(outcomes=outcomes)
    side = drawing.cell_size((GRID, GRID), drawing.FRAME_SIDE) * GRID
    for view, image in zip(explanation.views, drawing.draw_stage(explanation, stage), strict=True):
        assert image.size == (side, side + drawing.MARK + drawing.MARK // 4)
        pixels, fate = np.asarray(image).astype(int), fates[view.name]
        mark = pixels[: drawing.MARK, : drawing.MARK]
        assert (pixels[: drawing.MARK, drawing.MARK :] == 255).all(), "nothing beside it"
        assert (np.ptp(mark, axis=2).max() <= 1) == (fate == DROPPED), "grey where it is dropped"
        word = "dropped" if fate == DROPPED else "kept" if fate == KEPT else "merged"
        assert summary.fates_of(view, stage).endswith(f"; class token {word}")


@pytest.mark.parametrize("images, videos", [(0, 1), (1, 2)])
def test_the_page_shows_a_strip_of_frames_per_stage_and_asks_for_nothing_else(images: int, videos: int) -> None:
    explanation = explained(images, videos)
    page = render(explanation)
    alts = re.findall(r'alt="([^"]*)"', page)
    prunings = sum(stage.pruning is not None for stage in explanation.stages)
    drawn = images + videos * FRAMES
    assert len(alts) == len(set(alts)) == drawn * (1 + len(explanation.stages) + prunings)
    assert page.count('<div class="frames">') == videos * (len(explanation.stages) + prunings)
    named = "Frame 2" if videos == 1 else "Video 2, frame 2"
    assert f"<figcaption>{named}</figcaption>" in page and f"<td>{named}</td><td>17, 0 merged</td>" in page
    assert ("Image 1: 16 patches kept" in page) == (images == 1)
    assert set(re.findall(r'(?:src|href)="([^"]{0,5})', page)) == {"data:"}
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page


def test_the_page_speaks_of_videos() -> None:
    page = render(explained())
    assert "Which words rate the video" in page and "In front of the video, so it cannot rate: USER:" in page
    assert "3 frames of 4 by 4 patches" in page and "class token is a visual token too, 3 in all" in page
    assert "Which words rate the image and video" in render(explained(images=1))


def test_the_sheet_has_the_frames_of_a_stage_in_a_row() -> None:
    side = drawing.cell_size((GRID, GRID), drawing.FRAME_SIDE) * GRID
    one, two = (draw_figure(explained(videos=videos)) for videos in (1, 2))
    assert one.width >= FRAMES * side
    stages = len(explained().stages)
    assert two.width == one.width and two.height > one.height + stages * side


def test_the_command_explains_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "load", lambda *_, **__: model())
    file, page = write_video(tmp_path / "clip.mkv", noise(12, SIDE, SIDE)), tmp_path / "page.html"

    def run(*arguments: object) -> tuple[int, str]:
        command = ["sparsevlm", "explain", "--model", "small", "--question", "what is it?", "--max-new-tokens", "2"]
        monkeypatch.setattr(sys, "argv", [*command, "-o", str(page), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    code, err = run("--video", file, "--frames", 2, "--sampling", "arange", "--png")
    assert code == 0, err
    assert "Frame 2" in page.read_text() and "Frame 3" not in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 1000
    assert run("--video", tmp_path / "gone.mp4") == (2, f"sparsevlm: error: {tmp_path}/gone.mp4: no such file\n")
    code, err = run()
    assert code == 2 and "give at least one --image or --video" in err
