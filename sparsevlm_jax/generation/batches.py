"""Many questions to answers, in batches of one shape each, so that every bucket is one program.

What a batch holds depends on the rows alone: what is left of a run that was interrupted is computed as it would have
been. The host cuts and prepares the next batch while the device works on one; a CPU works on two.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from zlib import crc32

import jax
import numpy as np

from sparsevlm_jax.ahead import ahead
from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.answer import Answer, read_answers
from sparsevlm_jax.generation.api import Images, Videos, asked_about, non_finite, require_processor, settings_for
from sparsevlm_jax.generation.checks import require_limit, require_room
from sparsevlm_jax.generation.held_once import encode_held_once, held_once
from sparsevlm_jax.generation.programs import Programs
from sparsevlm_jax.generation.request import GenerationRequest, Settings, plan_for
from sparsevlm_jax.inputs.images import image_size
from sparsevlm_jax.inputs.messages import Asked
from sparsevlm_jax.inputs.packing import TEXT_BUCKETS, bucket
from sparsevlm_jax.inputs.pixels import Visual
from sparsevlm_jax.inputs.processor import Inputs
from sparsevlm_jax.inputs.video import SAMPLING, Sampling
from sparsevlm_jax.models.offload import tower_on_device
from sparsevlm_jax.models.stages import Params
from sparsevlm_jax.parallel.arrays import mesh_of, on_mesh_of, put_beside
from sparsevlm_jax.progress import progress as show_progress
from sparsevlm_jax.pruning.methods import METHODS, as_sparsity
from sparsevlm_jax.pruning.settings import Sparsity

BATCH_SIZE = 8
ABREAST = 2  # batches at a time where one leaves cores idle
Numbered = list[tuple[int, Answer]]
Row = Asked | UserError  # a question, or why it cannot be asked


class Bucket(NamedTuple):
    """What questions of one batch have in common: room for text and for visual tokens, and how much is shown."""

    text: int
    visual: int
    images: int
    videos: int


class Prepared(NamedTuple):
    """A batch on the host.

    Attributes:
      inputs: of as many rows as the batch has; behind the real ones the first is repeated. None where none is left.
      order: of each image of the rows its place among `inputs.pixel_values`, where images are held once; else None.
      numbers: those of the real rows.
      errors: what is wrong with the others, by their numbers.
    """

    inputs: Inputs | None
    order: np.ndarray | None
    numbers: list[int]
    errors: dict[int, str]


class Batcher:
    """Answers questions in batches of one size.

    `answers` does it all; `cut`, `prepare` (on the host), `run` (on the device) and `run_all` are its parts, for loops
    of another kind. A row that cannot be answered gets an `Answer` with an error and disturbs no other.
    """

    def __init__(
        self,
        model: Model,
        *,
        sparsity: Sparsity | str | None = None,
        batch_size: int = BATCH_SIZE,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        aspect: str | None = None,
        sampling: Sampling = SAMPLING,
    ) -> None:
        """Takes the settings; nothing runs yet.

        Args:
          model: from `load`, with its processor.
          sparsity, max_new_tokens, temperature, top_p, seed, aspect: see `generate`.
          batch_size: rows that are answered together.
          sampling: which frames are taken of a video.

        Raises:
          UserError: a setting that cannot be, or a model without processor.
        """
        require_limit("batch_size", batch_size)
        require_limit("max_new_tokens", max_new_tokens)
        self.model, self.batch_size, self.aspect, self.sampling = model, batch_size, aspect, sampling
        self.processor = require_processor(model)
        self.settings = settings_for(model, sparsity, max_new_tokens, temperature, top_p, seed)
        self._programs = Programs()
        self._too_dear: dict[tuple[int, int], str | None] = {}  # why, by visual tokens and room for text
        self._words = Lock()  # a tokenizer serves one thread at a time

    def bucket(self, asked: Asked) -> Bucket:
        """Where a question belongs; of its images no more than the size is read.

        Raises:
          UserError: it cannot be asked, or leaves no room for an answer.
        """
        config, images, videos = self.model.config, asked.images, asked.videos
        with self._words:
            text = self.processor.text_tokens(asked.conversation, len(images), len(videos))
        visual = sum(self._visual_tokens(image) for image in images)
        visual += sum(config.video_layout(self.sampling.frames).tokens for _ in videos)
        require_room(config, text + visual, self.settings["max_new_tokens"])
        room = bucket(text, TEXT_BUCKETS, "the prompt's text")
        self._require_budget(visual, room)
        return Bucket(room, config.visual_bucket(visual) if visual else 0, len(images), len(videos))

    def cut(self, rows: Iterable[Row], done: Collection[int] = ()) -> Iterator[dict[int, Row]]:
        """Batches of one bucket, rows by their numbers, as these are looked at: the full ones, in the end the others.

        Rows that cannot be asked come together, ahead of the next full batch.

        Args:
          done: rows that are answered already. They still stand in their batch, if that has others.

        Raises:
          UserError: a budget that no row can meet; no batch has come before.
        """
        return (batch for batch in self._cut(rows) if not all(number in done for number in batch))

    def _cut(self, rows: Iterable[Row]) -> Iterator[dict[int, Row]]:
        waiting: dict[Bucket, dict[int, Row]] = defaultdict(dict)
        refused: dict[int, Row] = {}
        for number, row in enumerate(rows):
            try:
                if isinstance(row, UserError):
                    raise row
                own = self.bucket(row)
            except UserError as error:
                refused[number] = error
                continue
            waiting[own][number] = row
            if len(waiting[own]) == self.batch_size:
                yield refused
                yield waiting.pop(own)
                refused = {}
        if self._too_dear and None not in self._too_dear.values():
            raise UserError(next(filter(None, self._too_dear.values())))
        yield refused
        yield from (waiting[own] for own in sorted(waiting))

    def prepare(self, batch: Mapping[int, Row]) -> Prepared:
        """The host's part of a batch of one bucket: what is shown is read once, whatever number of rows show it."""
        seen: dict[Any, Visual | UserError] = {}
        ready, errors = {}, {}
        for number, row in batch.items():
            try:
                if isinstance(row, UserError):
                    raise row
                images = [self._seen(image, False, seen) for image in row.images]
                videos = [self._seen(video, True, seen) for video in row.videos]
            except UserError as error:
                errors[number] = str(error)
            else:
                ready[number] = (row.conversation, images, videos)
        if not ready:
            return Prepared(None, None, [], errors)
        talks, images, videos = zip(*self._filled([*ready.values()]), strict=True)
        with self._words:
            inputs = self.processor(images, talks, self.aspect, videos, self.sampling)
        order = None
        if self._encodes_apart() and not any(videos):
            inputs, order = held_once(inputs, [visual for row in images for visual in row], self.model.config)
        return Prepared(inputs, order, [*ready], errors)

    def run(self, prepared: Prepared) -> Numbered:
        """The device's part: an answer, or an error, for every row that was prepared."""
        found: Numbered = [(number, Answer(error=error)) for number, error in prepared.errors.items()]
        if prepared.inputs is None:
            return found
        model, inputs, compiled = self.model, prepared.inputs, self._programs.compile_seconds
        settings = self._settings_of(inputs)
        images, seconds = self._encoded(inputs, prepared.order)
        request = GenerationRequest(model.params, model.config, inputs.ids, images, **settings, programs=self._programs)
        generation = request.result(request.decode(request.prefill(), settings["max_new_tokens"]))
        generation = replace(
            generation,
            prefill_seconds=generation.prefill_seconds + seconds,
            compile_seconds=self._programs.compile_seconds - compiled,
        )
        with self._words:
            answers = read_answers(generation, self.processor, model.config, inputs.ids)
        rows = len(prepared.numbers)
        for number, answer, finite in zip(prepared.numbers, answers, generation.finite, strict=False):
            whole = replace(answer, rows=rows) if finite else Answer(error=non_finite(model.params))
            found.append((number, whole))
        return sorted(found, key=lambda pair: pair[0])

    def answers(self, rows: Iterable[Row], done: Collection[int] = ()) -> Iterator[Numbered]:
        """Batch by batch the numbers of rows and their answers, as `cut` has them.

        Args:
          done: see `cut`. They are not answered again.
        """
        for answered in self.run_all(map(self.prepare, self.cut(rows, done))):
            yield [(number, answer) for number, answer in answered if number not in done]

    def run_all(self, batches: Iterator[Prepared]) -> Iterator[Numbered]:
        """`run` for each batch, in their order; the next one is taken meanwhile."""
        return (self._abreast if _leaves_cores_idle(self.model.params) else self._in_turn)(batches)

    def _in_turn(self, batches: Iterator[Prepared]) -> Iterator[Numbered]:
        """Batch after batch; a thread takes the next one."""
        return map(self.run, ahead(batches))

    def _abreast(self, batches: Iterator[Prepared]) -> Iterator[Numbered]:
        """Two batches at a time, each on a thread of its own; this one takes the next."""
        with ThreadPoolExecutor(ABREAST) as threads:
            running: deque[Future[Numbered]] = deque()
            for prepared in batches:
                running.append(threads.submit(self.run, prepared))
                if len(running) > ABREAST:  # one more, so that no thread waits for who takes the answers
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def _settings_of(self, inputs: Inputs) -> Settings:
        """Of one batch: those that are sampled do not all draw the same numbers."""
        settings = self.settings.copy()
        key = settings.get("key")
        if settings.get("temperature") and key is not None:
            number = crc32(b"".join(row.tobytes() for row in inputs.ids))
            settings["key"] = _fold_in(key, jax.device_put(np.uint32(number)))
        return settings

    def _require_budget(self, visual: int, text: int) -> None:
        """Refuses a row whose budget is too small for it by itself: in its batch it would refuse all others.

        Raises:
          UserError: it is.
        """
        config, kind = self.model.config, (visual, text)
        if kind not in self._too_dear:
            self._too_dear[kind] = None
            sparsity = replace(as_sparsity(self.settings["sparsity"]), seed=None)
            try:
                plan_for(sparsity, config, [kind], config.visual_bucket(visual) if visual else 0, text)
            except UserError as error:
                self._too_dear[kind] = str(error)
        if why := self._too_dear[kind]:
            raise UserError(why)

    def _filled(self, rows: list[Any]) -> list[Any]:
        return rows + rows[:1] * (self.batch_size - len(rows))

    def _seen(self, source: Any, is_video: bool, seen: dict[Any, Visual | UserError]) -> Visual:
        """An image or video, prepared when it is seen first."""
        key = (str(source), is_video) if isinstance(source, str | Path) else id(source)
        if key not in seen:
            try:
                if is_video:
                    seen[key] = self.processor.preparation.video(source, self.sampling, self.aspect)
                else:
                    seen[key] = self.processor.preparation.image(source, self.aspect)
            except UserError as error:
                seen[key] = error
        found = seen[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _visual_tokens(self, image: Any) -> int:
        config = self.model.config
        return config.image_layout(image_size(image)).tokens if config.most_tiles > 1 else config.tokens_per_image

    def _encodes_apart(self) -> bool:
        """Whether the tower may run before the plan is known: no method shrinks images."""
        return not METHODS[as_sparsity(self.settings["sparsity"]).method].shrinks

    def _encoded(self, inputs: Inputs, order: np.ndarray | None) -> tuple[Any, float]:
        """The visual tokens of all rows and the tower's seconds, or what the tower has yet to see, and none."""
        if order is None:
            return inputs.images, 0.0
        params, config = self.model.params, self.model.config
        with on_mesh_of(params), tower_on_device(params) as whole:
            images = put_beside(params, (inputs.images, order))
            return self._programs.timed(encode_held_once, whole, *images, config=config)


def answer_all(
    model: Model,
    images: Images,
    prompts: Sequence[Any],
    *,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    videos: Videos = None,
    frames: int = SAMPLING.frames,
    sampling: str = SAMPLING.rule,
    **settings: Any,
) -> Iterator[tuple[int, Answer]]:
    """Answers any number of questions, in batches of one shape, as they get ready.

    Args:
      model, images, prompts, videos, frames, sampling: see `generate`. Files are read batch by batch.
      batch_size: rows that are answered together; a batch with fewer is filled up.
      progress: a bar on stderr with rate and time left, if that is a terminal.
      settings: others of `generate`, by name.

    Yields:
      The number of a question among `prompts`, and its `Answer`; one that cannot be answered says why in `error`.

    Raises:
      UserError: settings that cannot be, or images that do not go with the prompts.
    """
    rows, _ = asked_about(images, videos, prompts)
    batcher = Batcher(model, batch_size=min(batch_size, len(rows)), sampling=Sampling(frames, sampling), **settings)
    with show_progress("answering", len(rows), show=progress) as advance:
        for answered in batcher.answers(rows):
            advance(len(answered))
            yield from answered


def _leaves_cores_idle(params: Params) -> bool:
    """Whether the device is a CPU, on which one program seldom keeps all cores busy. On others a second batch would
    take the memory that the first one may need; on a mesh the devices of two programs would wait for each other."""
    return jax.default_backend() == "cpu" and mesh_of(params) is None


_fold_in = jax.jit(jax.random.fold_in)
