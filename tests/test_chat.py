"""Conversations: what both policies promise, against fresh runs of the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import normalizers

from sparsevlm_jax import Chat, Model, Sparsity, UserError, embed, make_plan, sparsity
from sparsevlm_jax.checkpoints.load import GenerationDefaults
from sparsevlm_jax.generation import chat as chat_module
from sparsevlm_jax.generation.api import generate_ids
from sparsevlm_jax.generation.request import Generation
from sparsevlm_jax.inputs.messages import Conversation
from sparsevlm_jax.inputs.packing import pack
from sparsevlm_jax.inputs.processor import PROMPT_START, Processor
from tests import hf, models

KEEP_AT = ((0, 5),)
V15, V20 = Sparsity.v15(keep_at=KEEP_AT), Sparsity.v20(keep_at=KEEP_AT, heads=2)
# The first one is so long that both turns lie in one bucket of lengths.
QUESTIONS = ("what is there in the image, and where in all of it is that", "why")
NEW, ROOM = 4, 64


embedded = jax.jit(embed, static_argnames=("config", "plan"), compiler_options=models.QUICK)


class Turn(NamedTuple):
    """A question as it was asked, the whole conversation up to its answer, and the answer, in ids."""

    question: str
    prompt: list[int]
    answer: list[int]

    @property
    def start(self) -> int:
        return len(self.prompt)

    @property
    def stop(self) -> int:
        return len(self.prompt) + len(self.answer)


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return hf.endless_llava(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(vicuna: Model) -> Model:
    """With a chat template; its prompts are short, so its programs are small."""
    return hf.with_template(vicuna)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8))


def start_chat(
    model: Model, images: Sequence[Image.Image], selection: str, pruning: Sparsity = V15, **other: Any
) -> Chat:
    settings = {"sparsity": pruning, "selection": selection, "max_new_tokens": NEW, "room": ROOM} | other
    return Chat(model, images, **settings)


def converse(chat: Chat, questions: Sequence[str] = QUESTIONS) -> list[Turn]:
    turns = []
    for question in questions:
        prompt = chat._next_ids(question) if turns else chat.processor([chat.images], [question]).ids[0]
        answer = chat.ask(question)
        assert chat.ids[: len(prompt)].tolist() == prompt.tolist()
        turns.append(Turn(question, prompt.tolist(), chat.ids[len(prompt) :].tolist()))
        assert answer == chat.processor.decode(turns[-1].answer)
        assert chat.turns[-1] == (question, answer)
    return turns


def fresh_answer(chat: Chat, ids: np.ndarray) -> list[int]:
    """To a conversation as one prompt, from pixels."""
    pixels = chat.processor([chat.images], ["what"]).pixel_values
    return generate_ids(
        chat.model.params,
        chat.model.config,
        [ids],
        pixels,
        sparsity=chat.sparsity,
        max_new_tokens=NEW,
        end_tokens=chat.model.generation.eos_token_ids,
    ).tokens[0]


def predicted(chat: Chat, first_prompt: int) -> np.ndarray:
    """The likeliest id behind every id from the first prompt's last on, decoded one by one on that prompt's cache."""
    config, params = chat.model.config, chat.model.params
    pixels = chat.processor([chat.images], ["what"]).pixel_values
    visual = config.tokens_per_image * len(pixels)
    plan = make_plan(chat.sparsity, config, visual, first_prompt - visual)
    ids = jnp.asarray(chat.ids[None, :first_prompt])
    batch = embedded(params, ids, jnp.array([first_prompt]), jnp.asarray(pixels), config=config, plan=plan)
    forced = np.zeros((1, ROOM), np.int32)  # always as many: one program
    forced[0, : len(chat.ids) - first_prompt] = chat.ids[first_prompt:]
    logits, _ = models.forced_logits(params, config, plan, batch, forced)
    return logits[0].argmax(-1)


def check_answers(chat: Chat, turns: Sequence[Turn]) -> None:
    """Every id of every answer was the likeliest, and an answer shorter than `NEW` ended with an end token."""
    likeliest = predicted(chat, turns[0].start)
    for turn in turns:
        offset, length = turn.start - turns[0].start, turn.stop - turn.start
        assert chat.ids[turn.start : turn.stop].tolist() == likeliest[offset : offset + length].tolist()
        assert length == NEW or likeliest[offset + length] in chat.model.generation.eos_token_ids


@pytest.mark.parametrize("pruning", [V15, sparsity("pool", keep=4)], ids=lambda s: s.method)
def test_again_answers_as_a_fresh_run_of_the_conversation_from_pixels(
    model: Model, image: Image.Image, pruning: Sparsity
) -> None:
    chat = start_chat(model, [image], "again", pruning)
    for turn in converse(chat):
        assert turn.answer == fresh_answer(chat, np.asarray(turn.prompt, np.int32))


@pytest.mark.parametrize("pruning", [V15, V20], ids=lambda s: s.method)
def test_first_answers_as_if_the_first_prompt_had_been_decoded_on(
    model: Model, image: Image.Image, pruning: Sparsity
) -> None:
    chat = start_chat(model, [image], "first", pruning)
    check_answers(chat, converse(chat, [*QUESTIONS, "is it a boat"]))


def test_policies_agree_on_the_first_question(model: Model, image: Image.Image) -> None:
    again, first = (start_chat(model, [image], selection) for selection in ("again", "first"))
    assert again.ask(QUESTIONS[0]) == first.ask(QUESTIONS[0])
    assert again.ids.tolist() == first.ids.tolist()


def test_first_goes_on_behind_an_answer_that_ended_early(model: Model, image: Image.Image) -> None:
    chat = start_chat(model, [image], "first")
    (turn,) = converse(chat, QUESTIONS[:1])
    end = turn.answer[1]
    ending = replace(model, generation=GenerationDefaults((end,), 0))
    chat = start_chat(ending, [image], "first")
    turns = converse(chat)
    assert turns[0].stop - turns[0].start == 1, "the end token is no part of the conversation"
    check_answers(chat, turns)


def test_without_images_both_policies_are_exact(model: Model) -> None:
    again, first = (start_chat(model, [], selection) for selection in ("again", "first"))
    for turn in converse(again):
        assert turn.answer == fresh_answer(again, np.asarray(turn.prompt, np.int32))
    check_answers(first, converse(first))


@pytest.mark.parametrize("selection", ["again", "first"])
def test_the_tower_runs_once(model: Model, image: Image.Image, selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, seen = [], []
    encode, run = chat_module.encode, chat_module.GenerationRequest

    def recorded_encode(*args: Any, **static: Any) -> Any:
        encoded.append(encode(*args, **static))
        return encoded[-1]

    def recorded_run(*args: Any, **settings: Any) -> Any:
        seen.append(args[3])
        return run(*args, **settings)

    monkeypatch.setattr(chat_module, "encode", recorded_encode)
    monkeypatch.setattr(chat_module, "GenerationRequest", recorded_run)
    converse(start_chat(model, [image], selection))
    assert len(encoded) == 1
    assert all(images is encoded[0] for images in seen)
    assert len(seen) == (2 if selection == "again" else 1)


def answer_with(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list[np.ndarray]:
    """Makes every answer these ids; returns what will be asked."""
    asked: list[np.ndarray] = []

    def answer(self: Chat, prompt: np.ndarray) -> Generation:
        asked.append(prompt)
        plan = make_plan(Sparsity.dense(), self.model.config, 0)
        return Generation(
            [ids], [[0]], [True], plan, pack([prompt], self.model.config.image_token_id), 0.0, 0.0, 0.0, 0
        )

    monkeypatch.setattr(Chat, "_prefill", answer)
    return asked


def llama_2(model: Model) -> Model:
    """With the normalizer of Llama-2's own tokenizer: it puts a space in front of whatever text it gets."""
    old = model.processor
    tokenizer = hf.llama_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(hf.SPACE), normalizers.Replace(" ", hf.SPACE)]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return replace(model, processor=Processor(tokenizer, old.image_processor, old.chat_template, model.config))


@pytest.mark.parametrize("kind", ["template", "vicuna"])
@pytest.mark.parametrize("selection", ["again", "first"])
def test_a_later_question_is_asked_in_the_ids_of_the_whole_conversation(
    model: Model, vicuna: Model, image: Image.Image, selection: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = start_chat(llama_2(model if kind == "template" else vicuna), [image], selection)
    tokenizer = chat.processor.tokenizer
    said = tokenizer(" the cat", add_special_tokens=False)["input_ids"][1:]  # what a model says: no second space
    assert tokenizer.decode(said).strip() == "the cat"
    asked = answer_with(monkeypatch, said)
    for question in ("what is it", "why", "who else"):
        chat.ask(question)
    if kind == "template":
        text = "USER: <image>\nwhat is it ASSISTANT: the cat USER: why ASSISTANT: the cat USER: who else ASSISTANT:"
    else:
        text = (
            f"{PROMPT_START}<image>\nwhat is it ASSISTANT: the cat</s>USER: why ASSISTANT: the cat</s>"
            "USER: who else ASSISTANT:"
        )
    whole = np.asarray(tokenizer(text)["input_ids"])
    whole = np.repeat(whole, np.where(whole == model.config.image_token_id, model.config.tokens_per_image, 1))
    assert asked[-1].tolist() == whole.tolist()


def test_an_answer_that_would_be_tokenized_otherwise_stays_in_the_cache_as_it_was_said(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = start_chat(model, [], "first")
    letters = [chat.processor.tokenizer.convert_tokens_to_ids(letter) for letter in "the"]  # one token of the tokenizer
    asked = answer_with(monkeypatch, letters)
    chat.ask("what")
    first = asked[0].tolist()
    chat.ask("why")
    whole, behind = chat.processor.next_turn(Conversation("why", (("what", "the"),)), [])
    assert asked[1].tolist() == first + letters + behind.tolist()
    assert whole.tolist()[-len(behind) :] == behind.tolist()
    written = (chat.processor.decode(ids).replace(" ", "") for ids in (asked[1], whole))
    assert len(set(written)) == 1


def test_the_template_frames_every_turn(model: Model, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = start_chat(model, [image], "again")
    asked = answer_with(monkeypatch, chat.processor.tokenizer("a", add_special_tokens=False)["input_ids"])
    for question in QUESTIONS:
        chat.ask(question)
    assert chat.processor.decode(asked[0]) == f"USER: \n{QUESTIONS[0]} ASSISTANT:"
    assert chat.processor.decode(asked[1]) == (f"USER: \n{QUESTIONS[0]} ASSISTANT: a USER: {QUESTIONS[1]} ASSISTANT:")
    assert (asked[1] == chat.model.config.image_token_id).sum() == chat.model.config.tokens_per_image


def test_vicuna_turns_are_parted_by_the_end_token(vicuna: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = start_chat(vicuna, [], "again")
    tokenizer = chat.processor.tokenizer
    asked = answer_with(monkeypatch, tokenizer("a", add_special_tokens=False)["input_ids"])
    for question in QUESTIONS:
        chat.ask(question)
    ends = np.flatnonzero(asked[1] == tokenizer.eos_token_id)
    assert len(ends) == 1
    assert tokenizer.decode(asked[1][: ends[0]]).endswith("ASSISTANT: a")
    assert tokenizer.decode(asked[1][ends[0] + 1 :]).strip() == f"USER: {QUESTIONS[1]} ASSISTANT:"


def test_a_chat_that_overflows_says_so_and_can_go_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = start_chat(model, [], "first")
    converse(chat, QUESTIONS[:1])
    before = chat.ids.tolist()
    go_on = Chat._go_on
    monkeypatch.setattr(Chat, "_go_on", lambda self, ids: replace(go_on(self, ids), finite=[False]))
    refused(chat, "why", "the logits are not finite")
    monkeypatch.undo()
    assert chat.ask("why")
    assert chat.ids[: len(before)].tolist() == before


@pytest.mark.parametrize("selection", ["again", "first"])
def test_a_marker_in_a_later_question_is_refused(model: Model, image: Image.Image, selection: str) -> None:
    chat = start_chat(model, [image], selection)
    chat.ask(QUESTIONS[0])
    refused(chat, "and in <image>", "<image> in a later question")


def test_a_conversation_that_outgrows_the_cache_is_refused(model: Model, image: Image.Image) -> None:
    chat = start_chat(model, [image], "first")
    chat.ask(QUESTIONS[0])
    refused(chat, "is it here or there " * 3, f"the cache has {ROOM}: raise room")
    chat.ask(QUESTIONS[1])
    other = start_chat(model, [image], "first")
    converse(other)
    assert other.ids.tolist() == chat.ids.tolist(), "it goes on as if the question had not been asked"


@pytest.mark.parametrize("selection", ["again", "first"])
def test_a_conversation_that_outgrows_the_context_is_refused(model: Model, image: Image.Image, selection: str) -> None:
    chat = start_chat(model, [image], selection)
    chat.ask(QUESTIONS[0])
    context = len(chat.ids) + 5
    chat.model = replace(
        model, config=replace(model.config, text=replace(model.config.text, max_position_embeddings=context))
    )
    refused(chat, QUESTIONS[1], f"the model's context of {context}")


def refused(chat: Chat, question: str, reason: str) -> None:
    """The question is, and the conversation stays as it was."""
    before = chat.ids.tolist()
    with pytest.raises(UserError, match=reason):
        chat.ask(question)
    assert chat.ids.tolist() == before


def test_an_unknown_selection_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match='selection is "last": expected again or first'):
        start_chat(model, [], "last")
