"""What users call: from questions about images, or token ids and pixels, to answers, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, Unpack

import jax
import numpy as np

from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.answer import Answer, read_answers
from sparsevlm_jax.generation.checks import require_limit
from sparsevlm_jax.generation.request import Generation, GenerationRequest, Settings, key_of
from sparsevlm_jax.inputs.images import ImageLike
from sparsevlm_jax.inputs.messages import Asked, read_prompts
from sparsevlm_jax.inputs.packing import TiledImages
from sparsevlm_jax.inputs.processor import Processor
from sparsevlm_jax.inputs.video import SAMPLING, Sampling, VideoLike
from sparsevlm_jax.models.stages import ImageFeatures, Params
from sparsevlm_jax.pruning.methods import as_sparsity
from sparsevlm_jax.pruning.settings import Sparsity

Images = ImageLike | Sequence[ImageLike | None] | Sequence[Sequence[ImageLike]] | None
Videos = VideoLike | Sequence[VideoLike | None] | Sequence[Sequence[VideoLike]] | None


def generate_ids(
    params: Params,
    config: ModelConfig,
    rows: Sequence[np.ndarray],
    images: np.ndarray | TiledImages | ImageFeatures | None,
    **settings: Unpack[Settings],
) -> Generation:
    """Answers a batch of prompts given as ids and pixels.

    Args:
      params, config: the model.
      rows: ids of each prompt, int32 [l_i], every visual token of an image as one image marker.
      images: those of all rows in order, or those of one row, which every row then shows: pixels, float32
        [m, 3, height, width], the processor's `Inputs.images`, or what `encode_images` made of them.
      settings: see `Settings`.

    Returns:
      The answers. Logits that are not finite do not raise here: see `Generation.finite`.

    Raises:
      UserError: prompts longer than the model's context, images that do not match the markers, or bad settings.
    """
    run = GenerationRequest(params, config, rows, images, **settings)
    return run.result(run.decode(run.prefill(), settings["max_new_tokens"]))


def stream_ids(
    params: Params,
    config: ModelConfig,
    rows: Sequence[np.ndarray],
    images: np.ndarray | TiledImages | ImageFeatures | None,
    *,
    every: int | None = None,
    **settings: Unpack[Settings],
) -> Iterator[Generation]:
    """`generate_ids` in chunks of `every` tokens: the same compiled loop, the same tokens.

    By default a chunk takes 0.1 s: about ten a second.
    """
    if every is not None:
        require_limit("every", every)
    yield from GenerationRequest(params, config, rows, images, **settings).chunks(every)


def generate(
    model: Model,
    images: Images,
    prompts: str | Sequence[Any],
    *,
    sparsity: Sparsity | str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    aspect: str | None = None,
    videos: Videos = None,
    frames: int = SAMPLING.frames,
    sampling: str = SAMPLING.rule,
) -> str | list[str]:
    """Answers questions about images and videos.

    Args:
      model: from `load`, with its processor.
      images: for one prompt its image or images; for a list of prompts a list of images for each, or one image,
        or images that go with all of them. None or an empty list for text alone.
      prompts: a question, or a batch of them. They may contain `<image>` markers; by default images come first. A
        question may also be a list of messages, as chat interfaces take them; those may hold the images themselves.
      sparsity: what to prune, or a method's name; by default v1.5 with a third of the visual tokens.
      max_new_tokens, temperature, top_p: see `generate_ids`; `seed` makes the PRNG key.
      aspect: "pad", "crop", or None for what the checkpoint's processor says.
      videos: as `images`: a file each (the extra `video`), or an array of frames, uint8 [t, h, w, 3]. By default they
        come behind the images; questions may hold `<video>` markers.
      frames, sampling: how many frames of a video the model sees, and by which rule they are taken: "linspace" or
        "arange", see `inputs.video.frame_indices`.

    Returns:
      The answer, or a list of answers.

    Raises:
      UserError: bad images, videos, prompts or settings, or logits that are not finite.
    """
    asked, alone = read_prompts(prompts)
    batch = _in_ids(model, images, videos, asked, aspect, Sampling(frames, sampling))
    settings = settings_for(model, sparsity, max_new_tokens, temperature, top_p, seed)
    generation = require_finite(generate_ids(*batch, **settings), model.params)
    answers = [require_processor(model).decode(tokens) for tokens in generation.tokens]
    return answers[0] if alone else answers


def answer(
    model: Model,
    images: Images,
    prompts: str | Sequence[Any],
    *,
    sparsity: Sparsity | str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    aspect: str | None = None,
    videos: Videos = None,
    frames: int = SAMPLING.frames,
    sampling: str = SAMPLING.rule,
) -> Answer | list[Answer]:
    """`generate`, with what each answer took: tokens, visual tokens in every stage, FLOPs, seconds.

    All prompts are one batch; `answer_all` takes any number of them.
    """
    asked, alone = read_prompts(prompts)
    batch = _in_ids(model, images, videos, asked, aspect, Sampling(frames, sampling))
    settings = settings_for(model, sparsity, max_new_tokens, temperature, top_p, seed)
    generation = require_finite(generate_ids(*batch, **settings), model.params)
    answers = read_answers(generation, require_processor(model), model.config, batch[2])
    return answers[0] if alone else answers


def stream(
    model: Model,
    images: Images,
    prompt: str | Sequence[Any],
    *,
    sparsity: Sparsity | str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    aspect: str | None = None,
    every: int | None = None,
    videos: Videos = None,
    frames: int = SAMPLING.frames,
    sampling: str = SAMPLING.rule,
) -> Iterator[str]:
    """Answers one question piece by piece, of `every` tokens; the pieces joined are what `generate` returns.

    By default a piece comes about ten times a second, which costs next to nothing; `every=1` is each token alone.
    """
    asked, alone = read_prompts(prompt)
    if not alone:
        raise UserError("stream answers one question: give a text or one list of messages")
    batch = _in_ids(model, images, videos, asked, aspect, Sampling(frames, sampling))
    settings = settings_for(model, sparsity, max_new_tokens, temperature, top_p, seed)
    chunks = stream_ids(*batch, every=every, **settings)
    for piece, _ in pieces(chunks, require_processor(model), model.params):
        yield piece


def pieces(chunks: Iterator[Generation], processor: Processor, params: Params) -> Iterator[tuple[str, Generation]]:
    """The text that each chunk adds to the first row's answer, with the chunk.

    Text whose end may still change (a character made of several tokens) waits for the next piece.

    Raises:
      UserError: logits that are not finite.
    """
    said, generation = "", None
    for generation in chunks:
        require_finite(generation, params)
        text = processor.decode(generation.tokens[0])
        complete = text.startswith(said) and not text.endswith("\ufffd")
        yield (text[len(said) :] if complete else ""), generation
        said = text if complete else said
    if generation is not None:
        yield processor.decode(generation.tokens[0])[len(said) :], generation


def require_finite(generation: Generation, params: Params) -> Generation:
    """The generation, if it is one.

    Raises:
      UserError: logits that are NaN or infinite chose some of its tokens.
    """
    if not all(generation.finite):
        raise UserError(non_finite(params))
    return generation


def non_finite(params: Params) -> str:
    """What is wrong where logits are NaN or infinite."""
    dtype = jax.tree.leaves(params)[0].dtype.name
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(dtype)
    mend = f"; load it with `dtype` {wider}" if wider else ", or its weights are spoilt"
    return f"the logits are not finite, so there is no answer: in {dtype} something in this model overflows{mend}"


def asked_about(images: Images, videos: Videos, prompts: str | Sequence[Any]) -> tuple[list[Asked], bool]:
    """Every question with its own images and videos, and whether there is just one, not a list."""
    asked, alone = read_prompts(prompts)
    shown, filmed = (lists * len(asked) if len(lists) == 1 else lists for lists in _shown(asked, images, videos))
    return [Asked(one.conversation, *own) for one, *own in zip(asked, shown, filmed, strict=True)], alone


def _in_ids(
    model: Model, images: Images, videos: Videos, asked: Sequence[Asked], aspect: str | None, sampling: Sampling
) -> tuple[Params, ModelConfig, list[np.ndarray], np.ndarray | TiledImages]:
    """What `generate_ids` takes, from images, videos and questions."""
    shown, filmed = _shown(asked, images, videos)
    questions = [one.conversation for one in asked]
    inputs = require_processor(model)(shown, questions, aspect, filmed, sampling)
    return model.params, model.config, inputs.ids, inputs.images


def _shown(asked: Sequence[Asked], images: Images, videos: Videos) -> tuple[list[list[Any]], list[list[Any]]]:
    """The images of every question and its videos; one list alone goes with all of them."""
    return (
        _in_one_place([one.images for one in asked], images, "images"),
        _in_one_place([one.videos for one in asked], videos, "videos"),
    )


def _in_one_place(held: list[list[Any]], beside: Any, kind: str) -> list[list[Any]]:
    """Images or videos of each question: those that its messages hold, or those that were given beside them."""
    if not any(held):
        return images_by_prompt(beside, len(held), kind)
    if any(images_by_prompt(beside, 1)[0]):
        raise UserError(f"{kind} in the messages and beside them: give them in one place")
    return held


def settings_for(
    model: Model,
    sparsity: Sparsity | str | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Settings:
    """What `generate` takes as the settings of `generate_ids`, with the model's own end tokens.

    Raises:
      UserError: a seed that is none.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}: a whole number from 0 to 2**32 - 1 is expected")
    return {
        "sparsity": as_sparsity(sparsity),
        "max_new_tokens": max_new_tokens,
        "end_tokens": model.generation.eos_token_ids,
        "temperature": temperature,
        "top_p": top_p,
        "key": key_of(int(seed)),
    }


def images_by_prompt(images: Images | Videos, prompts: int, kind: str = "images") -> list[list[Any]]:
    """A list of images, or videos, for every prompt, or one that goes with each of them, from what `generate` takes.

    Raises:
      UserError: neither.
    """
    # A path must not be taken for a list of letters, nor an array for a list of rows.
    several: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
    rows = [_row(row) for row in several]
    if prompts == 1:
        return [[image for row in rows for image in row]]
    if len(rows) in (0, 1):
        return rows or [[]]
    if len(rows) != prompts:
        raise UserError(
            f"{prompts} prompts but {kind} for {len(rows)}: give a list of {kind} per prompt, or one for all"
        )
    return rows


def _row(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def require_processor(model: Model) -> Processor:
    """The model's processor.

    Raises:
      UserError: its checkpoint has none.
    """
    if model.processor is None:
        raise UserError(
            f"{model.name}: the checkpoint has no tokenizer and processor files: use generate_ids with ids and pixels"
        )
    return model.processor
