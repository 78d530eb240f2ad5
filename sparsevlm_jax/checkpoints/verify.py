"""`--verify`: the same image and question through the source in PyTorch and the result in JAX.

The two run one after the other, so that one model at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsevlm_jax.checkpoints.load import Model, load
from sparsevlm_jax.checkpoints.source import Source, open_source
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.inputs.packing import TiledImages, pack_images
from sparsevlm_jax.inputs.processor import Processor
from sparsevlm_jax.layout import Size
from sparsevlm_jax.models.embedding import embed, encode_images
from sparsevlm_jax.models.names import DECODER
from sparsevlm_jax.models.quantize import quantization_of
from sparsevlm_jax.models.stages import prefill
from sparsevlm_jax.models.towers import tower_of
from sparsevlm_jax.pruning.budgets import make_plan
from sparsevlm_jax.pruning.settings import Sparsity

QUESTION = "What do you see in this image?"
# Largest difference of a part, as a share of its largest value. The two sides round at other places.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}
_TOP = 10

Parts = dict[str, np.ndarray]


class Question(NamedTuple):
    """What both sides are asked."""

    ids: np.ndarray  # int32 [l]
    images: np.ndarray | TiledImages  # pixels: float32 [t, 3, S, S]
    size: Size  # of the image

    @property
    def pixel_values(self) -> np.ndarray:
        return self.images.pixel_values if isinstance(self.images, TiledImages) else self.images


@dataclass(frozen=True)
class Report:
    """How far the result is from its source."""

    dtype: str  # the coarser of both sides, or "int8"
    differences: dict[str, float]  # by part: the largest, as a share of the part's largest value
    kl_divergence: float  # of the result's next-token distribution from the source's, nats
    top: tuple[list[tuple[str, float]], list[tuple[str, float]]]  # token and logit, source and result

    @property
    def passed(self) -> bool:
        # NaN on either side compares as False.
        return all(difference <= TOLERANCES[self.dtype] for difference in self.differences.values())

    def text(self) -> str:
        lines = [f"{'part':<24}largest difference (relative; {TOLERANCES[self.dtype]:g} is tolerated in {self.dtype})"]
        lines += [f"{part:<24}{difference:.2e}" for part, difference in self.differences.items()]
        lines += [f"{'KL divergence':<24}{self.kl_divergence:.2e} nats"]
        lines += ["", f"{'source, top logits':<36}result"]
        for (token, logit), (other, other_logit) in zip(*self.top, strict=True):
            lines.append(f"{logit:>9.4f} {token!r:<26}{other_logit:>9.4f} {other!r}")
        lines += ["", "kept tokens of a pruned run: not available, transformers does not prune"]
        return "\n".join(lines)


def verify(
    source: str | Path,
    target: str | Path,
    *,
    revision: str | None = None,
    vision_tower: str | Path | None = None,
) -> Report:
    """Compares a converted checkpoint with its source, part by part, on a photograph and a question.

    Args:
      source, revision, vision_tower: as for `convert`.
      target: its result.

    Raises:
      UserError: torch is not installed, or one of the two cannot be loaded.
    """
    opened = open_source(source, revision=revision, vision_tower=vision_tower)
    question = ask(Processor.from_pretrained(target, opened.model), opened.model)
    theirs, dtype = run_torch(opened, question)
    model = load(target)
    ours = run_jax(model, question)
    dtypes = (dtype, ours["logits"].dtype.name, quantization_of(model.params) or dtype)
    return compare(theirs, ours, max(dtypes, key=lambda name: TOLERANCES[name]), model)


def ask(processor: Processor | None, config: ModelConfig) -> Question:
    """The photograph and a question; for a checkpoint without tokenizer, any token ids."""
    if processor is not None:
        inputs = processor([[demo_model.photo()]], [QUESTION], None if config.most_tiles > 1 else "pad")
        return Question(inputs.ids[0], inputs.images, _size(demo_model.photo()))
    from PIL import Image

    side, random = config.vision.image_size, np.random.default_rng(0)
    size = side, side
    with Image.open(demo_model.photo()) as photo:
        pixels = np.asarray(photo.convert("RGB").resize(size), np.float32)
    layout = config.image_layout(size)
    image = np.full(layout.tokens, config.image_token_id)
    words = random.choice(np.delete(np.arange(min(config.text.vocab_size, config.image_token_id)), 0), 30)
    ids = np.concatenate([words[:15], image, words[15:]]).astype(np.int32)
    images = (pixels / 127.5 - 1).transpose(2, 0, 1)[None]
    if not config.packs_images:
        return Question(ids, images, size)
    tiles = np.repeat(images, config.most_tiles, axis=0)
    return Question(ids, TiledImages(tiles, pack_images([[layout]], config)), size)


def compare(theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], dtype: str, model: Model) -> Report:
    """Reports the differences of all parts; `theirs` and `ours` hold arrays of equal shapes, "logits" among them."""
    differences = {}
    for part, wanted in theirs.items():
        a, b = wanted.astype(np.float64), ours[part].astype(np.float64)
        differences[part] = float(np.max(np.abs(a - b)) / np.max(np.abs(a)))
    wanted, found = (side["logits"].astype(np.float64) for side in (theirs, ours))
    log_p, log_q = (logits - np.logaddexp.reduce(logits) for logits in (wanted, found))
    tops = [np.argsort(-logits)[:_TOP] for logits in (wanted, found)]

    def named(ids: np.ndarray, logits: np.ndarray) -> list[tuple[str, float]]:
        processor = model.processor
        return [(str(i) if processor is None else processor.decode([int(i)]), float(logits[i])) for i in ids]

    return Report(
        dtype,
        differences,
        float(np.sum(np.exp(log_p) * (log_p - log_q))),
        (named(tops[0], wanted), named(tops[1], found)),
    )


def run_jax(model: Model, question: Question) -> Parts:
    """What each part computes here: features, visual tokens, the last token after some layers, its logits."""
    config, params = model.config, model.params
    dtype = params[DECODER]["embed_tokens"]["embedding"].dtype
    pixels, ids = jnp.asarray(question.pixel_values), jnp.asarray(question.ids)[None]
    tower = tower_of(config.vision, config.feature_layers)
    features, _ = tower.apply({"params": params[image_tower(params)]}, pixels)
    images = encode_images(params, jax.device_put(question.images), config)
    visual = int(np.sum(question.ids == config.image_token_id))
    plan = make_plan(Sparsity.dense(), config, visual)
    prompt = embed(params, ids, jnp.asarray([ids.shape[1]]), images, config)
    logits, _, trace = prefill(params, prompt, config, plan, trace=True, max_new_tokens=0)
    assert trace is not None
    parts = {"tower": features, "image features": images.tokens[:visual]}
    parts |= {_layer(i): trace.last_hidden[i, 0] for i in some_layers(config)}
    return {name: np.asarray(x.astype(dtype)) for name, x in (parts | {"logits": logits[0]}).items()}


def run_torch(source: Source, question: Question) -> tuple[Parts, str]:
    """The same in PyTorch, and the dtype that it ran in."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError("verifying runs the source in PyTorch: install torch") from error

    if source.layout == "hf":
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(source.folder, dtype="auto").eval()
    else:  # transformers cannot read it: tensors under the names that it knows
        state = {entry.name: _tensor(source.tensors[name].read()) for name, entry in source.pairs}
        dtype = next(iter(state.values())).dtype
        config = transformers.AutoConfig.for_model(**source.config)
        (architecture,) = source.config["architectures"]  # an Auto class wants a folder
        cls = getattr(transformers, architecture)
        model = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
    with torch.no_grad():
        pixels = torch.from_numpy(question.pixel_values).to(model.dtype)
        look = model.model.get_submodule(image_tower(dict(model.model.named_children())))
        states = look(pixels, output_hidden_states=True).hidden_states
        tower = torch.cat([states[layer] for layer in source.model.feature_layers], -1)
        visual = _image_features(model, pixels, question.size, tiled=source.model.most_tiles > 1)
        # The marker may lie outside the table, so the embeddings are put together here.
        ids = torch.from_numpy(question.ids).long()[None]
        marker = ids == source.model.image_token_id
        embeddings = model.get_input_embeddings()(ids.masked_fill(marker, 0))
        embeddings = embeddings.masked_scatter(marker[..., None], visual)
        output = model(inputs_embeds=embeddings, output_hidden_states=True, logits_to_keep=1)
    parts = {"tower": tower, "image features": visual}
    parts |= {_layer(i): output.hidden_states[i + 1][0, -1] for i in some_layers(source.model)}
    parts |= {"logits": output.logits[0, -1]}
    return {name: part.float().numpy() for name, part in parts.items()}, str(model.dtype).removeprefix("torch.")


def image_tower(parts: Container[str]) -> str:
    """The part of a model that looks at images, in either library; a family with videos has two towers."""
    return "image_tower" if "image_tower" in parts else "vision_tower"


def _image_features(model: Any, pixels: Any, size: Size, *, tiled: bool) -> Any:
    """The visual tokens [n, d] of one image."""
    import torch

    images = (pixels[None], [list(size)]) if tiled else (pixels,)
    found = model.model.get_image_features(*images).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])


def _size(file: Path) -> Size:
    from PIL import Image

    with Image.open(file) as image:
        return image.height, image.width


def some_layers(config: ModelConfig) -> list[int]:
    """First, middle and last but one: what transformers returns for the last is normalised already."""
    last = config.text.num_hidden_layers - 2
    return sorted({0, last // 2, last}) if last >= 0 else []


def _layer(number: int) -> str:
    return f"decoder layer {number}"


def _tensor(array: np.ndarray) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
