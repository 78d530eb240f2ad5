"""How the demo model is made: scenes and their truth, the packed objective, training that can stop anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsevlm_jax as sv
from sparsevlm_jax.checkpoints.load import load
from sparsevlm_jax.models.embedding import encode_images
from sparsevlm_jax.models.llava import Llava
from training import scenes as scenes_module
from training.batches import LONGEST, make_batch, patch_words
from training.demo import DEMO, STAGES
from training.export import export
from training.heldout import held_out, prompts
from training.log import draw_curves
from training.model import (
    EARLY_OUTPUT_SCALE,
    FIRST_READER,
    NORM,
    PATCH_WORDS,
    config,
    init_lookup_heads,
    normalise_embeddings,
    start,
)
from training.objective import answer_logits, losses, renumbered
from training.questions import ANSWERS, KINDS, MOST_COUNTED, Question, ask, ask_some
from training.scenes import COLOURS, GRID, PATCH, PIXELS, PLACES, SPLITS, draw_scene, handwriting, patch_mask
from training.stages import EARLY_RATE, optimizer
from training.train import train
from training.words import END, ID, SPELLINGS, VOCABULARY, encode, tokenizer

# As the real stages, and small.
SMALL = DEMO._replace(
    stages=(
        STAGES[0]._replace(steps=50, scenes=2),
        STAGES[1]._replace(steps=50, scenes=2, questions=4, easy=10, harder=10),
        STAGES[2]._replace(steps=25, scenes=2, questions=4),
    )
)
TOLD = DEMO.ids_of(DEMO.told)


@pytest.fixture(scope="module")
def scenes() -> list[scenes_module.Scene]:
    random = np.random.default_rng(1)
    return [draw_scene(random, "train", count) for count in (1, 2, 4, 6, 9) for _ in range(4)]


@pytest.fixture(scope="module")
def questions(scenes) -> list[tuple[scenes_module.Scene, Question]]:
    random = np.random.default_rng(2)
    return [(scene, question) for scene in scenes for question in ask_some(scene, random, 40)]


def test_same_seed_draws_the_same_scene_and_another_seed_another():
    first, again, other = (draw_scene(np.random.default_rng(seed), "train", 5) for seed in (3, 3, 4))
    assert np.array_equal(first.pixels, again.pixels) and first.digits == again.digits
    assert not np.array_equal(first.pixels, other.pixels)


def test_splits_share_no_handwriting_and_no_region_of_a_photograph():
    assert sum(len(handwriting(split)[1]) for split in SPLITS) == 1797
    samples = [{sample.tobytes() for sample in handwriting(split)[0]} for split in SPLITS]
    assert not samples[0] & samples[1]
    for whole, *regions in zip(
        scenes_module.whole_photographs(), *(scenes_module.photographs(split) for split in SPLITS), strict=True
    ):
        assert sum(region.shape[1] for region in regions) * 2 <= whole.shape[1]


def test_digits_stand_in_their_places_inside_the_image(scenes):
    for digit in (digit for scene in scenes for digit in scene.digits):
        left, top, right, bottom = digit.box
        assert 0 <= left < right <= PIXELS and 0 <= top < bottom <= PIXELS
        row, column = divmod(PLACES.index(digit.place), 3)
        assert int((top + bottom) / 2 * 3 / PIXELS) == row and int((left + right) / 2 * 3 / PIXELS) == column


def test_a_digit_is_painted_in_its_colour_inside_its_box(scenes):
    for scene in scenes:
        for digit in scene.digits:
            left, top, right, bottom = digit.box
            area = scene.pixels[top:bottom, left:right].reshape(-1, 3).astype(float)
            near = np.abs(area - COLOURS[digit.colour]).max(axis=1) < 60
            assert near.mean() > 0.1, digit


def test_mask_covers_the_box_and_no_patch_beyond_it(scenes):
    digit = scenes[0].digits[0]
    mask = patch_mask((digit,)).reshape(GRID, GRID).repeat(PATCH, 0).repeat(PATCH, 1)
    left, top, right, bottom = digit.box
    assert mask[top:bottom, left:right].all()
    mask[top - PATCH + 1 : bottom + PATCH - 1, left - PATCH + 1 : right + PATCH - 1] = False
    assert not mask.any()


def test_every_kind_of_question_is_asked_and_every_answer_is_a_word_that_the_model_can_say(questions):
    assert {question.kind for _, question in questions} == set(KINDS)
    assert {question.answer for _, question in questions} <= set(ANSWERS) <= set(VOCABULARY)


def test_answers_are_true(questions):
    """Read again from the words of the question alone."""
    for scene, question in questions:
        words = question.text.rstrip("?").split()
        said = {
            "value": [word for word in words if word.isdigit()],
            "colour": [word for word in words if word in COLOURS],
            "place": [word for word in words if word in PLACES],
        }
        meant = [
            digit
            for digit in scene.digits
            if all(str(getattr(digit, name)) in found for name, found in said.items() if found)
        ]
        if question.kind == "count":
            assert question.answer == str(len(meant)) and len(meant) <= MOST_COUNTED
        elif question.kind.startswith("presence"):
            assert question.answer == ("yes" if meant else "no")
        else:
            asked = {"digit": "value", "colour": "colour", "place": "place"}[question.kind.split()[0]]
            assert [str(getattr(digit, asked)) for digit in meant] == [question.answer]


def test_mask_of_a_question_covers_what_it_is_about(questions):
    for scene, question in questions:
        if question.kind == "place of colour":
            (digit,) = (digit for digit in scene.digits if digit.place == question.answer)
            assert np.array_equal(question.mask, patch_mask((digit,)))
        assert question.mask.any()


def test_a_kind_that_a_scene_does_not_allow_is_not_asked():
    digit = scenes_module.Digit(3, "red", "centre", (40, 40, 60, 60))
    scene = scenes_module.Scene(np.zeros((PIXELS, PIXELS, 3), np.uint8), (digit, digit._replace(place="top-left")))
    assert ask(scene, np.random.default_rng(0), "place of digit") is None


def test_patches_of_a_digit_are_called_by_its_value_and_colour_and_every_patch_by_its_place(scenes):
    scene = scenes[0]
    (digit,), words = scene.digits, patch_words(scene)
    inside = patch_mask((digit,))
    for word in (str(digit.value), digit.colour):
        assert np.array_equal(words[:, ID[word]], inside)
    assert (words[:, [ID[place] for place in PLACES]].sum(axis=1) == 1).all()
    assert words.sum() == GRID**2 + 2 * inside.sum()


def test_question_ids_are_those_of_the_tokenizer(questions):
    for text in {question.text for _, question in questions}:
        assert tokenizer(ID, SPELLINGS).encode(text, add_special_tokens=False).ids == encode(text, ID)


def test_tokenizer_takes_american_spelling_capitals_and_unknown_words():
    assert tokenizer(ID, SPELLINGS).encode("What COLOR is the zebra?").tokens == [
        "<s>",
        "what",
        "colour",
        "is",
        "the",
        "<unk>",
    ]


def test_held_out_scenes_do_not_depend_on_their_number():
    few, many = held_out(2), held_out(4)
    assert [q.text for q in few.questions] == [q.text for q in many.questions][: len(few.questions)]
    assert set(few.scene_of) == {0, 1}


# The objective


@pytest.fixture(scope="module")
def params():
    return start(config(), 0)


@pytest.fixture(scope="module")
def batch():
    return make_batch(seed=5, step=0, scenes=2, questions=4, digits=(2, 4))


def packed_logits(params, batch, blind, kept=None):
    def run(model: Llava):
        features, _ = model.vision_tower(jnp.asarray(batch.pixels))
        visual = model.multi_modal_projector(features[:, 1:])
        questions, ends = jnp.asarray(batch.questions), jnp.asarray(batch.ends)
        return answer_logits(model, visual, questions, ends, jnp.asarray(blind), kept)

    return np.asarray(Llava(config()).apply({"params": params}, method=run))


def test_packed_questions_get_the_logits_that_the_package_gives_each_alone(params, batch):
    logits = packed_logits(params, batch, np.zeros_like(batch.blind))
    model, plan = config(), sv.make_plan(sv.Sparsity.dense(), config(), 196)
    for scene in range(2):
        for number in range(4):
            end = batch.ends[scene, number]
            words = [ID[VOCABULARY[i]] for i in batch.questions[scene, number, : end + 1]]
            ids = np.asarray([[ID["<s>"], ID["user:"], *[ID["<image>"]] * 196, *words]], np.int32)
            pixels = jnp.asarray(batch.pixels[scene : scene + 1])
            prompt = sv.embed(params, jnp.asarray(ids), jnp.asarray([ids.shape[1]]), pixels, model)
            alone = sv.prefill(params, prompt, model, plan, max_new_tokens=0)[0]
            np.testing.assert_allclose(logits[scene, number, 0], alone[0], atol=2e-4)


def test_positions_are_those_of_a_sequence_without_what_is_gone():
    places = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, 7, 6, 7]])  # two words, four visual tokens, two questions of two
    found = renumbered(places, jnp.asarray([[True, False, True, False]]))
    assert np.delete(found[0], [3, 5]).tolist() == [0, 1, 2, 3, 4, 5, 4, 5]


def test_a_thinned_scene_gets_the_logits_of_the_package_for_what_is_left(params, batch):
    """The same patches gone from the first layer on, and a sequence that never had them."""
    kept = np.random.default_rng(6).random(196) < 0.3
    there = np.broadcast_to(kept, (2, config().text.num_hidden_layers, 196))
    logits = packed_logits(params, batch, np.zeros_like(batch.blind), jnp.asarray(there))
    model, left = config(), int(kept.sum())
    plan = sv.make_plan(sv.Sparsity.dense(), model, left)
    for scene in range(2):
        images = encode_images(params, jnp.asarray(batch.pixels[scene : scene + 1]), model)
        images = images._replace(tokens=images.tokens[kept], saliency=images.saliency[kept])
        words = batch.questions[scene, 0, : batch.ends[scene, 0] + 1].tolist()
        ids = np.asarray([[ID["<s>"], ID["user:"], *[ID["<image>"]] * left, *words]], np.int32)
        prompt = sv.embed(params, jnp.asarray(ids), jnp.asarray([ids.shape[1]]), images, model)
        alone = sv.prefill(params, prompt, model, plan, max_new_tokens=0)[0]
        np.testing.assert_allclose(logits[scene, 0, 0], alone[0], atol=2e-4)


def test_every_layer_is_thinned_by_its_own_share(params, batch):
    layers, blind = config().text.num_hidden_layers, np.zeros_like(batch.blind)
    whole = np.ones((2, layers, 196), bool)
    plain = packed_logits(params, batch, blind)
    np.testing.assert_allclose(packed_logits(params, batch, blind, jnp.asarray(whole)), plain, atol=1e-5)
    for layer in (0, layers - 1):
        less = whole.copy()
        less[1, layer, 50:] = False
        found = packed_logits(params, batch, blind, jnp.asarray(less))
        np.testing.assert_allclose(found[0], plain[0], atol=1e-5)
        assert np.abs(found[1] - plain[1]).max() > 1e-4


def test_half_of_the_scenes_lose_ever_more_patches_but_no_digit_and_other_draws_stay_the_same():
    plain, thin = (make_batch(3, 1, 40, 2, (1, 2), thinned=layers) for layers in (0, 12))
    for name in set(plain._fields) - {"kept"}:
        assert np.array_equal(getattr(plain, name), getattr(thin, name))
    assert plain.kept is None and thin.kept.shape == (40, 12, 196)
    assert (thin.kept[:, :-1] >= thin.kept[:, 1:]).all()
    digits = np.any(thin.words[:, :, [ID[str(value)] for value in range(10)]], axis=2)
    assert np.all(thin.kept >= digits[:, None])
    assert 10 < thin.kept.all(axis=(1, 2)).sum() < 30
    assert thin.kept.mean() < 0.9


def test_a_blind_answer_sees_the_scene_through_the_question_only(params, batch):
    """With one decoder layer nothing that a question's words have seen can reach the answer."""
    shallow = {**params, "language_model": {**params["language_model"]}}
    for number in range(1, config().text.num_hidden_layers):
        layer = shallow["language_model"][f"layers_{number}"]
        silent = jax.tree.map(
            jnp.zeros_like, {"o_proj": layer["self_attn"]["o_proj"], "down": layer["mlp"]["down_proj"]}
        )
        shallow["language_model"][f"layers_{number}"] = {
            **layer,
            "self_attn": {**layer["self_attn"], "o_proj": silent["o_proj"]},
            "mlp": {**layer["mlp"], "down_proj": silent["down"]},
        }
    other = batch._replace(pixels=batch.pixels[::-1].copy())
    blind = np.ones_like(batch.blind)
    np.testing.assert_array_equal(packed_logits(shallow, batch, blind), packed_logits(shallow, other, blind))
    assert not np.allclose(packed_logits(shallow, batch, ~blind), packed_logits(shallow, other, ~blind))
    assert not np.allclose(packed_logits(params, batch, blind), packed_logits(params, other, blind))


def test_patches_that_are_the_sum_of_their_words_are_aligned_however_long_they_are(params, batch, monkeypatch):
    """And the class token with the words of the whole scene."""
    rows = np.concatenate([batch.present[:, None], batch.words], axis=1).astype(np.float32)
    words = jnp.eye(len(VOCABULARY), config().text.hidden_size)
    decoder = params["language_model"] | {"embed_tokens": {"embedding": 3 * words}}
    for size in (0.1, 10.0):
        projected = size * rows @ words
        monkeypatch.setattr("sparsevlm_jax.models.llava.Projector.__call__", lambda *_, found=projected: found)
        arrays = jax.tree.map(jnp.asarray, batch)
        found = losses(params | {"language_model": decoder}, config(), arrays, TOLD, with_questions=False)
        assert found.alignment < 0.05 and found.presence < 5 and found.recognition == 1


def test_losses_of_right_answers_are_small(params, batch, monkeypatch):
    """The answer loss looks at the answer and at the end behind it."""
    wanted = np.take_along_axis(batch.questions, batch.ends[..., None] + np.arange(1, 3), axis=2)
    assert (wanted[..., 1] == END).all()
    perfect = 50 * jax.nn.one_hot(jnp.asarray(wanted), len(VOCABULARY))
    monkeypatch.setattr("training.objective.answer_logits", lambda *_: perfect)
    found = losses(params, config(), jax.tree.map(jnp.asarray, batch), TOLD, with_questions=True)
    assert found.answer < 1e-3 and found.accuracy == 1


# Where the stage with questions starts from


@pytest.fixture(scope="module")
def balanced(params, batch):
    return normalise_embeddings(params, config(), batch.pixels)


def test_balanced_words_and_visual_tokens_are_of_one_length_and_have_nothing_in_common(balanced, batch):
    words = balanced["language_model"]["embed_tokens"]["embedding"]
    np.testing.assert_allclose(np.linalg.norm(words, axis=1), NORM, rtol=1e-5)
    found = np.asarray(encode_images(balanced, jnp.asarray(batch.pixels), config()).tokens)
    np.testing.assert_allclose(found.mean((0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1).mean(), NORM, rtol=1e-4)


def test_words_look_for_tokens_that_resemble_them_and_in_every_other_layer_for_words(balanced):
    """The attention logits of a word over patches that are just words, and over itself."""
    decoder = init_lookup_heads(balanced, config(), seed=0, said=DEMO.ids_of(DEMO.said))["language_model"]
    ids = [ID[word] for word in PATCH_WORDS]
    patches = balanced["language_model"]["embed_tokens"]["embedding"][jnp.asarray(ids)]
    words = decoder["embed_tokens"]["embedding"][jnp.asarray(ids)]
    tokens = jnp.concatenate([patches, words])
    tokens = tokens / jnp.sqrt(jnp.mean(tokens**2, axis=-1, keepdims=True))
    for number in range(config().text.num_hidden_layers):
        attention = decoder[f"layers_{number}"]["self_attn"]
        heads = config().text.num_attention_heads
        query, key = (
            (tokens @ attention[name]["weight"].T).reshape(len(tokens), heads, -1) for name in ("q_proj", "k_proj")
        )
        logits = np.asarray(jnp.einsum("inh,jnh->nij", query[len(ids) :], key)) / config().text.head_dim ** 0.5
        if number > FIRST_READER and (number - FIRST_READER) % 2:
            assert (logits[:, :, len(ids) :].min(axis=2) > logits[:, :, : len(ids)].max(axis=2)).all()
        else:
            assert (logits.argmax(axis=2) == np.arange(len(ids))).all()
        carried = attention["o_proj"]["weight"] @ attention["v_proj"]["weight"]
        size = EARLY_OUTPUT_SCALE if number < FIRST_READER else 1.0
        np.testing.assert_allclose(carried, size * np.eye(len(carried)), atol=1e-4)


def test_what_sees_and_what_comes_before_the_first_reader_follow_slowly(params):
    stage = STAGES[1]
    transform = optimizer(stage)
    updates: Any
    gradients, nothing = jax.tree.map(jnp.ones_like, params), jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        _, state = transform.update(gradients, transform.init(params), nothing)  # at a rate of 0
        updates, _ = transform.update(gradients, state, nothing)
    decoder = updates["language_model"]
    reader, early = (decoder[f"layers_{number}"]["mlp"]["up_proj"]["weight"] for number in (FIRST_READER, 0))
    tower = updates["vision_tower"]["layers_0"]["mlp"]["fc1"]["weight"]
    np.testing.assert_allclose(reader, -stage.rate / stage.warm_up, rtol=1e-3)
    np.testing.assert_allclose(early, EARLY_RATE * reader[0, 0], rtol=1e-3)
    np.testing.assert_allclose(tower, stage.seeing[1] / stage.steps * reader[0, 0], rtol=1e-2)


def test_a_stage_without_questions_leaves_the_decoder_layers_alone(params):
    transform, gradients = optimizer(STAGES[0]), jax.tree.map(jnp.ones_like, params)
    updates: Any
    with jax.numpy_dtype_promotion("standard"):
        _, state = transform.update(gradients, transform.init(params), params)  # at a rate of 0
        updates, _ = transform.update(gradients, state, params)
    decoder = updates.pop("language_model")
    table = decoder.pop("embed_tokens")
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves((updates, table)))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(decoder))


# Training


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "whole"
    train(SMALL, folder, save_every=25)
    return folder


def read_log(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_losses_fall_in_both_long_stages(uninterrupted):
    first, second, third, fourth, _ = read_log(uninterrupted)
    assert second["alignment"] < 0.8 * first["alignment"]
    assert fourth["answer"] < 0.8 * third["answer"]


@pytest.mark.parametrize("stop", [50, 110])
def test_training_goes_on_from_a_checkpoint_with_the_losses_of_an_uninterrupted_run(uninterrupted, tmp_path, stop):
    """At the end of a stage, and in the middle of one; the steps since the checkpoint are done again."""
    train(SMALL, tmp_path, save_every=25, stop=stop)
    assert len(read_log(tmp_path)) == stop // 25
    train(SMALL, tmp_path, save_every=25)
    assert read_log(tmp_path) == read_log(uninterrupted)


def test_curves_are_drawn_from_the_log(uninterrupted, tmp_path):
    draw_curves(uninterrupted / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_exported_model_loads_with_the_same_answers(params, tmp_path):
    export(DEMO, params, tmp_path / "model")
    model = load(tmp_path / "model", dtype="float32")
    data = held_out(1)
    ids, lengths = prompts([data.questions[0].text], model.config, ID, LONGEST)
    assert model.processor is not None
    found = model.processor([[data.scenes[0].pixels]], [data.questions[0].text])
    assert found.ids[0].tolist() == ids[0, : lengths[0]].tolist()
    np.testing.assert_allclose(
        np.asarray(model.params["language_model"]["lm_head"]["weight"]),
        np.asarray(params["language_model"]["lm_head"]["weight"], np.float16),
    )
