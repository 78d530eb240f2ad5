"""`per_frame`: what stays is spread evenly over the frames of videos."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsevlm_jax as sv
from sparsevlm_jax import UserError
from sparsevlm_jax.explain import summary
from sparsevlm_jax.explain.trace_run import Explanation, explain
from sparsevlm_jax.generation.api import require_processor
from sparsevlm_jax.generation.ladder import prefill_stage_by_stage
from sparsevlm_jax.inputs.video import Sampling
from sparsevlm_jax.pruning.frames import take_turns
from tests.test_explain_video import FRAMES, clip, model


def turns_by_hand(scores: np.ndarray, visual: np.ndarray, frame: np.ndarray) -> list[int]:
    """The visual places of one row in the order in which they are taken."""
    queues = [
        sorted(np.flatnonzero(visual & (frame == number)), key=lambda place: (-scores[place], place))
        for number in np.unique(frame)
    ]
    order = []
    while any(queues):
        heads = [queue.pop(0) for queue in queues if queue]
        order += sorted(heads, key=lambda place: (-scores[place], place))
    return [int(place) for place in order]


@pytest.mark.parametrize("seed", range(4))
def test_frames_take_turns_best_first(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(-3, 4, (2, 40)).astype(np.float32)  # with ties, and zeros of both signs
    scores[:, ::7] *= -0.0
    visual = random.random((2, 40)) < 0.7
    frame = np.sort(random.integers(0, 5, (2, 40)), axis=1)
    found = np.asarray(take_turns(jnp.asarray(scores), jnp.asarray(visual), jnp.asarray(frame)))
    for row in range(2):
        places = np.flatnonzero(visual[row])
        assert places[np.argsort(-found[row][places], kind="stable")].tolist() == turns_by_hand(
            scores[row], visual[row], frame[row]
        )


def test_turns_are_told_apart_where_a_methods_scores_have_16_bits() -> None:
    ones = jnp.ones((1, 2056))
    found = take_turns(ones.astype(jnp.bfloat16), ones > 0, jnp.zeros((1, 2056), jnp.int32))
    assert found[0].tolist() == [-place for place in range(2056)]


@cache
def explained(per_frame: bool, keep: int = 10, method: str = "fastv") -> Explanation:
    how = sv.sparsity(method, keep_at=((0, keep), (1, keep // 2)), per_frame=per_frame)
    sampling = Sampling(FRAMES)
    return explain(model(), [], "what is it?", how, max_new_tokens=1, videos=[clip(0)], sampling=sampling)


@pytest.mark.parametrize("keep", [10, 30, 42])
def test_frames_keep_as_many_as_each_other(keep: int) -> None:
    left = summary.frames_left(explained(True, keep))
    for stage, count in ((1, keep), (2, keep // 2)):
        kept = [frame.kept[stage] for frame in left]
        assert sum(kept) == count and max(kept) - min(kept) <= 1
    competing = [frame.kept[1] for frame in summary.frames_left(explained(False))]
    assert max(competing) - min(competing) > 1, "as released, frames compete"


def test_the_page_says_how_frames_share_what_stays() -> None:
    turns, pool = (" ".join(summary.notes(explained(per_frame))) for per_frame in (True, False))
    assert "Frames take turns" in turns and "one pool" not in turns
    assert "one pool" in pool and "Frames take turns" not in pool


def test_each_frame_keeps_the_best_of_its_own() -> None:
    explanation = explained(True)
    pruning = explanation.stages[0].pruning
    assert pruning is not None
    for view in explanation.views:
        scores, chosen = pruning.scores[view.numbers], pruning.chosen[view.numbers]
        assert scores[chosen].min() >= scores[~chosen].max()


def test_what_is_merged_comes_from_every_frame() -> None:
    left = summary.frames_left(explained(True, 21, "v1.5"))
    kept = [frame.kept[1] for frame in left]
    assert kept == [7, 7, 7] and all(frame.merged[1] > 0 for frame in left)


def test_a_batch_is_spread_row_by_row() -> None:
    settings = {"sparsity": sv.sparsity("v1.5", keep=12, per_frame=True), "max_new_tokens": 4, "frames": FRAMES}
    questions, videos = ["what is it?", "where"], [[clip(0)], [clip(1), clip(2)]]
    together = sv.generate(model(), None, questions, videos=videos, **settings)
    for question, own, answer in zip(questions, videos, together, strict=True):
        assert sv.generate(model(), None, question, videos=own, **settings) == answer


def test_without_videos_there_are_no_frames_to_spread_over() -> None:
    with pytest.raises(UserError, match="`per_frame`: llava takes images only, no videos"):
        sv.make_plan(sv.sparsity("v1.5", per_frame=True), sv.tiny(), 16)


def test_the_ladder_spreads_as_the_one_program_does() -> None:
    inputs = require_processor(model())([[]], ["what is it?"], videos=[[clip(0)]], sampling=Sampling(FRAMES))
    params, config = model().params, model().config
    ids, visual = jnp.asarray(inputs.ids[0])[None], int(np.sum(inputs.ids[0] == model().config.image_token_id))
    prompt = jax.jit(partial(sv.embed, config=config))(params, ids, jnp.array([ids.shape[1]]), inputs.images)
    found = []
    for how in (sv.Sparsity.video().changed(per_frame=True), sv.Sparsity.video()):
        plan = sv.make_plan(how, config, visual, ids.shape[1] - visual)
        found.append(jax.jit(partial(sv.prefill, config=config, plan=plan, max_new_tokens=0))(params, prompt)[0])
        laddered = prefill_stage_by_stage(params, prompt, config, plan, max_new_tokens=0)[0]
        np.testing.assert_allclose(laddered, found[-1], atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
