"""Hugging Face tensor names and parameter paths: the blocks of which families' tables (`NAMES`) are made.

A canonical name is the one that published checkpoints use (transformers 4.x): `vision_tower.vision_model. ...`,
`language_model.model. ...`. A table's rows say what the names are, its spellings how other writers begin them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from flax import traverse_util

DECODER = "language_model"  # where a decoder's parameters stand in the tree


class Row(NamedTuple):
    """A module in canonical names, its path in the parameter tree, and what it stores; {i} is a layer."""

    module: str
    path: str
    stores: tuple[tuple[str, str], ...]  # tensor, parameter: the same array


class Entry(NamedTuple):
    """A parameter and the tensor that holds it in a Hugging Face checkpoint."""

    name: str  # canonical
    path: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """The names of one family, read in both directions.

    Attributes:
      rows: what the names are.
      spellings: how canonical names begin -> how the same names begin elsewhere.
      harmless: canonical names, with {i} for a layer, of buffers that older releases stored beside the weights; they
        follow from the configuration.
    """

    rows: tuple[Row, ...]
    spellings: Mapping[str, tuple[str, ...]]
    harmless: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def _by_path(self) -> dict[str, str]:
        return {
            "/".join(filter(None, (row.path, parameter))): ".".join(filter(None, (row.module, tensor)))
            for row in self.rows
            for tensor, parameter in row.stores
        }

    @cached_property
    def _known(self) -> frozenset[str]:
        return self.harmless | set(self._by_path.values())

    def entries(self, params: Mapping[str, Any]) -> dict[str, Entry]:
        """What a Hugging Face checkpoint of this parameter tree holds, by canonical name.

        Args:
          params: nested dict whose leaves have a shape, such as `abstract_params(config, dtype)`.

        Raises:
          ValueError: the table has no row for a parameter.
        """
        entries = {}
        leaves: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(params))
        for path, leaf in leaves.items():
            joined = "/".join(path)
            layer = re.search(r"/layers_(\d+)/", joined)
            pattern = joined if layer is None else joined.replace(layer.group(), "/layers_{i}/")
            if pattern not in self._by_path:
                raise ValueError(f"no Hugging Face name is known for the parameter {joined}")
            name = self._by_path[pattern] if layer is None else self._by_path[pattern].replace("{i}", layer.group(1))
            entries[name] = Entry(name, path, tuple(leaf.shape))
        return entries

    def canonical(self, name: str) -> str | None:
        """The canonical spelling of a tensor name, or None where the table has no such tensor.

        Raises:
          ValueError: two rows of the table claim the name.
        """
        found = [
            first + name.removeprefix(spelling)
            for first, spellings in self.spellings.items()
            for spelling in spellings
            if name.startswith(spelling) and _pattern(first + name.removeprefix(spelling)) in self._known
        ]
        if len(found) > 1:
            raise ValueError(f"the weight table reads {name} in more than one way: {found}")
        return found[0] if found else None

    def is_harmless(self, name: str) -> bool:
        """Whether a canonical name is that of a known extra, which a model does without."""
        return _pattern(name) in self.harmless

    def part(self, name: str) -> str | None:
        """The part of the parameter tree, such as "vision_tower", that a tensor of any spelling belongs to."""
        pattern = _pattern(self.canonical(name) or "")
        return next((path.split("/")[0] for path, known in self._by_path.items() if known == pattern), None)


# What a kind of module stores. Biases that a model does not have are not in its tree.
DENSE = (("weight", "weight"), ("bias", "bias"))
NORM = (("weight", "scale"), ("bias", "bias"))
EMBEDDING = (("weight", "embedding"),)

TOWER, TEXT, HEAD = "vision_tower.vision_model.", "language_model.model.", "language_model.lm_head."
EMBEDDINGS = TEXT + "embed_tokens.weight"


def vision_rows(module: str = TOWER, path: str = "vision_tower") -> tuple[Row, ...]:
    """A CLIP tower, or one that has some of its parts."""
    layer, own = module + "encoder.layers.{i}.", path + "/layers_{i}/"
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    return (
        Row(module + "embeddings", path, (("class_embedding", "class_embedding"),)),
        Row(module + "embeddings.patch_embedding", path + "/patch_embedding", DENSE),
        Row(module + "embeddings.position_embedding", path + "/position_embedding", EMBEDDING),
        Row(module + "pre_layrnorm", path + "/pre_layernorm", NORM),  # misspelt in every checkpoint
        *(Row(layer + name, own + name, NORM) for name in ("layer_norm1", "layer_norm2")),
        *(Row(layer + name, own + name.replace(".", "/"), DENSE) for name in (*attention, "mlp.fc1", "mlp.fc2")),
        Row(module + "post_layernorm", path + "/post_layernorm", NORM),
    )


def decoder_rows(module: str = TEXT, head: str = HEAD, path: str = DECODER) -> tuple[Row, ...]:
    """A Llama decoder, its relatives, and the head."""
    layer, own = module + "layers.{i}.", path + "/layers_{i}/"
    dense = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
    norms = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
    return (
        Row(module + "embed_tokens", path + "/embed_tokens", EMBEDDING),
        *(Row(layer + name, own + name.replace(".", "/"), NORM) for name in norms),
        *(Row(layer + name, own + name.replace(".", "/"), DENSE) for name in dense),
        Row(module + "norm", path + "/norm", NORM),
        Row(head.removesuffix("."), path + "/lm_head", DENSE),
    )


def projector_rows(*layers: str) -> tuple[Row, ...]:
    return tuple(Row(f"multi_modal_projector.{name}", f"multi_modal_projector/{name}", DENSE) for name in layers)


# How the same names begin in files of 4.x and 5.x, in 5.x memory, and in the authors' own checkpoints.
VISION_SPELLINGS = {
    TOWER: (
        TOWER,
        "vision_tower.",
        "model.vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.vision_tower.vision_model.",
        "vision_model.",  # a CLIP checkpoint of its own, as the original layout has it
        "",  # the same, of its tower alone, as 5.x writes it
    ),
}
DECODER_SPELLINGS = {TEXT: (TEXT, "model.language_model.", "model."), HEAD: (HEAD, "lm_head.")}


def projector_spellings(**original: str) -> dict[str, tuple[str, ...]]:
    """Those of each layer of a projector, given how the authors' checkpoints begin it."""
    name = "multi_modal_projector.{}."
    return {
        name.format(layer): (name.format(layer), "model." + name.format(layer), begins)
        for layer, begins in original.items()
    }


# What a model does without: buffers that older releases stored beside the weights and that follow from the
# configuration; the head that pools a SigLIP tower of its own, which no hidden state passes through.
_BUFFERS = (TEXT + "rotary_emb.inv_freq", TEXT + "layers.{i}.self_attn.rotary_emb.inv_freq")
_POOLING = ("probe", "attention.in_proj_weight", "attention.in_proj_bias") + tuple(
    f"{module}.{tensor}"
    for module in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
    for tensor in ("weight", "bias")
)


def harmless(*towers: str) -> frozenset[str]:
    """Of a decoder and of towers with these names."""
    return frozenset(
        {*_BUFFERS, *(tower + "embeddings.position_ids" for tower in towers)}
        | {f"{tower}head.{tensor}" for tower in towers for tensor in _POOLING}
    )


def _pattern(name: str) -> str:
    """A name with its layer number replaced by {i}."""
    return re.sub(r"\.layers\.(0|[1-9]\d*)\.", ".layers.{i}.", name, count=1)
