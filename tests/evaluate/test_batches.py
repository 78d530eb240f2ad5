"""Batches of one shape: `answer`, `answer_all` and what stands behind them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsevlm_jax as sv
from sparsevlm_jax import Answer, Model, UserError
from sparsevlm_jax.generation import batches
from sparsevlm_jax.generation.batches import Batcher, Bucket, Prepared
from sparsevlm_jax.generation.programs import Programs
from sparsevlm_jax.generation.request import GenerationRequest
from sparsevlm_jax.inputs.images import image_size, open_image
from sparsevlm_jax.inputs.messages import Asked, Conversation
from tests import hf
from tests.evaluate import sets
from tests.evaluate.sets import LONG, NEW, SPARSITY

SETTINGS: dict[str, Any] = {"sparsity": SPARSITY, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return sets.speaking(hf.tiny_llava(tmp_path_factory.mktemp("batches") / "model", layers=2))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = sets.write_images(tmp_path_factory.mktemp("images"))
    return [folder / f"{name}.png" for name in "abc"]


def asked(text: str, *images: Any) -> Asked:
    return Asked(Conversation(text), list(images), [])


def test_an_answer_is_what_generate_says_and_what_it_took(model: Model, images: list[Path]) -> None:
    texts = ["what is it", "where is it"]
    found = sv.answer(model, [[images[0]], [images[1]]], texts, **SETTINGS)
    assert isinstance(found, list)
    assert [str(one) for one in found] == sv.generate(model, [[images[0]], [images[1]]], texts, **SETTINGS)
    for one in found:
        assert one.visual_tokens[0] == 16 and one.visual_tokens[-1] < 16 and len(one.tokens) == NEW
        assert one.flops < one.dense_flops and one.prefill_seconds > 0 and one.decode_seconds > 0
        assert (one.rows, one.error) == (2, None)
        assert 16 > one.entering_tokens > one.visual_tokens[-1]
    alone = sv.answer(model, images[0], texts[0], **SETTINGS)
    assert isinstance(alone, Answer) and alone.text == found[0].text


def test_batches_are_of_one_bucket_filled_and_of_one_shape(
    model: Model, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[Any] = []
    prefill = GenerationRequest.prefill

    def watched(self: GenerationRequest) -> Any:
        shapes.append(self.packed.input_ids.shape)
        return prefill(self)

    monkeypatch.setattr(GenerationRequest, "prefill", watched)
    rows = [asked(f"{LONG} now", images[0]), asked("it", images[0]), asked("what"), asked("a", images[1])]
    rows += [asked("in", images[2])]
    batcher = sets.batcher(model)
    assert batcher.bucket(rows[1]) == Bucket(192, 16, 1, 0)
    found = list(batcher.answers(rows))
    assert [[number for number, _ in batch] for batch in found] == [[1, 3], [2], [4], [0]]
    assert sorted(shapes) == [(2, 192), (2, 208), (2, 208), (2, 272)]
    assert all(answer.error is None for batch in found for _, answer in batch)
    assert found[1][0][1].visual_tokens == (0,)


@pytest.mark.parametrize("abreast", [False, True])
def test_the_first_batch_is_ready_before_later_rows_are_looked_at(
    model: Model, images: list[Path], monkeypatch: pytest.MonkeyPatch, abreast: bool
) -> None:
    monkeypatch.setattr(batches, "_leaves_cores_idle", lambda _: abreast)
    rows = [Asked(Conversation("a b " * 1000), [], []), *[asked("it", images[0])] * 12]
    batcher, looked, bucket = sets.batcher(model), [], Batcher.bucket
    monkeypatch.setattr(Batcher, "bucket", lambda self, row: looked.append(row) or bucket(self, row))
    found = batcher.answers(rows)
    assert not looked
    refused, first = next(found), next(found)
    assert [number for number, _ in refused] == [0] and "more than" in (refused[0][1].error or "")
    assert [number for number, _ in first] == [1, 2] and len(looked) < len(rows)
    assert [[number for number, _ in batch] for batch in found] == [[i, i + 1] for i in range(3, 13, 2)]


@pytest.fixture
def guarded() -> Iterator[None]:
    """On every thread: a context manager guards its own alone."""
    jax.config.update("jax_transfer_guard", "disallow")
    yield
    jax.config.update("jax_transfer_guard", "allow")


@pytest.mark.parametrize("abreast", [False, True])
def test_nothing_is_moved_to_the_device_on_the_side(
    model: Model, images: list[Path], monkeypatch: pytest.MonkeyPatch, guarded: None, abreast: bool
) -> None:
    monkeypatch.setattr(batches, "_leaves_cores_idle", lambda _: abreast)
    batcher = sets.batcher(model, temperature=1.0)
    found = list(batcher.answers([asked("it", images[0]), asked("what")]))
    assert [len(batch) for batch in found] == [1, 1]


def test_a_cpu_works_on_two_batches_at_a_time_and_says_the_same(
    model: Model, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [asked(text, image) for text in ("it", f"{LONG} now") for image in images]
    monkeypatch.setattr(batches, "_leaves_cores_idle", lambda _: False)
    batcher = sets.batcher(model)
    wanted = list(batcher.answers(rows))
    met, run = threading.Barrier(2), Batcher.run

    def watched(self: Batcher, prepared: Prepared) -> Any:
        met.wait(20)  # breaks where no second batch comes
        return run(self, prepared)

    monkeypatch.setattr(Batcher, "run", watched)
    monkeypatch.setattr(batches, "_leaves_cores_idle", lambda _: True)
    found = list(batcher.answers(rows))
    assert [[(number, answer.text) for number, answer in batch] for batch in found] == [
        [(number, answer.text) for number, answer in batch] for batch in wanted
    ]
    assert len(found) == 4


def test_threads_that_need_one_program_compile_it_once(caplog: pytest.LogCaptureFixture) -> None:
    programs, program = Programs(), jax.jit(lambda _, x: x + 1)
    x = jax.device_put(np.float32(1))
    with caplog.at_level("INFO", logger="sparsevlm_jax"), ThreadPoolExecutor(4) as threads:
        ran = [*threads.map(lambda _: (*programs.timed(program, None, x), programs.compile_seconds), range(4))]
    assert [record.message for record in caplog.records] == ["compiling", "compiled"]
    assert [float(out) for out, *_ in ran] == [2.0] * 4 and programs.compile_seconds == 0.0
    assert max(own for *_, own in ran) > 0


def test_a_row_that_is_done_changes_nothing_for_those_that_are_not(model: Model, images: list[Path]) -> None:
    rows = [asked(text, image) for text in ("it", "in") for image in images]
    batcher = sets.batcher(model)
    whole = {number: answer.text for batch in batcher.answers(rows) for number, answer in batch}
    left = [[(number, answer.text) for number, answer in batch] for batch in batcher.answers(rows, {0, 1, 3})]
    assert left == [[(2, whole[2])], [(4, whole[4]), (5, whole[5])]]


def test_the_tower_sees_an_image_once_that_many_rows_show(
    model: Model, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = sets.batcher(model, batch_size=4)
    opened: list[Any] = []
    monkeypatch.setattr("sparsevlm_jax.inputs.pixels.open_image", lambda file: opened.append(file) or open_image(file))
    one = batcher.prepare(dict(enumerate(asked(text, images[1]) for text in ("it", "in", "on"))))
    assert one.inputs is not None and len(one.inputs.pixel_values) == 1 and opened == images[1:2]
    two = batcher.prepare(dict(enumerate(asked(text, image) for text in ("it", "in") for image in images[:2])))
    assert two.inputs is not None and two.order is not None
    assert len(two.inputs.pixel_values) == 4 and two.order.tolist() == [0, 1, 0, 1]  # of 4 and 1 images
    for prepared, shown in ((one, [images[1]] * 4), (two, images[:2] * 2)):
        assert_encoded(batcher, prepared, [[image] for image in shown])


def assert_encoded(batcher: Batcher, prepared: Prepared, shown: list[list[Any]]) -> None:
    """The visual tokens of all rows are those of each row's own images."""
    model = batcher.model
    assert prepared.inputs is not None and model.processor is not None
    pixels: Any = jax.device_put(model.processor(shown, ["it"] * len(shown)).images)
    wanted = sv.encode_images(model.params, pixels, model.config)
    found, _ = batcher._encoded(prepared.inputs, prepared.order)
    count = len(wanted.tokens) if wanted.rows is None else int(wanted.rows.sum())
    np.testing.assert_allclose(found.tokens[:count], wanted.tokens[:count], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.saliency[:count], wanted.saliency[:count], rtol=1e-4, atol=1e-5)


def test_images_of_tiles_are_shared_too(tmp_path: Path) -> None:
    model = sets.speaking(hf.tiny_llava(tmp_path / "model", layers=2, family="llava_next", tower_layers=2))
    folder = sets.write_images(tmp_path / "wide", "ab", (60, 130))
    tall = sets.write_images(tmp_path / "tall", "c", (40, 40)) / "c.png"
    wide = [folder / "a.png", folder / "b.png"]
    batcher = sets.batcher(model, batch_size=4)
    rows = [asked("it", wide[0]), asked("in", wide[0]), asked("on", wide[0]), asked("at", wide[0])]
    prepared = batcher.prepare(dict(enumerate(rows)))
    tiles = model.config.most_tiles
    assert prepared.inputs is not None and len(prepared.inputs.pixel_values) == tiles
    assert batcher.bucket(asked("it", tall)).visual != batcher.bucket(asked("it", wide[1])).visual
    mixed = [asked("it", wide[0]), asked("in", wide[1]), asked("on", wide[1]), asked("at", wide[0])]
    prepared = batcher.prepare(dict(enumerate(mixed)))
    assert prepared.order is not None and prepared.order.tolist() == [0, 1, 1, 0]
    assert_encoded(batcher, prepared, [row.images for row in mixed])
    said = [answer.text for _, answer in batcher.run(prepared)]
    assert said == sv.generate(model, [row.images for row in mixed], ["it", "in", "on", "at"], **SETTINGS)


def test_a_method_that_shrinks_images_sees_their_pixels(model: Model, images: list[Path]) -> None:
    settings = {"sparsity": sv.sparsity("pool", keep=4), "max_new_tokens": NEW}
    found = [answer for _, answer in sv.answer_all(model, images[:2], ["it", "in"], batch_size=2, **settings)]
    said = sv.generate(model, [[image] for image in images[:2]], ["it", "in"], **settings)
    assert [answer.text for answer in found] == said and found[0].visual_tokens[0] == 4


def test_answer_all_gives_every_question_its_number(model: Model, images: list[Path]) -> None:
    texts = ["it", f"{LONG} now", "in"]
    found = dict(sv.answer_all(model, images[0], texts, batch_size=2, progress=True, **SETTINGS))
    assert sorted(found) == [0, 1, 2]
    (number, broken), *_ = sv.answer_all(model, ["nope.png"], ["it"], **SETTINGS)
    assert number == 0 and broken.text == "" and "nope.png: no such file" in (broken.error or "")
    with pytest.raises(UserError, match="batch_size 0: at least 1"):
        next(sv.answer_all(model, None, ["it"], batch_size=0))
    with pytest.raises(UserError, match="3 prompts but images for 2"):
        next(sv.answer_all(model, images[:2], texts))


def test_a_row_whose_budget_is_too_small_for_it_refuses_no_other(model: Model, images: list[Path]) -> None:
    rows, two = [asked(LONG, images[0]), asked("it", images[0])], [asked("it", *images[:2])]
    share = sets.batcher(model, sparsity=sv.sparsity("v1.5", flops_share=0.957))
    (refused, answered) = share.answers(rows)
    assert refused[0][0] == 0 and "flops_share=0.957: not possible" in str(refused[0][1].error)
    assert [(number, answer.error) for number, answer in answered] == [(1, None)]
    keep = sets.batcher(model, sparsity=sv.sparsity("v1.5", keep=20))
    assert [[number for number, _ in batch] for batch in keep.answers(rows + two)] == [[0, 1], [2]]
    with pytest.raises(UserError, match="keep=20: the prompt has only 16 visual tokens"):
        next(sets.batcher(model, sparsity=sv.sparsity("v1.5", keep=20)).answers(rows))


def test_logits_that_are_not_finite_are_an_error_of_their_row(model: Model, images: list[Path]) -> None:
    head = model.params["language_model"]["lm_head"]["weight"]
    decoder = {**model.params["language_model"], "lm_head": {"weight": jnp.full_like(head, jnp.nan)}}
    broken = replace(model, params={**model.params, "language_model": decoder})
    found = [answer for _, answer in sv.answer_all(broken, images[:2], ["it", "in"], batch_size=2, **SETTINGS)]
    assert all("the logits are not finite" in (answer.error or "") and not answer.text for answer in found)


def test_sampled_batches_do_not_draw_the_same_numbers(model: Model, images: list[Path]) -> None:
    batcher = sets.batcher(model, temperature=1.0)
    keys = []
    for text in ("it", "in", "it"):
        prepared = batcher.prepare({0: asked(text, images[0])})
        assert prepared.inputs is not None
        key: Any = batcher._settings_of(prepared.inputs).get("key")
        keys.append(np.asarray(jax.random.key_data(key)).tolist())
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_of_an_image_is_known_before_it_is_decoded(tmp_path: Path, orientation: int | None) -> None:
    from PIL import Image

    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    opened = open_image(tmp_path / "a.jpg")
    assert image_size(tmp_path / "a.jpg") == (opened.height, opened.width)
    assert image_size(np.zeros((5, 7, 3), np.uint8)) == (5, 7)
    (tmp_path / "b.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="b.jpg: not an image"):
        image_size(tmp_path / "b.jpg")


def test_settings_that_cannot_be_are_refused_before_anything_runs(model: Model) -> None:
    with pytest.raises(UserError, match="max_new_tokens 0"):
        Batcher(model, max_new_tokens=0)
    with pytest.raises(UserError, match="nothing"):
        Batcher(model, sparsity="nothing")
    with pytest.raises(UserError, match="no tokenizer"):
        Batcher(replace(model, processor=None))
