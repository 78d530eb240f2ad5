"""The one table between Hugging Face tensor names and parameter paths, read in both directions.

A canonical name is the one that published checkpoints use (transformers 4.x): `vision_tower.vision_model. ...`,
`language_model.model. ...`. `SPELLINGS` says how other writers begin the same names, `TABLE` says what the names are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from sparsevlm_jax.checkpoints.safetensors import Tensor
from sparsevlm_jax.config import DTYPES
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.text import shortlist


class Transform(Enum):
    """How a stored tensor becomes a parameter: the order in which its axes are taken."""

    KEEP = None
    LINEAR = (1, 0)  # [out, in] -> [in, out]
    CONV = (2, 3, 1, 0)  # [out, in, height, width] -> [height, width, in, out]

    @property
    def inverse(self) -> tuple[int, ...] | None:
        return self.value and tuple(self.value.index(axis) for axis in range(len(self.value)))


_KEEP, _LINEAR, _CONV = Transform.KEEP, Transform.LINEAR, Transform.CONV
# What a kind of module stores: (tensor, parameter, transform). Biases that a model does not have are not in its tree.
_DENSE = (("weight", "kernel", _LINEAR), ("bias", "bias", _KEEP))
_NORM = (("weight", "scale", _KEEP), ("bias", "bias", _KEEP))
_TABLE_OF_ROWS = (("weight", "embedding", _KEEP),)
_PATCHES = (("weight", "kernel", _CONV), ("bias", "bias", _KEEP))

_TOWER, _TOWER_LAYER = "vision_tower.vision_model.", "vision_tower.vision_model.encoder.layers.{i}."
_TEXT, _TEXT_LAYER = "language_model.model.", "language_model.model.layers.{i}."

# (module in canonical names, its path in the parameter tree, what it stores); {i} is a layer.
TABLE = (
    (_TOWER + "embeddings", "vision_tower", (("class_embedding", "class_embedding", _KEEP),)),
    (_TOWER + "embeddings.patch_embedding", "vision_tower/patch_embedding", _PATCHES),
    (_TOWER + "embeddings.position_embedding", "vision_tower/position_embedding", _TABLE_OF_ROWS),
    (_TOWER + "pre_layrnorm", "vision_tower/pre_layernorm", _NORM),  # misspelt in every checkpoint
    (_TOWER_LAYER + "layer_norm1", "vision_tower/layers_{i}/layer_norm1", _NORM),
    (_TOWER_LAYER + "self_attn.q_proj", "vision_tower/layers_{i}/self_attn/q_proj", _DENSE),
    (_TOWER_LAYER + "self_attn.k_proj", "vision_tower/layers_{i}/self_attn/k_proj", _DENSE),
    (_TOWER_LAYER + "self_attn.v_proj", "vision_tower/layers_{i}/self_attn/v_proj", _DENSE),
    (_TOWER_LAYER + "self_attn.out_proj", "vision_tower/layers_{i}/self_attn/out_proj", _DENSE),
    (_TOWER_LAYER + "layer_norm2", "vision_tower/layers_{i}/layer_norm2", _NORM),
    (_TOWER_LAYER + "mlp.fc1", "vision_tower/layers_{i}/mlp/fc1", _DENSE),
    (_TOWER_LAYER + "mlp.fc2", "vision_tower/layers_{i}/mlp/fc2", _DENSE),
    (_TOWER + "post_layernorm", "vision_tower/post_layernorm", _NORM),
    ("multi_modal_projector.linear_1", "multi_modal_projector/linear_1", _DENSE),
    ("multi_modal_projector.linear_2", "multi_modal_projector/linear_2", _DENSE),
    (_TEXT + "embed_tokens", "language_model/embed_tokens", _TABLE_OF_ROWS),
    (_TEXT_LAYER + "input_layernorm", "language_model/layers_{i}/input_layernorm", _NORM),
    (_TEXT_LAYER + "self_attn.q_proj", "language_model/layers_{i}/self_attn/q_proj", _DENSE),
    (_TEXT_LAYER + "self_attn.k_proj", "language_model/layers_{i}/self_attn/k_proj", _DENSE),
    (_TEXT_LAYER + "self_attn.v_proj", "language_model/layers_{i}/self_attn/v_proj", _DENSE),
    (_TEXT_LAYER + "self_attn.o_proj", "language_model/layers_{i}/self_attn/o_proj", _DENSE),
    (_TEXT_LAYER + "self_attn.q_norm", "language_model/layers_{i}/self_attn/q_norm", _NORM),
    (_TEXT_LAYER + "self_attn.k_norm", "language_model/layers_{i}/self_attn/k_norm", _NORM),
    (_TEXT_LAYER + "post_attention_layernorm", "language_model/layers_{i}/post_attention_layernorm", _NORM),
    (_TEXT_LAYER + "mlp.gate_proj", "language_model/layers_{i}/mlp/gate_proj", _DENSE),
    (_TEXT_LAYER + "mlp.up_proj", "language_model/layers_{i}/mlp/up_proj", _DENSE),
    (_TEXT_LAYER + "mlp.down_proj", "language_model/layers_{i}/mlp/down_proj", _DENSE),
    (_TEXT + "norm", "language_model/norm", _NORM),
    ("language_model.lm_head", "language_model/lm_head", _DENSE),
)

_HEAD, _EMBEDDINGS = "language_model.lm_head.weight", _TEXT + "embed_tokens.weight"

# What a model does without: buffers that older releases stored beside the weights and that follow from the
# configuration; the head that pools a SigLIP tower of its own, which no hidden state passes through.
_BUFFERS = (
    _TOWER + "embeddings.position_ids",
    _TEXT + "rotary_emb.inv_freq",
    _TEXT_LAYER + "self_attn.rotary_emb.inv_freq",
)
_POOLING = ("probe", "attention.in_proj_weight", "attention.in_proj_bias") + tuple(
    f"{module}.{tensor}"
    for module in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
    for tensor in ("weight", "bias")
)
HARMLESS = frozenset({*_BUFFERS, *(f"{_TOWER}head.{tensor}" for tensor in _POOLING)})

# How canonical names begin -> how the same names begin elsewhere: in files of 4.x and 5.x, in 5.x memory, originally.
SPELLINGS = {
    _TOWER: (
        _TOWER,
        "vision_tower.",
        "model.vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.vision_tower.vision_model.",
        "vision_model.",  # a CLIP checkpoint of its own, as the original layout has it
        "",  # the same, of its tower alone, as 5.x writes it
    ),
    "multi_modal_projector.linear_1.": (
        "multi_modal_projector.linear_1.",
        "model.multi_modal_projector.linear_1.",
        "model.mm_projector.0.",
    ),
    "multi_modal_projector.linear_2.": (
        "multi_modal_projector.linear_2.",
        "model.multi_modal_projector.linear_2.",
        "model.mm_projector.2.",
    ),
    _TEXT: (_TEXT, "model.language_model.", "model."),
    "language_model.lm_head.": ("language_model.lm_head.", "lm_head."),
}

_BY_PATH = {
    f"{path}/{parameter}": (f"{module}.{tensor}", transform)
    for module, path, stores in TABLE
    for tensor, parameter, transform in stores
}
_KNOWN = {name for name, _ in _BY_PATH.values()} | HARMLESS


class Entry(NamedTuple):
    """A parameter and the tensor that holds it in a Hugging Face checkpoint."""

    name: str  # canonical
    path: tuple[str, ...]
    shape: tuple[int, ...]  # of the parameter
    transform: Transform

    @property
    def hf_shape(self) -> tuple[int, ...]:
        axes = self.transform.inverse
        return self.shape if axes is None else tuple(self.shape[axis] for axis in axes)

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """A stored tensor of `hf_shape` as a parameter of `shape`: a view, no copy."""
        return tensor if self.transform.value is None else tensor.transpose(self.transform.value)

    def to_hf(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of `to_param`: a view, no copy."""
        axes = self.transform.inverse
        return parameter if axes is None else parameter.transpose(axes)


def spec(params: Mapping[str, Any]) -> dict[str, Entry]:
    """What a Hugging Face checkpoint of this parameter tree holds, by canonical name.

    Args:
      params: nested dict whose leaves have a shape, such as `llava.abstract_params(config, dtype)`.

    Raises:
      ValueError: the table has no row for a parameter.
    """
    entries = {}
    leaves: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(params))
    for path, leaf in leaves.items():
        joined = "/".join(path)
        layer = re.search(r"/layers_(\d+)/", joined)
        pattern = joined if layer is None else joined.replace(layer.group(), "/layers_{i}/")
        if pattern not in _BY_PATH:
            raise ValueError(f"no Hugging Face name is known for the parameter {joined}")
        name, transform = _BY_PATH[pattern]
        name = name if layer is None else name.replace("{i}", layer.group(1))
        entries[name] = Entry(name, path, tuple(leaf.shape), transform)
    return entries


def canonical(name: str) -> str | None:
    """The canonical spelling of a tensor name, or None where the table has no such tensor.

    Raises:
      ValueError: two rows of the table claim the name.
    """
    found = [
        first + name.removeprefix(spelling)
        for first, spellings in SPELLINGS.items()
        for spelling in spellings
        if name.startswith(spelling) and _pattern(first + name.removeprefix(spelling)) in _KNOWN
    ]
    if len(found) > 1:
        raise ValueError(f"the weight table reads {name} in more than one way: {found}")
    return found[0] if found else None


def harmless(name: str) -> bool:
    """Whether a canonical name is that of a known extra, which a model does without."""
    return _pattern(name) in HARMLESS


def assign(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor], source: str) -> list[tuple[str, Entry]]:
    """Pairs the tensors of a checkpoint with parameters: every one used once, every parameter set once.

    Args:
      entries: what the model needs, from `spec`.
      tensors: what the checkpoint holds, by its own names; none is read, but for a head that ought to equal the
        table of embeddings.
      source: what to call the checkpoint in errors.

    Returns:
      (name in the checkpoint, parameter) in the order of `tensors`.

    Raises:
      UserError: everything that is missing, unknown, double, mis-shaped or of another dtype, in one message.
    """
    pairs: dict[str, tuple[str, Entry]] = {}
    unknown, double, shapes, dtypes = [], [], [], []
    heads: list[str] = []  # stored although the table of embeddings is the head
    for name, tensor in tensors.items():
        known = canonical(name)
        if known is not None and harmless(known):
            continue
        if known == _HEAD and known not in entries:
            heads.append(name)
        elif known is None or known not in entries:
            unknown.append(name)
        elif known in pairs:
            double.append(f"{name} ({pairs[known][0]})")
        else:
            entry = entries[known]
            pairs[known] = name, entry
            if tensor.shape != entry.hf_shape:
                shapes.append(f"{name} is {list(tensor.shape)}, expected {list(entry.hf_shape)}")
            if tensor.dtype not in DTYPES:
                dtypes.append(f"{name} is {tensor.dtype}")
    problems = {
        f"stored, while config.json ties it to {_EMBEDDINGS}, which differs": _untied(heads, tensors, pairs),
        "missing": [name for name in entries if name not in pairs],
        "not part of this model": unknown,
        "there under two names": double,
        "of another shape": shapes,
        f"neither {', '.join(DTYPES[:-1])} nor {DTYPES[-1]}": dtypes,
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(items)} {kind}: {shortlist(items)}" for kind, items in problems.items() if items)
        raise UserError(f"{source}: tensors do not fit the configuration: {listed}")
    return list(pairs.values())


def _untied(heads: Sequence[str], tensors: Mapping[str, Tensor], pairs: Mapping[str, tuple[str, Entry]]) -> list[str]:
    """Those of the stored heads that are not the table of embeddings over again."""
    if not heads or _EMBEDDINGS not in pairs:
        return list(heads)
    table = tensors[pairs[_EMBEDDINGS][0]]
    return [name for name in heads if not _equal(tensors[name], table)]


def _equal(a: Tensor, b: Tensor) -> bool:
    readable = {a.dtype, b.dtype} <= {*DTYPES}
    return readable and a.shape == b.shape and np.array_equal(a.read(), b.read())


def all_finite(array: np.ndarray) -> bool:
    """Whether a float32, float16 or bfloat16 array holds neither NaN nor infinity."""
    if array.dtype.itemsize != 2:
        return bool(np.isfinite(array).all())
    # Ten times as fast as np.isfinite in 16 bit: the exponent bits, all set, mean infinity or NaN.
    exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
    return not array.size or bool((array.view(np.uint16) & exponent).max() != exponent)


def _pattern(name: str) -> str:
    """A name with its layer number replaced by {i}."""
    return re.sub(r"\.layers\.(0|[1-9]\d*)\.", ".layers.{i}.", name, count=1)
