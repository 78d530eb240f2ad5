"""Questions as people have them: plain text, or the message lists of OpenAI's and Hugging Face's chat interfaces."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sparsevlm_jax.errors import UserError, first_line
from sparsevlm_jax.inputs.images import ImageLike, identify
from sparsevlm_jax.inputs.video import VideoLike

SHAPE = (
    '[{"role": "user", "content": TEXT or a list of {"type": "text", "text": TEXT}, {"type": "image"} and '
    '{"type": "video"}}]'
)


class Conversation(NamedTuple):
    """A question, and what was said before it."""

    question: str
    earlier: tuple[tuple[str, str], ...] = ()  # questions and their answers
    system: str | None = None  # instructions in front of everything; None for the prompt's own


class Asked(NamedTuple):
    """A conversation, and the images and videos that its messages hold themselves."""

    conversation: Conversation
    images: list[ImageLike]
    videos: list[VideoLike]


def read_prompts(prompts: Any) -> tuple[list[Asked], bool]:
    """The questions of a batch, and whether there was just one, not a list.

    Args:
      prompts: a text, a list of messages, or a list of such.

    Raises:
      UserError: anything else.
    """
    if isinstance(prompts, str) or _is_messages(prompts):
        return [_read(prompts)], True
    if not isinstance(prompts, (list, tuple)):
        raise UserError(f"prompts is {_named(prompts)}: give a question, a list of messages, or a list of such")
    if not prompts:
        raise UserError("prompts is an empty list: nothing to answer")
    return [_read(prompt) for prompt in prompts], False


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def _read(prompt: Any) -> Asked:
    if isinstance(prompt, str):
        return Asked(Conversation(prompt), [], [])
    if not _is_messages(prompt):
        raise UserError(f"a prompt is {_named(prompt)}: a text is expected, or messages, {SHAPE}")
    messages = [(message.get("role"), *_content(message)) for message in prompt]
    system = None
    if messages[0][0] == "system":
        if messages[0][2] or messages[0][3]:
            raise UserError("an image or video in the system's message: all of them come with the first question")
        system, messages = messages[0][1], messages[1:]
    roles = [role for role, *_ in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        said = ", ".join(map(str, roles))
        raise UserError(f"messages by {said or 'nobody'}: expected user and assistant in turn, a question last")
    if any(images or videos for _, _, images, videos in messages[1:]):
        raise UserError("an image or video in a later message: all of them come with the first question")
    texts = [text for _, text, *_ in messages]
    earlier = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
    return Asked(Conversation(texts[-1], earlier, system), messages[0][2], messages[0][3])


def _content(message: Mapping[str, Any]) -> tuple[str, list[ImageLike], list[VideoLike]]:
    """Text, images and videos of a message; these have their place in front, as where none is marked."""
    content = message.get("content")
    if isinstance(content, str):
        return content, [], []
    if not isinstance(content, (list, tuple)):
        raise UserError(f"a message's content is {_named(content)}: expected {SHAPE}")
    texts: list[str] = []
    images: list[ImageLike] = []
    videos: list[VideoLike] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            images += _images(part)
        elif kind == "video":
            videos += [part[key] for key in ("video", "path", "url") if part.get(key) is not None][:1]
        else:
            raise UserError(f"a part of a message is {_named(part)}: expected {SHAPE}")
    return "\n".join(texts), images, videos


def _images(part: Mapping[str, Any]) -> list[ImageLike]:
    """The image of a part; none where the part only says that one is given elsewhere."""
    found = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
    if isinstance(found, Mapping):
        found = found.get("url")
    if isinstance(found, str) and found.startswith("data:"):
        return [_of_data_url(found)]
    return [] if found is None else [found]


def _of_data_url(url: str) -> Image.Image:
    name = "an image in a data: URL"
    try:
        content = base64.b64decode(url.partition(";base64,")[2], validate=True)
        return identify(io.BytesIO(content), Path(name))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # a damaged image surfaces as any of many unrelated types
        raise UserError(f"{name}: damaged or cut short: {first_line(error)}") from error


def _named(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def as_texts(conversation: Conversation) -> Sequence[str]:
    """Everything said in it."""
    said = [text for turn in conversation.earlier for text in turn]
    return [*said, conversation.question, *([] if conversation.system is None else [conversation.system])]
