"""Host side: questions and images to arrays, token ids to text. No jax, no torch.

The tokenizer, the image processor and the chat template are the checkpoint's own, read through transformers. The
image marker is expanded from the model's configuration, never by the checkpoint's multimodal processor: that one
needs a patch size which many checkpoints do not state.

Axis letters: m images, t tiles, l tokens, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sparsevlm_jax import bounds
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError, first_line
from sparsevlm_jax.inputs import templates
from sparsevlm_jax.inputs.images import ImageLike, image_name, open_image, pad_to_square
from sparsevlm_jax.inputs.messages import Conversation, as_texts
from sparsevlm_jax.inputs.packing import ImagePacking, TiledImages, pack_images
from sparsevlm_jax.inputs.side_files import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    read_chat_template,
    read_image_processor,
    read_tokenizer,
    there,
)
from sparsevlm_jax.layout import ImageLayout
from sparsevlm_jax.text import count

MARKER = "<image>"
ASPECTS = ("pad", "crop")
# Vicuna v1, as LLaVA-1.5 was trained.
PROMPT_START = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
PROMPT_END = " ASSISTANT:"


class Inputs(NamedTuple):
    """What the model takes.

    Attributes:
      ids: a row per question, int32 [l], every image marker expanded to a copy of its id for each visual token.
      pixel_values: float32 [m, 3, S, S], the images of all rows in order; m is 0 where there are none. For a family
        with tiles these are the tiles [t, 3, S, S], as many for each image.
      layouts: of each image, what its visual tokens are.
      packing: of a family with tiles, where each visual token of the batch comes from.
    """

    ids: list[np.ndarray]
    pixel_values: np.ndarray
    layouts: tuple[ImageLayout, ...]
    packing: ImagePacking | None = None

    @property
    def images(self) -> np.ndarray | TiledImages:
        """As `generate_ids` takes them."""
        return self.pixel_values if self.packing is None else TiledImages(self.pixel_values, self.packing)


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
        marker_id = tokenizer.convert_tokens_to_ids(MARKER)
        if marker_id != config.image_token_id:
            raise UserError(
                f"the tokenizer's id of {MARKER} is {marker_id}, but the model's image_token_index is "
                f"{config.image_token_id}: tokenizer and config.json are not of the same checkpoint"
            )
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

    def prompt(self, question: str | Conversation, num_images: int) -> str:
        """The text that is tokenized: the checkpoint's chat template, else the Vicuna prompt, around what was said.

        Markers in the first question stay where they are. Without any, one per image goes in front of it. A template
        of LLaVA's kind places those itself.

        Raises:
          UserError: the first question holds markers, but not one per image; a later one holds any; or some of it is
            no text.
        """
        talk = question if isinstance(question, Conversation) else Conversation(question)
        _require_text(talk)
        first, *later = [*(asked for asked, _ in talk.earlier), talk.question]
        answers = [answer.replace(MARKER, "") for _, answer in talk.earlier]  # a model may write it, but shows nothing
        if any(MARKER in text for text in later):
            raise UserError(f"{MARKER} in a later question: all images come with the first one")
        found = first.count(MARKER)
        if found and found != num_images:
            raise UserError(
                f"the question holds {count(found, f'{MARKER} marker')}, but {count(num_images, 'image')} "
                "came with it: write one marker per image, or none"
            )
        unmarked = 0 if found else num_images
        if self.chat_template is None:
            return self._vicuna(talk.system, [f"{MARKER}\n" * unmarked + first, *later], answers)
        parts = self._content_in_parts
        messages = [] if talk.system is None else [("system", self._content(talk.system))]
        messages.append(("user", self._content(first, unmarked) if parts else f"{MARKER}\n" * unmarked + first))
        for answer, asked in zip(answers, later, strict=True):
            messages += [("assistant", self._content(answer)), ("user", self._content(asked))]
        return self._render_messages([{"role": role, "content": content} for role, content in messages])

    def _vicuna(self, system: str | None, questions: Sequence[str], answers: Sequence[str]) -> str:
        start = PROMPT_START if system is None else f"{system} USER: "
        turns = zip(answers, questions[1:], strict=True)
        said = "".join(f" {answer}{self.tokenizer.eos_token}USER: {asked}{PROMPT_END}" for answer, asked in turns)
        return f"{start}{questions[0]}{PROMPT_END}{said}"

    def _content(self, text: str, images: int = 0) -> str | list[dict[str, str]]:
        """A message's content as the chat template takes it."""
        if not self._content_in_parts:
            return text
        return [*[{"type": "image"}] * images, {"type": "text", "text": text}]

    def __call__(
        self,
        images: Sequence[Sequence[ImageLike]],
        questions: Sequence[str | Conversation],
        aspect: str | None = None,
    ) -> Inputs:
        """Tokenizes the questions and prepares their images.

        Args:
          images: the images of each question, in the order of its markers; an empty list for text alone. One list
            for several questions goes with each of them: its images are prepared, and stand in the result, once.
          questions: as many, each by itself or with what was said before it.
          aspect: "crop" scales the shorter side to S and cuts out the middle, "pad" fills up to a square with the
            processor's mean colour and scales that (as the authors of LLaVA do), None is the checkpoint's own choice.

        Raises:
          UserError: an image that cannot be read or does not become [3, S, S], a count that does not match, or
            another aspect.
        """
        if len(images) not in (1, len(questions)):
            raise UserError(f"{len(images)} lists of images for {len(questions)} questions: give one per question")
        if aspect is not None and aspect not in ASPECTS:
            raise UserError(f'aspect is "{aspect}": expected {" or ".join(ASPECTS)}')
        prepared = [[self._prepared(image, aspect) for image in own] for own in images]
        layouts = [[layout for _, layout in own] for own in prepared]
        by_question = layouts * len(questions) if len(images) == 1 else layouts
        ids = [
            self._tokenized(self.prompt(question, len(own)), own)
            for question, own in zip(questions, by_question, strict=True)
        ]
        pixels = [pixels for own in prepared for pixels, _ in own]
        side = self.config.vision.image_size
        stacked = np.concatenate(pixels) if pixels else np.zeros((0, 3, side, side), np.float32)
        return Inputs(ids, stacked, tuple(layout for own in layouts for layout in own), self._packing(layouts))

    def next_turn(self, talk: Conversation, layouts: Sequence[ImageLayout]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int32 [l], of a whole conversation, and those of them that stand behind its last answer.

        The text is tokenized as a whole: what a tokenizer puts in front of a text must not come before every turn.

        Raises:
          UserError: a later question holds markers, or the template cannot be gone on with.
        """
        last, mark = talk.earlier[-1], "\ue000"
        marked = talk._replace(earlier=(*talk.earlier[:-1], (last[0], mark)))
        text, tail = (self.prompt(each, len(layouts)) for each in (talk, marked))
        tail = tail.rpartition(mark)[2]
        if not text.endswith(tail):
            raise UserError("the chat template writes what follows an answer differently from answer to answer")
        whole, head = self._tokenized(text, layouts), self._tokenized(text.removesuffix(tail), layouts)
        if np.array_equal(whole[: len(head)], head):
            return whole, whole[len(head) :]
        # A token spans the end of the answer: the tail is tokenized alone then.
        return whole, np.asarray(self.tokenizer(tail, add_special_tokens=False)["input_ids"], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, without special tokens and surrounding space."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def _tokenized(self, text: str, layouts: Sequence[ImageLayout]) -> np.ndarray:
        """Token ids of a prompt, int32 [l], the marker of each image expanded to its visual tokens."""
        ids = self.tokenizer(text)["input_ids"]
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids = ids[1:]  # written by the chat template, and again by the tokenizer
        row = np.asarray(ids, np.int32)
        marker = row == self.config.image_token_id
        if marker.sum() != len(layouts):
            raise UserError(
                f"the prompt has {count(int(marker.sum()), f'{MARKER} token')} for {count(len(layouts), 'image')}: "
                "the chat template or the tokenizer of this checkpoint does not keep the markers"
            )
        copies = np.ones(len(row), int)
        copies[marker] = [layout.tokens for layout in layouts]
        return np.repeat(row, copies)

    def _packing(self, layouts: Sequence[Sequence[ImageLayout]]) -> ImagePacking | None:
        """Of the images of each row, padded to sizes that no single image decides; None where nothing is packed."""
        tiles = self.config.most_tiles
        if tiles is None or not any(layouts):
            return None
        longest = max(sum(layout.tokens for layout in own) for own in layouts)
        tokens = len(layouts) * self.config.visual_bucket(longest)
        return pack_images(layouts, tiles, self.config.tile_tokens, tokens)

    def _prepared(self, source: ImageLike, aspect: str | None) -> tuple[np.ndarray, ImageLayout]:
        """An image as the tower takes it, float32 [tiles, 3, S, S], and its visual tokens."""
        image, name = open_image(source), image_name(source)
        layout, tiles = self.config.image_layout((image.height, image.width)), self.config.most_tiles
        if tiles is None:
            return self._pixels(image, name, aspect)[None], layout
        if aspect is not None:
            raise UserError(f"{name}: {self.config.model_type} shows an image in its own shape: leave `aspect` out")
        canvases = {"image_grid_pinpoints": [list(canvas) for canvas in self.config.canvases]}
        pixels = self._processed(image, name, canvases, layout.tiles)
        return np.pad(pixels, ((0, tiles - layout.tiles), *[(0, 0)] * 3)), layout

    def _pixels(self, image: Image.Image, name: str, aspect: str | None) -> np.ndarray:
        """An image of one tile, float32 [3, S, S]."""
        side = self.config.vision.image_size
        square = {"height": side, "width": side}
        long, short = max(image.size), min(image.size)
        pads = aspect == "pad" or (aspect is None and getattr(self.image_processor, "do_pad", False))
        edge = side if aspect else max(side, _edge(self.image_processor))
        if (long**2 if pads else edge**2 * long / short) > bounds.PIXELS:
            size = f"{image.width} x {image.height}"
            raise UserError(f"{name}: {size} is too large or too narrow to prepare, scale or cut it first")

        options: dict[str, Any] = {}
        if aspect == "crop":
            options = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
        elif aspect == "pad":
            image = pad_to_square(image, self.image_processor.image_mean)
            options = {"size": square, "do_center_crop": False}
        if options:
            options |= {"do_resize": True, "do_pad": False}
        return self._processed(image, name, options, None)

    def _processed(self, image: Image.Image, name: str, options: dict[str, Any], tiles: int | None) -> np.ndarray:
        """What the checkpoint's image processor makes of an image, float32 [3, S, S], or of `tiles` such."""
        side = self.config.vision.image_size
        wanted = (3, side, side) if tiles is None else (tiles, 3, side, side)
        try:
            pixels = self.image_processor([image], return_tensors="np", **options)["pixel_values"][0]
        except Exception as error:  # the settings of a file, so any type
            raise UserError(f"{name}: the checkpoint's image processor fails: {first_line(error)}") from error
        if pixels.shape != wanted:
            mend = ": choose the aspect crop or pad" if tiles is None else ""
            raise UserError(
                f"{name}: the checkpoint's image processor makes {list(pixels.shape)}, but the model takes "
                f"{list(wanted)}{mend}"
            )
        pixels = np.asarray(pixels, np.float32)
        if not np.isfinite(pixels).all():
            raise UserError(f"{name}: the checkpoint's image processor makes NaN or infinity: its settings are wrong")
        return pixels

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


def _edge(image_processor: Any) -> int:
    """The longest side that an image processor scales an image's shorter one to, 0 where it states none."""
    return max(dict(getattr(image_processor, "size", None) or {}).values(), default=0)


def _require_text(talk: Conversation) -> None:
    for text in as_texts(talk):
        try:
            text.encode()
        except (UnicodeEncodeError, AttributeError):
            raise UserError(f"the question is no text: {ascii(text)[:80]} cannot be encoded in UTF-8") from None
