"""Host side: questions and images to arrays, token ids to text. No jax, no torch.

The tokenizer, the image processor and the chat template are the checkpoint's own, read through transformers. The
image marker is expanded from the model's configuration, never by the checkpoint's multimodal processor: that one
needs a patch size which many checkpoints do not state.

Axis letters: m images, t tiles, l tokens, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError, first_line
from sparsevlm_jax.inputs import templates
from sparsevlm_jax.inputs.images import ImageLike
from sparsevlm_jax.inputs.messages import Conversation, as_texts
from sparsevlm_jax.inputs.packing import ImagePacking, TiledImages, pack_images
from sparsevlm_jax.inputs.pixels import Preparation, Visual
from sparsevlm_jax.inputs.side_files import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    read_chat_template,
    read_image_processor,
    read_tokenizer,
    there,
)
from sparsevlm_jax.inputs.video import SAMPLING, Sampling, VideoLike
from sparsevlm_jax.layout import ImageLayout
from sparsevlm_jax.text import count

MARKER, VIDEO_MARKER = "<image>", "<video>"
_KINDS = {MARKER: "image", VIDEO_MARKER: "video"}
ASPECTS = ("pad", "crop")
# Vicuna v1, as LLaVA-1.5 was trained.
PROMPT_START = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
VIDEO_PROMPT_START = "USER: "  # as the model card of Video-LLaVA asks it, without a system text
PROMPT_END = " ASSISTANT:"


class Inputs(NamedTuple):
    """What the model takes.

    Attributes:
      ids: a row per question, int32 [l], every image marker expanded to a copy of its id for each visual token, and
        every video marker to copies of the same id.
      pixel_values: float32 [m, 3, S, S], the images of all rows in order; m is 0 where there are none. For a family
        with tiles these are the tiles [t, 3, S, S], as many for each image.
      layouts: of each image and video, what its visual tokens are.
      packing: of a family with tiles, where each visual token of the batch comes from.
    """

    ids: list[np.ndarray]
    pixel_values: np.ndarray
    layouts: tuple[ImageLayout, ...]
    packing: ImagePacking | None = None
    frames: np.ndarray | None = None  # float32 [f, 3, S, S], of all videos in order; None where there are none

    @property
    def images(self) -> np.ndarray | TiledImages:
        """As `generate_ids` takes them."""
        return self.pixel_values if self.packing is None else TiledImages(self.pixel_values, self.packing, self.frames)


class Processor:
    """A checkpoint's tokenizer, image processor and prompt.

    Args:
      tokenizer, image_processor: as transformers loads them.
      chat_template: Jinja source, or None for the Vicuna prompt.
      config: the model that the arrays are for.

    Raises:
      UserError: tokenizer and model do not agree on the image marker, or the chat template cannot be used.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, chat_template: str | None, config: ModelConfig) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template
        self.config = config
        self.markers = {MARKER: config.image_token_id}
        if config.video_token_id is not None:
            self.markers[VIDEO_MARKER] = config.video_token_id
        for marker, wanted in self.markers.items():
            if (found := tokenizer.convert_tokens_to_ids(marker)) != wanted:
                raise UserError(
                    f"the tokenizer's id of {marker} is {found}, but the model's {_KINDS[marker]}_token_index is "
                    f"{wanted}: tokenizer and config.json are not of the same checkpoint"
                )
        self.preparation = Preparation(image_processor, config)
        self._content_in_parts = chat_template is not None and self._takes_parts()

    @classmethod
    def from_pretrained(cls, path: str | Path, config: ModelConfig) -> Processor | None:
        """Reads the tokenizer and processor files of a local folder, as transformers 4.x or 5.x wrote them.

        Returns:
          None where the folder has neither: such a model still answers at the level of token ids.

        Raises:
          UserError: one of the two is missing, or a file cannot be used.
        """
        path = Path(path)
        tokenizer_there, processor_there = there(path, TOKENIZER_FILES), there(path, PROCESSOR_FILES)
        if not tokenizer_there and not processor_there:
            return None
        if not tokenizer_there or not processor_there:
            missing = PROCESSOR_FILES if tokenizer_there else TOKENIZER_FILES
            raise UserError(f"{path}: has only half of its processor, add {' or '.join(missing)}")
        tokenizer = read_tokenizer(path)
        image_processor = read_image_processor(path)
        chat_template = read_chat_template(path, tokenizer)
        try:
            return cls(tokenizer, image_processor, chat_template, config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def prompt(self, question: str | Conversation, num_images: int, num_videos: int = 0) -> str:
        """The text that is tokenized: the checkpoint's chat template, else the Vicuna prompt, around what was said.

        Markers in the first question stay where they are. Without any, one per image goes in front of it, then one per
        video. A template of LLaVA's kind places those itself.

        Raises:
          UserError: the first question holds markers, but not one per image or video; a later one holds any; some of
            it is no text; or the family has no videos.
        """
        talk = question if isinstance(question, Conversation) else Conversation(question)
        _require_text(talk)
        first, *later = [*(asked for asked, _ in talk.earlier), talk.question]
        answers = [self._unmarked(answer) for _, answer in talk.earlier]  # a model may write them, but shows nothing
        unmarked = self._to_mark(first, later, {MARKER: num_images, VIDEO_MARKER: num_videos})
        marked = "".join(f"{marker}\n" * number for marker, number in unmarked.items()) + first
        if self.chat_template is None:
            return self._vicuna(talk.system, [marked, *later], answers)
        messages = [] if talk.system is None else [("system", self._content(talk.system))]
        messages.append(("user", self._content(first, unmarked) if self._content_in_parts else marked))
        for answer, asked in zip(answers, later, strict=True):
            messages += [("assistant", self._content(answer)), ("user", self._content(asked))]
        return self._render_messages([{"role": role, "content": content} for role, content in messages])

    def _vicuna(self, system: str | None, questions: Sequence[str], answers: Sequence[str]) -> str:
        own = PROMPT_START if self.config.video_token_id is None else VIDEO_PROMPT_START
        start = own if system is None else f"{system} USER: "
        turns = zip(answers, questions[1:], strict=True)
        said = "".join(f" {answer}{self.tokenizer.eos_token}USER: {asked}{PROMPT_END}" for answer, asked in turns)
        return f"{start}{questions[0]}{PROMPT_END}{said}"

    def _to_mark(self, first: str, later: Sequence[str], given: Mapping[str, int]) -> dict[str, int]:
        """How many images and videos the first question does not mark itself, by their markers."""
        left = {}
        for marker, number in given.items():
            kind = _KINDS[marker]
            if marker not in self.markers:
                if number:
                    raise UserError(f"{self.config.model_type}: takes images only, no {kind}s")
                continue
            if any(marker in text for text in later):
                raise UserError(f"{marker} in a later question: all {kind}s come with the first one")
            found = first.count(marker)
            if found and found != number:
                raise UserError(
                    f"the question holds {count(found, f'{marker} marker')}, but {count(number, kind)} "
                    f"came with it: write one marker per {kind}, or none"
                )
            left[marker] = 0 if found else number
        return left

    def _unmarked(self, text: str) -> str:
        for marker in self.markers:
            text = text.replace(marker, "")
        return text

    def _content(self, text: str, unmarked: Mapping[str, int] | None = None) -> str | list[dict[str, str]]:
        """A message's content as the chat template takes it."""
        if not self._content_in_parts:
            return text
        parts = [{"type": _KINDS[marker]} for marker, number in (unmarked or {}).items() for _ in range(number)]
        return [*parts, {"type": "text", "text": text}]

    def __call__(
        self,
        images: Sequence[Sequence[ImageLike | Visual]],
        questions: Sequence[str | Conversation],
        aspect: str | None = None,
        videos: Sequence[Sequence[VideoLike | Visual]] = ((),),
        sampling: Sampling = SAMPLING,
    ) -> Inputs:
        """Tokenizes the questions and prepares their images and videos.

        Args:
          images: the images of each question, in the order of its markers, or what `preparation` made of them; an
            empty list for text alone. One list for several questions goes with each of them: its images are prepared,
            and stand in the result, once.
          questions: as many, each by itself or with what was said before it.
          aspect: "crop" scales the shorter side to S and cuts out the middle, "pad" fills up to a square with the
            processor's mean colour and scales that (as the authors of LLaVA do), None is the checkpoint's own choice.
          videos: the videos of each question, or one list, as the images.
          sampling: which frames are taken of each video.

        Raises:
          UserError: an image or video that cannot be read or does not become [3, S, S], a count that does not match,
            or another aspect.
        """
        for lists, kind in ((images, "image"), (videos, "video")):
            if len(lists) not in (1, len(questions)):
                raise UserError(f"{len(lists)} lists of {kind}s for {len(questions)} questions: give one per question")
        if aspect is not None and aspect not in ASPECTS:
            raise UserError(f'aspect is "{aspect}": expected {" or ".join(ASPECTS)}')
        shown = [[self.preparation.image(image, aspect) for image in own] for own in images]
        filmed = [[self.preparation.video(video, sampling, aspect) for video in own] for own in videos]
        rows, together = [], len(shown) == len(filmed) == 1
        for number, question in enumerate(questions):
            own, own_videos = (lists[number if len(lists) > 1 else 0] for lists in (shown, filmed))
            rows.append(self._tokenized(self.prompt(question, len(own), len(own_videos)), own, own_videos))
        ids = [self._expanded(row, [visual.layout for visual in visuals]) for row, visuals in rows]
        by_row = [visuals for _, visuals in rows]
        kinds = [[visual.layout.is_video for visual in visuals] for visuals in by_row]
        # The same images and videos stand in the result once, if they have the same order in every prompt.
        return self._inputs(ids, by_row[:1] if together and all(kind == kinds[0] for kind in kinds) else by_row)

    def _inputs(self, ids: list[np.ndarray], by_row: Sequence[Sequence[Visual]]) -> Inputs:
        """What the model takes of these rows."""
        layouts = [[visual.layout for visual in visuals] for visuals in by_row]
        flat = [visual for visuals in by_row for visual in visuals]
        images, videos = ([v.pixels for v in flat if v.layout.is_video == kind] for kind in (False, True))
        side = self.config.vision.image_size
        return Inputs(
            ids,
            np.concatenate(images) if images else np.zeros((0, 3, side, side), np.float32),
            tuple(visual.layout for visual in flat),
            pack_images(layouts, self.config) if flat and self.config.packs_images else None,
            np.concatenate(videos) if videos else None,
        )

    def text_tokens(self, question: str | Conversation, num_images: int, num_videos: int = 0) -> int:
        """How many tokens of a prompt are not visual.

        Raises:
          UserError: markers and images do not match, or the template cannot be used.
        """
        text = self.prompt(question, num_images, num_videos)
        row, marked = self._tokenized(text, [None] * num_images, [None] * num_videos)
        return len(row) - len(marked)

    def next_turn(self, talk: Conversation, layouts: Sequence[ImageLayout]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int32 [l], of a whole conversation, and those of them that stand behind its last answer.

        The text is tokenized as a whole: what a tokenizer puts in front of a text must not come before every turn.

        Raises:
          UserError: a later question holds markers, or the template cannot be gone on with.
        """
        last, mark = talk.earlier[-1], "\ue000"
        marked = talk._replace(earlier=(*talk.earlier[:-1], (last[0], mark)))
        images, videos = ([layout for layout in layouts if layout.is_video == video] for video in (False, True))
        text, tail = (self.prompt(each, len(images), len(videos)) for each in (talk, marked))
        tail = tail.rpartition(mark)[2]
        if not text.endswith(tail):
            raise UserError("the chat template writes what follows an answer differently from answer to answer")
        both = (self._tokenized(each, images, videos) for each in (text, text.removesuffix(tail)))
        whole, head = (self._expanded(row, ordered) for row, ordered in both)
        if np.array_equal(whole[: len(head)], head):
            return whole, whole[len(head) :]
        # A token spans the end of the answer: the tail is tokenized alone then.
        return whole, np.asarray(self.tokenizer(tail, add_special_tokens=False)["input_ids"], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, without special tokens and surrounding space."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def _tokenized(self, text: str, images: Sequence[Any], videos: Sequence[Any] = ()) -> tuple[np.ndarray, list[Any]]:
        """Token ids of a prompt, int32 [l], a marker one id; images and videos as their markers follow each other."""
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]  # written by the chat template, and again by the tokenizer
        row, left = np.asarray(ids, np.int32), {}
        for marker, given in ((MARKER, images), (VIDEO_MARKER, videos)):
            if marker not in self.markers:
                continue
            found, kind = int(np.sum(row == self.markers[marker])), _KINDS[marker]
            if found != len(given):
                raise UserError(
                    f"the prompt has {count(found, f'{marker} token')} for {count(len(given), kind)}: "
                    "the chat template or the tokenizer of this checkpoint does not keep the markers"
                )
            left[self.markers[marker]] = iter(given)
        return row, [next(left[each]) for each in ids if each in left]

    def _expanded(self, row: np.ndarray, layouts: Sequence[ImageLayout]) -> np.ndarray:
        """Every marker as one image marker for each visual token of the image or video that it stands for."""
        marker = np.isin(row, list(self.markers.values()))
        copies = np.ones(len(row), int)
        copies[marker] = [layout.tokens for layout in layouts]
        return np.repeat(np.where(marker, np.int32(self.config.image_token_id), row), copies)

    def _takes_parts(self) -> bool:
        """Whether the chat template wants a list of images and texts (LLaVA's) or one string (a language model's)."""
        try:
            text = self._render([{"type": "image"}, {"type": "text", "text": "probe"}])
        except UserError as error:
            if isinstance(error.__cause__, templates.TooMuch):  # a second try would take as long
                raise
            text = ""
        # A template for strings either fails on a list or prints it as Python would.
        if text.count(MARKER) == 1 and "probe" in text and "'text'" not in text:
            return True
        if "probe" not in self._render("probe"):
            raise UserError("the chat template leaves out the question: it cannot be used")
        return False

    def _render(self, content: str | list[dict[str, str]]) -> str:
        return self._render_messages([{"role": "user", "content": content}])

    def _render_messages(self, messages: list[dict[str, Any]]) -> str:
        try:
            return templates.render(
                self.chat_template or "",
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **_texts(self.tokenizer.special_tokens_map),
            )
        except Exception as error:  # Jinja's errors, and whatever the template runs into
            raise UserError(f"the chat template fails: {first_line(error)}") from error


def _texts(tokens: dict[str, Any]) -> dict[str, Any]:
    """Special tokens as a template gets them."""
    return {key: [*map(str, token)] if isinstance(token, list | tuple) else str(token) for key, token in tokens.items()}


def _require_text(talk: Conversation) -> None:
    for text in as_texts(talk):
        try:
            text.encode()
        except (UnicodeEncodeError, AttributeError):
            raise UserError(f"the question is no text: {ascii(text)[:80]} cannot be encoded in UTF-8") from None
