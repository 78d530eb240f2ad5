"""What every family promises, whatever its images become: a family's test makes its models and keeps each promise.

Two tiny random models of it are looked at: a large one, whose prompts have 600 tokens and more, against transformers;
a small one, whose decisions are far enough apart for float32, against the NumPy oracle and against itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import sparsevlm_jax as sv
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.generation.api import generate_ids, require_processor, stream_ids
from sparsevlm_jax.generation.request import GenerationRequest
from sparsevlm_jax.inputs.processor import Inputs
from sparsevlm_jax.layout import NEWLINE, Size
from tests import comparison, models, oracle
from tests.hf import tiny_llava
from tests.test_compilation import COMPILED, events

ATOL, NEW, STEPS = 1e-4, 16, 3
QUESTIONS = ("what is in the heat on the in there", "where", "in what is that there", "is he there or here")
# Of each question: two shapes of images, none, and both in one row.
SHOWN: tuple[tuple[int, ...], ...] = ((0,), (1,), (), (1, 0))
PRUNING: dict[str, dict[str, Any]] = {
    "v1.5": {"keep": 12},
    "v1": {"scale": 1.5, "bias": 1.0, "layers": (0, 1)},
    "v2.0": {"keep": 9, "heads": 2},
    "fastv": {"layers": (0, 1), "ratio": 0.5},
    "pyramiddrop": {"layers": (0, 1), "ratio": 0.5},
    "vision": {"keep": 9},
    "uniform": {"layers": (0, 1), "ratio": 0.5},
    "random": {"layers": (0, 1), "ratio": 0.5},
}
encoded: Any = jax.jit(sv.encode_images, static_argnames="config")
embedded: Any = jax.jit(sv.embed, static_argnames="config")


@dataclass(frozen=True)
class Case:
    """A model on both sides, and a batch of questions about images of two shapes."""

    folder: Path
    ours: sv.Model
    images: tuple[Image.Image, Image.Image]

    @cached_property
    def theirs(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.folder).eval()

    @cached_property
    def inputs(self) -> Inputs:
        return self.asked(range(len(SHOWN)))

    def asked(self, rows: Sequence[int]) -> Inputs:
        shown = [[self.images[number] for number in SHOWN[row]] for row in rows]
        return require_processor(self.ours)(shown, [QUESTIONS[row] for row in rows])

    def answers(self, inputs: Inputs, sparsity: sv.Sparsity, new: int = NEW) -> list[list[int]]:
        model = self.ours
        return generate_ids(model.params, model.config, inputs.ids, inputs.images, **settings(sparsity, new)).tokens

    def run(self, sparsity: sv.Sparsity) -> GenerationRequest:
        return GenerationRequest(
            self.ours.params, self.ours.config, self.inputs.ids, self.inputs.images, **settings(sparsity)
        )

    def prompt(self, run: GenerationRequest) -> sv.Prompt:
        ids, lengths = jax.device_put((run.packed.input_ids, run.packed.lengths))
        return embedded(run.params, ids, lengths, run.images, config=self.ours.config)


@dataclass(frozen=True)
class Family:
    large: Case
    small: Case


def family(place: Path, *, large: tuple[int, int], small: tuple[int, int], **model: Any) -> Family:
    """Two models of a family.

    Args:
      large, small: pixels per side of a tile and of a patch.
      model: as `tiny_llava` takes it; `canvases` are sides of `image_grid_pinpoints` in tiles.
    """
    cases = []
    for name, (tile, patch), layers in (("large", large, 2), ("small", small, 3)):
        settings, top = dict(model), dict(model.get("top", {}))
        if canvases := settings.pop("canvases", None):
            top["image_grid_pinpoints"] = [[tile * down, tile * across] for down, across in canvases]
        settings |= {"layers": layers, "image_size": tile, "patch_size": patch, "top": top}
        cases.append(case(place / name, **settings))
    return Family(*cases)


def case(folder: Path, **model: Any) -> Case:
    """A model, and images of two shapes.

    Args:
      model: as `tiny_llava` takes it.
    """
    tile = model["image_size"]
    shapes = (tile * 9 // 10, tile * 3 // 2), (tile * 17 // 10, tile // 2)
    tiny_llava(folder, **model)
    return Case(folder, sv.load(folder), (image(shapes[0], 0), image(shapes[1], 1)))


def image(size: Size, seed: int) -> Image.Image:
    """Noise on a slope, so that no two patches are alike."""
    height, width = size
    slope = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 80, width)[None, :, None]
    noise = np.random.default_rng(seed).integers(0, 55, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8))


def settings(sparsity: sv.Sparsity, new: int = NEW) -> Any:
    return {"sparsity": sparsity, "max_new_tokens": new, "end_tokens": ()}


def torch_inputs(case: Case, row: int) -> dict[str, Any]:
    """What transformers takes for one row."""
    ids = torch.from_numpy(case.inputs.ids[row].astype(np.int64))[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | (torch_images(case, SHOWN[row]) if SHOWN[row] else {})


def torch_images(case: Case, shown: Sequence[int]) -> dict[str, Any]:
    own = require_processor(case.ours)([[case.images[number] for number in shown]], [QUESTIONS[0]])
    pixels = torch.from_numpy(own.pixel_values)
    if case.ours.config.most_tiles == 1:
        return {"pixel_values": pixels}
    sizes = [(case.images[number].height, case.images[number].width) for number in shown]
    return {"pixel_values": pixels.unflatten(0, (len(shown), -1)), "image_sizes": torch.tensor(sizes)}


# Against transformers.


def features(family: Family, place: Path) -> None:
    """Tower, projector and packer."""
    case = family.large
    found, saliency, *_ = encoded(case.ours.params, jax.device_put(case.inputs.images), config=case.ours.config)
    layouts, before = case.inputs.layouts, 0
    for layout, number in zip(layouts, [number for row in SHOWN for number in row], strict=True):
        inputs = torch_images(case, [number])
        with torch.no_grad():
            wanted = case.theirs.model.get_image_features(**inputs).pooler_output[0]
        assert wanted.shape[0] == layout.tokens
        np.testing.assert_allclose(found[before : before + layout.tokens], wanted, atol=ATOL, rtol=0)
        own, newlines = np.asarray(saliency[before : before + layout.tokens]), layout.index[:, 0] == NEWLINE
        for end in np.flatnonzero(newlines):  # the tower looks at a row's end as at its patches
            assert own[end] == pytest.approx(own[(layout.line == end) & ~newlines].mean(), rel=1e-5)
        assert (own > 0).all()
        before += layout.tokens


def logits_and_tokens(family: Family, place: Path) -> None:
    """Of 16 greedy tokens, all rows in one batch: a text alone and two images in one row are among them."""
    case = family.large
    run = case.run(sv.Sparsity.dense())
    found = comparison.run(case.ours.config, run.plan, NEW)(run.params, case.prompt(run))["logits"]
    assert max(map(len, case.inputs.ids[:2])) >= 600
    for row in range(len(SHOWN)):
        with torch.no_grad():
            answer = case.theirs.generate(
                **torch_inputs(case, row),
                max_new_tokens=NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        wanted = torch.cat(answer.logits).numpy()
        np.testing.assert_allclose(found[:, row], wanted, atol=ATOL, rtol=0)
        np.testing.assert_array_equal(np.argmax(found[:, row], axis=-1), answer.sequences[0, -NEW:])
        assert len(wanted) == NEW and wanted.std() > 0.3


def conversion(family: Family, place: Path) -> None:
    """There and back, bit for bit: the folder at the end is one that transformers loads as the one at the start."""
    case = family.large
    convert(case.folder, place / "converted")
    to_hf(place / "converted", place / "back")
    converted = sv.load(place / "converted")
    assert converted.config == case.ours.config
    assert bits(converted.params) == bits(case.ours.params)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(place / "back", output_loading_info=True)
    back, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = case.theirs.state_dict(), back.state_dict()
    # No hidden state passes through the head of a SigLIP tower: it is left out, and the configuration says so.
    assert {name for name in before if ".vision_tower.head." not in name} == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


def bits(params: Any) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(params)}


# Against the oracle.


def pruned_by_oracle(method: str, family: Family, place: Path) -> None:
    """SparseVLM in rows of different numbers of visual tokens, each by its own, decision for decision."""
    case = family.small
    prompt = case.prompt(case.run(sv.Sparsity.dense()))
    for option in range(12):  # until nothing is too close for float32
        changed = {"bias": 1.0 + option} if method == "v1" else {"keep": 14 - option}
        run = case.run(sv.sparsity(method, **PRUNING[method] | changed))
        expected = by_oracle(case, run, prompt)
        if not any(map(comparison.too_close, expected)):
            break
    else:
        pytest.fail("every schedule is too close for float32")
    found = jax.tree.map(np.asarray, comparison.run(case.ours.config, run.plan, STEPS)(run.params, prompt))
    for row, wanted in enumerate(expected):
        comparison.compare(found, wanted, run.plan, block(prompt, row), row)


def by_oracle(case: Case, run: GenerationRequest, prompt: sv.Prompt) -> list[oracle.Result]:
    """Of all rows but the last one, whose images are two blocks: the oracle knows of one."""
    decoder, found = models.oracle_decoder(run.params, case.ours.config), []
    for row in range(len(SHOWN) - 1):
        before, visual, after = block(prompt, row)
        own = np.asarray(prompt.embeddings[row, : before + visual + after])
        settings = comparison.wanted(run.plan.sparsity, kept(alone(run, visual)))
        found.append(oracle.generate(decoder, own, before, visual, settings, STEPS))
    return found


def block(prompt: sv.Prompt, row: int) -> models.Row:
    """Tokens before the image, of the image, and behind it."""
    places, length = np.flatnonzero(prompt.visual[row]), int(prompt.lengths[row])
    if not len(places):
        return length, 0, 0
    return int(places[0]), len(places), length - int(places[-1]) - 1


def alone(run: GenerationRequest, visual: int) -> sv.Plan:
    """The plan of a row of so many visual tokens that is asked by itself."""
    return sv.make_plan(run.plan.sparsity, run.config, visual, run.packed.text)


def kept(plan: sv.Plan) -> tuple[tuple[int, int], ...]:
    return tuple((stage.stop - 1, stage.keep) for stage in plan.stages if stage.keep is not None)


def pruned_by_rivals(method: str, family: Family, place: Path) -> None:
    """The same of the other methods, which rank by a few lines of NumPy."""
    case, sparsity = family.small, sv.sparsity(method, **PRUNING[method])
    run = case.run(sparsity)
    prompt, seed = case.prompt(run), None if sparsity.seed is None else jnp.uint32(sparsity.seed)
    prefill = jax.jit(
        partial(sv.prefill, config=case.ours.config, plan=run.plan, trace=True, max_new_tokens=0, seed=seed)
    )
    trace = jax.tree.map(np.asarray, prefill(run.params, prompt)[2])
    decoder, entered = models.oracle_decoder(run.params, case.ours.config), trace.tokens
    for number, event in enumerate(trace.events):
        for row in range(len(SHOWN)):
            places = np.flatnonzero(event.before.visual[row])
            visual = int(np.sum(prompt.visual[row]))
            keep = alone(run, visual).stages[number].keep or 0 if visual else 0
            if method in ("fastv", "pyramiddrop"):
                ahead = method == "pyramiddrop"
                tokens = event.before if ahead else entered
                scores = comparison.attention_of_last_token(decoder, number + ahead, tokens, row, places)
            elif method == "vision":
                scores = np.asarray(prompt.saliency)[row, places]
            elif method == "uniform":
                scores = comparison.spread_evenly(len(places), keep)
            else:
                assert seed is not None
                key = jax.random.fold_in(jax.random.key(seed), event.layer + 1)
                scores = np.asarray(jax.random.uniform(key, (len(places),)))
            comparison.check_kept(event, row, keep, scores)
        entered = event.after


# Against themselves.


def batch_as_singles(method: str, family: Family, place: Path) -> None:
    case, sparsity = family.small, sv.sparsity(method, **PRUNING.get(method, {}))
    together = case.answers(case.inputs, sparsity)
    for row in range(len(SHOWN)):
        assert case.answers(case.asked([row]), sparsity) == [together[row]]


def shared_images(family: Family, place: Path) -> None:
    """Several questions about one row's images, each as it is answered alone; in chunks as at once."""
    case, sparsity = family.small, sv.sparsity("v1.5", **PRUNING["v1.5"])
    shared = require_processor(case.ours)([list(case.images)], [QUESTIONS[0], QUESTIONS[3]])
    together = case.answers(shared, sparsity)
    alone = require_processor(case.ours)([list(case.images)], [QUESTIONS[0]])
    model = case.ours
    *_, last = stream_ids(model.params, model.config, alone.ids, alone.images, every=5, **settings(sparsity))
    assert last.tokens == [together[0]] == case.answers(alone, sparsity)


def new_sizes(family: Family, place: Path) -> None:
    """20 shapes of images: once the buckets are warm, nothing is compiled."""
    case, dense = family.small, sv.Sparsity.dense()
    tile, random = case.ours.config.vision.image_size, np.random.default_rng(0)
    prepared = []
    while len(prepared) < 20:
        own = image(tuple(random.integers(tile // 2, 3 * tile, 2).tolist()), len(prepared))
        inputs = require_processor(case.ours)([[own]], [QUESTIONS[0]])
        bucket = case.ours.config.visual_bucket(inputs.layouts[0].tokens)
        if len({*(seen for seen, _ in prepared), bucket}) <= 2:  # two buckets are enough to see it
            prepared.append((bucket, inputs))
    row = require_processor(case.ours)([[case.images[0]]], [QUESTIONS[0]])
    with torch.no_grad():
        wanted = case.theirs.generate(**torch_inputs(case, 0), max_new_tokens=NEW, do_sample=False)
    assert case.answers(row, dense) == [wanted[0, len(row.ids[0]) :].tolist()]
    warm = {}
    for bucket, inputs in prepared:
        if bucket not in warm:
            warm[bucket] = case.answers(inputs, dense)
            encoded(case.ours.params, jax.device_put(inputs.images), config=case.ours.config)
    counts = {inputs.layouts[0].tokens for _, inputs in prepared}
    with events() as seen:
        for _, inputs in prepared:
            case.answers(inputs, dense)
            encoded(case.ours.params, jax.device_put(inputs.images), config=case.ours.config)
    assert COMPILED not in seen
    assert len(counts) > len(warm) or case.ours.config.most_tiles == 1


def chat(selection: str, family: Family, place: Path) -> None:
    """ "again" answers as a fresh run of the whole conversation; "first" goes on with its selection."""
    case, options = family.small, {"sparsity": sv.sparsity("v1.5", keep=12), "max_new_tokens": 4}
    talk = sv.Chat(case.ours, list(case.images), selection=selection, room=64, **options)
    talk.ask("where")  # so short that both turns lie in one bucket
    first = len(talk.ids)
    talk.ask("why")
    inputs = require_processor(case.ours)([list(case.images)], ["where"])
    np.testing.assert_array_equal(talk.ids[: len(inputs.ids[0])], inputs.ids[0])
    if selection == "again":
        fresh = case.answers(inputs._replace(ids=[talk.ids[:-4]]), options["sparsity"], 4)
        assert talk.ids[-4:].tolist() == fresh[0]
    else:  # one prefill, and every token since went through the decoder
        assert talk._run.packed.lengths.tolist() == [len(inputs.ids[0])]
        assert len(talk.ids) > first + 4 and talk._in_cache == len(talk.ids) - 1


def shrinking(method: str, family: Family, place: Path) -> None:
    """Methods that shrink images: singles as in a batch, or refused by name where an image is no square."""
    case = family.small
    if case.ours.config.image_grid is not None:
        inputs = case.asked([0, 1])
        together = case.answers(inputs, sv.sparsity(method))
        assert [case.answers(case.asked([row]), sv.sparsity(method))[0] for row in (0, 1)] == together
        return
    with pytest.raises(sv.UserError, match=f"{method}: .*{case.ours.config.model_type}"):
        case.answers(case.inputs, sv.sparsity(method))


def promises(*, all_of_them: bool = False) -> tuple[Any, ...]:
    """Each as a parameter of a test: those that hang on a family's own code always, others only when asked for."""
    always = {features, logits_and_tokens, conversion}
    once = {shared_images, new_sizes}

    def promise(check: Callable[..., None], *first: str) -> Any:
        here = check in always or first == ("v1.5",) and check is pruned_by_oracle
        here |= all_of_them and (check in once or first in (("pool",), ("again",)))
        marks = [] if here else [pytest.mark.exhaustive]
        return pytest.param(partial(check, *first), id=" ".join((check.__name__, *first)), marks=marks)

    by_oracle = ("v1.5", "v1", "v2.0")
    return (
        *(promise(check) for check in (features, logits_and_tokens, conversion, shared_images, new_sizes)),
        *(promise(pruned_by_oracle if name in by_oracle else pruned_by_rivals, name) for name in PRUNING),
        *(promise(batch_as_singles, name) for name in ("dense", *PRUNING)),
        *(promise(shrinking, name) for name in ("pool", "downsample")),
        *(promise(chat, selection) for selection in ("again", "first")),
    )
