"""Weights that some checkpoints store joined, row after row: split where they are listed, joined again on the way back.

Phi-3 has one projection for queries, keys and values, and one for gate and up. The parameters are those of every other
decoder: a part is rows a to b of the stored tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from sparsevlm_jax.checkpoints.safetensors import Tensor
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.names import Entry, Table

_DECODER = "language_model."  # how the canonical names of what is joined begin: towers have such parts of their own
# What a name holds -> what the names of its parts hold there, in the order of their rows.
_PARTS = {
    ".self_attn.qkv_proj.": (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
    ".mlp.gate_up_proj.": (".mlp.gate_proj.", ".mlp.up_proj."),
}


def parts_of(name: str) -> tuple[str, ...]:
    """The names of what a stored tensor is joined of; its own alone where it is not."""
    for whole, parts in _PARTS.items():
        if whole in name:
            return tuple(name.replace(whole, part) for part in parts)
    return (name,)


def whole_of(name: str) -> str:
    """The canonical name of the tensor that a part is stored in, where parts are stored joined."""
    if not name.startswith(_DECODER):
        return name
    for whole, parts in _PARTS.items():
        for part in parts:
            if part in name:
                return name.replace(part, whole)
    return name


def split(table: Table, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry], source: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint that stores weights joined, the joined ones as their parts; nothing is read.

    Args:
      table: the names of the model's family.
      entries: what the model needs, by `table.entries`.
      source: what to call the checkpoint in errors.

    Returns:
      Tensors as `assign` takes them. What is no part of the model, or is there as parts already, stays as it is.

    Raises:
      UserError: a joined tensor of another shape than its parts have together.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = parts_of(name)
        known = [table.canonical(part) or "" for part in parts]
        wanted = [entries[part] for part in known if part in entries and part.startswith(_DECODER)]
        if len(parts) == 1 or len(wanted) < len(parts) or any(part in tensors for part in parts):
            found[name] = tensor
        else:
            found |= dict(zip(parts, _rows(name, tensor, wanted, source), strict=True))
    return found


def _rows(name: str, tensor: Tensor, parts: Sequence[Entry], source: str) -> list[Tensor]:
    """A tensor cut into those of its parts. Each reads the whole, and keeps its own rows only."""
    ends = [0, *accumulate(part.shape[0] for part in parts)]
    expected = (ends[-1], *parts[0].shape[1:])
    if tensor.shape != expected:
        raise UserError(f"{source}: {name} is {list(tensor.shape)}, expected {list(expected)}")
    return [
        tensor._replace(shape=part.shape, read=lambda start=start, stop=stop: tensor.read()[start:stop].copy())
        for part, (start, stop) in zip(parts, pairwise(ends), strict=True)
    ]
