"""`generate`, `stream` and their settings: the forms that images and questions come in, and what is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sparsevlm_jax as sv
from sparsevlm_jax import Chat, Model, Sparsity, UserError, sparsity
from sparsevlm_jax.generation import api, request
from sparsevlm_jax.generation.api import generate_ids, images_by_prompt
from sparsevlm_jax.generation.loop import LoopConfig, SamplingParams, decode, start
from sparsevlm_jax.inputs.messages import Conversation, read_prompts
from sparsevlm_jax.inputs.packing import pack
from sparsevlm_jax.pruning.methods import METHODS
from tests import hf, models

QUESTION = "what is it"
V15 = Sparsity.v15(keep_at=((0, 5),))
NEW = 3


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return hf.endless_llava(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def model(vicuna: Model) -> Model:
    """With a chat template."""
    return hf.with_template(vicuna)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (56, 56, 3), np.uint8)) for _ in range(2)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `generate` asks in ids and pixels; nothing runs."""
    seen: list[Any] = []

    def record(params: Any, config: Any, rows: Any, pixels: Any, **settings: Any) -> None:
        seen.append((rows, pixels, settings))
        raise RecordedError

    monkeypatch.setattr(api, "generate_ids", record)
    return seen


class RecordedError(Exception):
    pass


def ids_of(asked: list[Any], model: Any, images: Any, prompts: Any, **settings: Any) -> tuple[Any, Any]:
    with pytest.raises(RecordedError):
        sv.generate(model, images, prompts, **settings)
    rows, pixels, _ = asked.pop()
    return [row.tolist() for row in rows], pixels


def answer(model: Model, images: Any, prompts: Any, **settings: Any) -> Any:
    return sv.generate(model, images, prompts, **({"sparsity": V15, "max_new_tokens": NEW} | settings))


# Images


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("nothing", [None, [], [[]], [None], ()])
def test_none_and_empty_lists_mean_no_image(model: Model, asked: list[Any], nothing: Any) -> None:
    rows, pixels = ids_of(asked, model, nothing, QUESTION)
    processor = model.processor
    assert processor is not None
    assert rows == [processor([[]], [QUESTION]).ids[0].tolist()]
    assert len(pixels) == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("images", "prompts", "rows"),
    [
        ("a.png", 1, [["a.png"]]),
        (["a.png", "b.png"], 1, [["a.png", "b.png"]]),
        ("a.png", 3, [["a.png"]]),
        (["a.png"], 3, [["a.png"]]),
        ([["a.png", "b.png"]], 3, [["a.png", "b.png"]]),
        (["a.png", "b.png"], 2, [["a.png"], ["b.png"]]),
        ([None, "b.png"], 2, [[], ["b.png"]]),
        ([["a.png", "b.png"], []], 2, [["a.png", "b.png"], []]),
        (None, 2, [[]]),
    ],
)
def test_images_go_with_their_prompts(images: Any, prompts: int, rows: Any) -> None:
    assert images_by_prompt(images, prompts) == rows


def test_images_for_another_number_of_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="3 prompts but images for 2: give a list of images per prompt, or one"):
        images_by_prompt(["a.png", "b.png"], 3)


def test_one_image_goes_with_every_question_and_through_the_tower_once(
    model: Model, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, seen = [QUESTION, "why"], []
    run = request.start

    class Start:
        def lower(self, *args: Any, **static: Any) -> Any:
            seen.append(args[3].shape[0])
            return run.lower(*args, **static)

    monkeypatch.setattr(request, "start", Start())
    shared, own = (answer(model, shown, questions) for shown in (images[0], [images[0], images[0]]))
    assert shared == own
    assert seen == [1, 2]


def test_streaming_lowers_and_compiles_each_program_once(
    model: Model, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[str] = []

    class Counted:
        def __init__(self, program: Any) -> None:
            self.program = program

        def lower(self, *args: Any, **static: Any) -> Any:
            lowered.append(self.program.__name__)
            return self.program.lower(*args, **static)

    for name in ("start", "decode"):
        monkeypatch.setattr(request, name, Counted(getattr(request, name)))
    pieces = list(sv.stream(model, images[0], QUESTION, sparsity=V15, max_new_tokens=6, every=1))
    assert len(pieces) == 7  # one per token, and the end
    assert lowered == ["start", "decode"]


# Questions


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts is None: give a question"),
        (3, "prompts is of type int"),
        ([], "prompts is an empty list"),
        ([QUESTION, None], "a prompt is None: a text is expected, or messages"),
        ([[QUESTION]], "a prompt is of type list: a text is expected, or messages"),
        ("caf\udce9", r"the question is no text: 'caf\\udce9' cannot be encoded in UTF-8"),
        ([{"role": "user"}], "a message's content is None"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "a part of a message is of type dict"),
        ([{"role": "assistant", "content": "no"}], "messages by assistant: expected user and assistant in turn"),
        ([{"content": "no"}], "messages by None: expected user"),
        ([{"role": "system", "content": "no"}], "messages by nobody: expected user"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}], "in a data: URL: "),
    ],
)
def test_what_is_no_question_is_one_clear_error(model: Model, prompts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sv.generate(model, None, prompts)


def test_a_lone_surrogate_is_refused_by_a_chat_too(model: Model) -> None:
    with pytest.raises(UserError, match="the question is no text"):
        Chat(model, []).ask("caf\udce9")


def said(text: str, *parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def test_messages_are_asked_as_their_text(model: Model, asked: list[Any], images: list[Image.Image]) -> None:
    plain = ids_of(asked, model, images[0], QUESTION)
    file = io.BytesIO()
    images[0].save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    for shown, messages in (
        (images[0], [{"role": "user", "content": QUESTION}]),
        (images[0], [said(QUESTION)]),
        (images[0], [said(QUESTION, {"type": "image"})]),
        (None, [said(QUESTION, {"type": "image", "image": images[0]})]),
        (None, [said(QUESTION, {"type": "image_url", "image_url": {"url": url}})]),
    ):
        rows, pixels = ids_of(asked, model, shown, messages)
        assert rows == plain[0]
        np.testing.assert_array_equal(pixels, plain[1])


def test_messages_may_be_a_conversation(model: Model, vicuna: Model, asked: list[Any]) -> None:
    messages = [{"role": "system", "content": "be short"}, said("what"), said("a cat", role="assistant"), said("why")]
    for one, text in (
        (model, "SYSTEM: be short USER: what ASSISTANT: a cat USER: why ASSISTANT:"),
        (vicuna, "be short USER: what ASSISTANT: a cat</s>USER: why ASSISTANT:"),
    ):
        assert one.processor.prompt(Conversation("why", (("what", "a cat"),), "be short"), 0) == text
        assert ids_of(asked, one, None, messages)[0] == [one.processor.tokenizer(text)["input_ids"]]


def test_a_batch_may_mix_texts_and_messages(model: Model) -> None:
    (first, second), alone = read_prompts([QUESTION, [said("why")]])
    assert not alone
    assert (first.conversation.question, second.conversation.question) == (QUESTION, "why")


def test_images_in_two_places_or_in_a_later_message_are_refused(model: Model, images: list[Image.Image]) -> None:
    with pytest.raises(UserError, match="images in the messages and beside them"):
        sv.generate(model, images[0], [said(QUESTION, {"type": "image", "image": images[1]})])
    later = [said("what"), said("a cat", role="assistant"), said("and", {"type": "image", "image": images[0]})]
    with pytest.raises(UserError, match="an image or video in a later message"):
        sv.generate(model, None, later)
    first = said("look at this", {"type": "image", "image": images[0]}, role="system")
    with pytest.raises(UserError, match="an image or video in the system's message"):
        sv.generate(model, None, [first, said("what")])


# Settings


@pytest.mark.parametrize("entrance", [sv.generate, sv.stream, Chat])
def test_the_name_of_a_method_is_taken_as_its_settings(model: Model, entrance: Any, asked: list[Any]) -> None:
    def enter(name: str) -> Any:
        if entrance is Chat:
            return Chat(model, [], sparsity=name).sparsity
        if entrance is sv.stream:
            return next(sv.stream(model, None, QUESTION, sparsity=name, max_new_tokens=1))
        with pytest.raises(RecordedError):
            sv.generate(model, None, QUESTION, sparsity=name)
        return asked[0][2]["sparsity"]

    found = enter("fastv")
    assert entrance is sv.stream or found == sparsity("fastv")
    with pytest.raises(UserError, match='"v3": expected one of dense'):
        enter("v3")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": None}, "max_new_tokens is None: a whole number is expected"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: at least 1"),
        ({"temperature": "0.2"}, "temperature is '0.2': a number is expected"),
        ({"temperature": None}, "temperature is None"),
        ({"top_p": None}, "top_p is None"),
        ({"top_p": 0.0}, "top_p must be|top_p 0.0 must be"),
        ({"seed": None}, "seed is None: a whole number from 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"sparsity": 3}, "sparsity is of type int"),
        ({"sparsity": {"keep": 3}}, "sparsity is of type dict"),
    ],
)
def test_a_setting_of_a_wrong_kind_is_one_clear_error(model: Model, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sv.generate(model, None, QUESTION, **settings)
    if "seed" not in settings:
        ids = {"max_new_tokens": 4, "end_tokens": (), "sparsity": V15} | settings
        with pytest.raises(UserError, match=message):
            generate_ids(model.params, model.config, [np.ones(3, np.int32)], None, **ids)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_a_stream_in_no_instalments_is_refused(model: Model, every: Any) -> None:
    with pytest.raises(UserError, match="every"):
        list(sv.stream(model, None, QUESTION, every=every))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("settings", [{"max_new_tokens": None}, {"room": "64"}])
def test_a_chat_without_limits_is_refused(model: Model, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a whole number is expected"):
        Chat(model, [], **settings)


# Numbers


@pytest.fixture(scope="module")
def overflowing(model: Model) -> Model:
    """Finite in float16, with activations that are not."""
    params: Any = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), model.params)
    layer = params["language_model"]["layers_0"]["mlp"]["down_proj"]
    layer["weight"] = layer["weight"] * jnp.float16(6e4)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    return replace(model, params=params)


@pytest.mark.parametrize("entrance", ["generate", "stream", "chat"])
def test_an_answer_that_overflows_is_none(overflowing: Model, entrance: str) -> None:
    with pytest.raises(UserError, match="logits are not finite.* in float16 .* `dtype` bfloat16 or float32"):
        if entrance == "generate":
            answer(overflowing, None, QUESTION)
        elif entrance == "stream":
            next(sv.stream(overflowing, None, QUESTION, sparsity=V15, max_new_tokens=NEW))
        else:
            Chat(overflowing, [], sparsity=V15, max_new_tokens=NEW).ask(QUESTION)


def test_only_the_rows_that_overflow_are_marked(model: Model) -> None:
    """An embedding that is not finite belongs to one word."""
    params = jax.tree.map(lambda leaf: leaf, model.params)
    table = params["language_model"]["embed_tokens"]
    table["embedding"] = table["embedding"].at[7].set(jnp.inf)
    rows = [np.array([1, 5, 6], np.int32), np.array([1, 7, 6], np.int32)]
    found = generate_ids(params, model.config, rows, None, sparsity=V15, max_new_tokens=NEW, end_tokens=())
    assert found.finite == [True, False]


def test_a_token_in_the_middle_of_an_answer_is_looked_at_too(model: Model) -> None:
    row = [np.array([1, 5, 6], np.int32)]
    settings: Any = {"sparsity": V15, "max_new_tokens": NEW, "end_tokens": ()}
    (tokens,) = generate_ids(model.params, model.config, row, None, **settings).tokens
    params = jax.tree.map(lambda leaf: leaf, model.params)
    table = params["language_model"]["embed_tokens"]
    table["embedding"] = table["embedding"].at[tokens[0]].set(jnp.nan)
    assert tokens[0] not in row[0]
    chunks = list(sv.stream_ids(params, model.config, row, None, **settings))
    assert [one.finite for one in chunks][:2] == [[True], [False]]
    ended: Any = settings | {"end_tokens": (tokens[0],)}
    assert generate_ids(params, model.config, row, None, **ended).finite == [True], "what follows the end is not said"


@pytest.fixture
def wide() -> Iterator[None]:
    """64-bit mode, as users have it."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("wide", "unchecked")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_counts_in_32_bits_in_64_bit_mode(method: str) -> None:
    """Shapes and dtypes only: in the loop they may not change from step to step."""
    config = models.config(layers=2)
    own: dict[str, Any] = {"dense": {}, "v1": {"scale": 1.5, "bias": 1.0}, "v2.0": {"keep": 9, "heads": 2}}
    plan = sv.make_plan(sparsity(method, **own.get(method, {"keep": 9})), config, 16, 16)
    length = 16 + plan.visual_tokens
    common: Any = {"config": config, "decoding": LoopConfig(16, False, (2,))}

    def run(params: Any, ids: Any, lengths: Any, pixels: Any, key: Any, limit: Any) -> Any:
        sampler = SamplingParams(jnp.float32(1), jnp.float32(1))
        state = start(params, ids, lengths, pixels, key, sampler, plan=plan, **common)
        return state, decode(params, state, limit, sampler, stops=plan.stops, **common)

    def of(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    arrays = of((2, length), "int32"), of((2,), "int32"), of((2, 3, 56, 56), "float32")
    before, after = jax.eval_shape(run, sv.abstract_params(config, jnp.float32), *arrays, keys, of((), "int32"))
    assert jax.tree.map(lambda leaf: leaf.dtype, before) == jax.tree.map(lambda leaf: leaf.dtype, after)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(before._replace(keys=None))}
    assert kinds == {"int32", "bool", "float32"}


def test_random_draws_the_same_numbers_in_64_bit_mode(model: Model, images: list[Image.Image]) -> None:
    settings = sparsity("random", keep_at=((0, 5),), seed=3)
    narrow = answer(model, images[0], QUESTION, sparsity=settings)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        assert answer(model, images[0], QUESTION, sparsity=settings) == narrow


@pytest.mark.parametrize("settings", [V15, sparsity("random", keep_at=((0, 5),))], ids=lambda s: s.method)
def test_nothing_is_moved_to_the_device_on_the_side(
    model: Model, images: list[Image.Image], settings: Sparsity
) -> None:
    free = answer(model, images[0], QUESTION, sparsity=settings, temperature=0.5, seed=3)
    with jax.transfer_guard("disallow"):
        assert answer(model, images[0], QUESTION, sparsity=settings, temperature=0.5, seed=3) == free
        assert list(sv.stream(model, images[0], QUESTION, sparsity=settings, max_new_tokens=NEW))


def test_a_chat_and_a_ladder_move_nothing_on_the_side(model: Model, images: list[Image.Image]) -> None:
    ladder = sparsity("v1", scale=1.5, bias=1.0, layers=(0,), ladder=True)
    with jax.transfer_guard("disallow"):
        assert answer(model, images[0], QUESTION, sparsity=ladder) is not None
        chat = Chat(model, images[0], sparsity=V15, selection="first", max_new_tokens=NEW, room=64)
        for question in ("what", "why"):
            chat.ask(question)
    assert len(chat.turns) == 2


def test_a_row_of_ids_may_be_shared_by_images_of_one_row_only(model: Model) -> None:
    config = model.config
    image = np.full(config.tokens_per_image, config.image_token_id)
    rows = [np.concatenate([[1], image, [5]]).astype(np.int32), np.array([1, 5, 6], np.int32)]
    assert pack(rows, config.image_token_id).visual == len(image)
    pixels = np.zeros((2, 3, 56, 56), np.float32)
    with pytest.raises(UserError, match="the ids hold 16 image markers, but the images given become 32"):
        generate_ids(model.params, config, rows, pixels, sparsity=V15, max_new_tokens=1, end_tokens=())


def test_a_chat_takes_a_single_image_as_generate_does(model: Model, tmp_path: Path) -> None:
    assert Chat(model, str(tmp_path / "a.png")).images == [str(tmp_path / "a.png")]
    assert Chat(model, None).images == []
