"""A model for lmms-eval: `python -m lmms_eval --model sparsevlm_jax --model_args pretrained=DIR,method=v1.5,keep=192`.

lmms-eval hands over all requests of a task at once and finds these classes by the entry point `lmms_eval.models`. It is
imported in this folder and nowhere else in the package.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from sparsevlm_jax.checkpoints.load import Model, load
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.generation.answer import Answer
from sparsevlm_jax.generation.batches import BATCH_SIZE, Batcher, Bucket, Row
from sparsevlm_jax.inputs.messages import Asked, read_prompts
from sparsevlm_jax.inputs.video import SAMPLING, Sampling
from sparsevlm_jax.pruning.methods import sparsity
from sparsevlm_jax.pruning.settings import BUDGETS

NEW_TOKENS = 128  # where a task does not say
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class How(NamedTuple):
    """What a request asks of decoding, as far as it makes another batch."""

    max_new_tokens: int
    temperature: float
    top_p: float


class Request(NamedTuple):
    """A request of either kind.

    Attributes:
      context: the text that it was built with; the chat class asks what its messages say.
      ask: a function of the document.
    """

    context: str
    settings: dict[str, Any]
    ask: Any
    document: tuple[str, str, Any]  # task, split and number


class SimpleModel(lmms):
    """Texts, and the images or videos that `doc_to_visual` gives.

    Args (of `--model_args`, whose values have no commas: layers and counts are joined by "+"):
      pretrained, revision, dtype, quantize, check: see `load`; by default the embedded model.
      method, keep, keep_at (2:300+6:200), layers (2+6), flops_share, cache_bytes, scale, bias, heads, per_frame: what
        is pruned, see docs/methods.md.
      max_new_tokens: the longest answer, whatever a task asks for.
      aspect, seed: see `generate`. frames, sampling: which frames are taken of a video.
      batch_size: rows that are answered together, from `--batch_size`. device: jax chooses, see JAX_PLATFORMS.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        check: bool = True,
        method: str = "v1.5",
        max_new_tokens: int | None = None,
        aspect: str | None = None,
        seed: int = 0,
        frames: int = SAMPLING.frames,
        sampling: str = SAMPLING.rule,
        batch_size: int | str = BATCH_SIZE,
        max_batch_size: int | None = None,
        device: str | None = None,
        **pruning: Any,
    ) -> None:
        super().__init__()
        _require_alone()
        self.batch_size = _whole(batch_size)
        self._longest = max_new_tokens
        self._settings: dict[str, Any] = {
            "sparsity": sparsity(method, **_read_pruning(pruning), seed=seed),
            "batch_size": self.batch_size,
            "seed": seed,
            "aspect": aspect,
            "sampling": Sampling(frames, sampling),
        }
        self._model = _load(pretrained, revision, dtype, quantize, check)
        self._batchers: dict[How, Batcher] = {}

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to every request, in their order; one that cannot be answered is an empty text and an error in
        the log."""
        read = [self._read(instance.args) for instance in requests]
        groups: dict[How, list[int]] = defaultdict(list)
        for number, request in enumerate(read):
            groups[self._how(request.settings)].append(number)
        answers: dict[int, Answer] = {}
        with tqdm(total=len(read), desc="answering", disable=None) as bar:
            for how, numbers in groups.items():
                for number, answer in self._answers(how, read, numbers):
                    answers[number] = answer
                    bar.update()
        _report(list(answers.values()))
        return [self._result(request, answers[number]) for number, request in enumerate(read)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("sparsevlm_jax answers in words: no loglikelihood, take generate_until tasks")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("sparsevlm_jax answers one question at a time: no tasks of several rounds")

    def clean(self) -> None:
        """Lets go of the model; there is nothing of PyTorch to be emptied."""
        self._batchers.clear()
        del self._model

    def _read(self, args: tuple[Any, ...]) -> Request:
        context, settings, doc_to_visual, number, task, split = args
        return Request(context, settings, doc_to_visual, (task, split, number))

    def _asked(self, request: Request) -> Asked:
        """The question with what it shows, which is read now."""
        seen = [_part(visual) for visual in request.ask(self._document(request)) or []]
        return _of_messages([{"role": "user", "content": [*seen, {"type": "text", "text": request.context}]}])

    def _document(self, request: Request) -> Any:
        task, split, number = request.document
        return self.task_dict[task][split][number]

    def _how(self, settings: dict[str, Any]) -> How:
        """How a task wants its answers.

        Raises:
          UserError: by searching several beams.
        """
        if (settings.get("num_beams") or 1) != 1:
            raise UserError(f"num_beams {settings['num_beams']}: answers are greedy or sampled, beams are not searched")
        most = int(settings.get("max_new_tokens") or NEW_TOKENS)
        most = most if self._longest is None else min(most, self._longest)
        temperature = settings.get("temperature")
        samples = settings.get("do_sample", bool(temperature)) and temperature != 0
        if not samples:
            return How(most, 0.0, 1.0)
        return How(most, 1.0 if temperature is None else float(temperature), float(settings.get("top_p") or 1.0))

    def _answers(self, how: How, requests: Sequence[Request], numbers: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        """Numbers and answers; images of the next batch are read and prepared while the device works."""
        if how not in self._batchers:
            self._batchers[how] = Batcher(self._model, **self._settings, **how._asdict())
        batcher = self._batchers[how]
        for answered in batcher.run_all(map(batcher.prepare, self._batches(batcher, requests, numbers))):
            yield from answered

    def _batches(
        self, batcher: Batcher, requests: Sequence[Request], numbers: Sequence[int]
    ) -> Iterator[dict[int, Row]]:
        """Batches of one bucket, as these fill; no more is held than what waits for its bucket."""
        waiting: dict[Bucket, dict[int, Row]] = defaultdict(dict)
        for number in numbers:
            try:
                asked = self._asked(requests[number])
                bucket = batcher.bucket(asked)
            except UserError as error:
                yield {number: error}
                continue
            waiting[bucket][number] = asked
            if len(waiting[bucket]) == self.batch_size:
                yield waiting.pop(bucket)
        yield from waiting.values()

    def _result(self, request: Request, answer: Answer) -> GenerationResult:
        if answer.error is not None:
            logger.error(f"no answer to {request.document}: {answer.error}")
        text = _until(answer.text, request.settings.get("until"))
        self.cache_hook.add_partial("generate_until", (request.context, request.settings), text)
        return GenerationResult(text, TokenCounts(answer.prompt_tokens, len(answer.tokens)))


class ChatModel(SimpleModel):
    """Messages, which hold their images and videos; else as `SimpleModel`."""

    is_simple = False

    def _read(self, args: tuple[Any, ...]) -> Request:
        context, doc_to_messages, settings, number, task, split = args
        return Request(context, settings, doc_to_messages, (task, split, number))

    def _asked(self, request: Request) -> Asked:
        return _of_messages(request.ask(self._document(request)))


def _load(pretrained: str | None, revision: str | None, dtype: str | None, quantize: str | None, check: bool) -> Model:
    if pretrained is None:
        return load(demo_model.path(), dtype=dtype or demo_model.DTYPE, quantize=quantize)
    own = None if revision is None else str(revision)
    return load(str(pretrained), revision=own, dtype=dtype, quantize=quantize, check=check)


def _require_alone() -> None:
    """Refuses to be one of several processes, each of which would answer everything.

    Raises:
      UserError: it is.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("started as one of several processes: start it as one, or shard with `sparsevlm answer`")


def _whole(batch_size: int | str) -> int:
    if not str(batch_size).isdecimal() or not int(batch_size):
        raise UserError(f'--batch_size {batch_size}: a whole number is expected; "auto" is not there')
    return int(batch_size)


def _read_pruning(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method as `sparsity` takes them: layers and counts are joined by "+", for want of commas.

    Raises:
      UserError: they are not, or are several budgets.
    """
    budgets = [name for name in BUDGETS if name in given]
    if len(budgets) > 1:
        raise UserError(f"{' and '.join(budgets)} are different budgets: give one of them")
    read = {"keep_at": _pairs, "layers": lambda text: tuple(int(layer) for layer in text.split("+"))}
    found = dict(given)
    for name in read.keys() & found.keys():
        try:
            found[name] = read[name](str(found[name]))
        except ValueError:
            form = "LAYER:COUNT+LAYER:COUNT, as in 2:300+6:200" if name == "keep_at" else "LAYER+LAYER, as in 2+6"
            raise UserError(f"{name}={found[name]}: expected {form}") from None
    return found


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [part.split(":") for part in text.split("+")]
    return tuple((int(layer), int(count)) for layer, count in pairs)


def _of_messages(messages: Any) -> Asked:
    (asked,), _ = read_prompts(messages)
    return asked


def _part(visual: Any) -> dict[str, Any]:
    """What a document shows, as a part of a message.

    Raises:
      UserError: a part of a video, or sound.
    """
    if isinstance(visual, dict):
        if set(visual) - {"type", "url", "path"}:
            raise UserError(f"{shown(visual)}: whole videos are taken, no parts of them")
        return {"type": visual.get("type", "video"), "url": visual.get("url") or visual.get("path")}
    is_video = isinstance(visual, str) and not visual.lower().endswith(IMAGES)
    return {"type": "video" if is_video else "image", "url": visual}


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """The text up to the first of what ends it."""
    for end in [ends] if isinstance(ends, str) else ends or []:
        text = text.split(end)[0] if end else text
    return text


def _report(answers: Sequence[Answer]) -> None:
    """Writes what answering took into lmms-eval's results: it appears there as averages."""
    whole = [answer for answer in answers if answer.error is None]
    if not whole:
        return
    prefill = sum(answer.prefill_seconds / answer.rows for answer in whole)
    seconds = prefill + sum(answer.decode_seconds / answer.rows for answer in whole)
    tokens = sum(len(answer.tokens) for answer in whole)
    more = {
        "total_requests": len(answers),
        "errors": len(answers) - len(whole),
        "visual_tokens": fmean(answer.visual_tokens[0] for answer in whole),
        "entering_tokens": fmean(answer.entering_tokens for answer in whole),
        "prefill_seconds": prefill / len(whole),
        "compile_seconds": sum(answer.compile_seconds / answer.rows for answer in whole),
    }
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, more)
