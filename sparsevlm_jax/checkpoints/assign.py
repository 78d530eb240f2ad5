"""Pairs the tensors of a checkpoint with the parameters of a model, by its family's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparsevlm_jax.checkpoints.safetensors import Tensor
from sparsevlm_jax.config import DTYPES
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.names import EMBEDDINGS, HEAD, Entry, Table
from sparsevlm_jax.text import shortlist


def assign(
    table: Table, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor], source: str
) -> list[tuple[str, Entry]]:
    """Pairs the tensors of a checkpoint with parameters: every one used once, every parameter set once.

    Args:
      table: the names of the model's family.
      entries: what the model needs, by `table.entries`.
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
        known = table.canonical(name)
        if known is not None and table.is_harmless(known):
            continue
        if known == f"{HEAD}weight" and known not in entries:
            heads.append(name)
        elif known is None or known not in entries:
            unknown.append(name)
        elif known in pairs:
            double.append(f"{name} ({pairs[known][0]})")
        else:
            entry = entries[known]
            pairs[known] = name, entry
            if tensor.shape != entry.shape:
                shapes.append(f"{name} is {list(tensor.shape)}, expected {list(entry.shape)}")
            if tensor.dtype not in DTYPES:
                dtypes.append(f"{name} is {tensor.dtype}")
    problems = {
        f"stored, while config.json ties it to {EMBEDDINGS}, which differs": _untied(heads, tensors, pairs),
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
    if not heads or EMBEDDINGS not in pairs:
        return list(heads)
    table = tensors[pairs[EMBEDDINGS][0]]
    return [name for name in heads if not _equal(tensors[name], table)]


def _equal(a: Tensor, b: Tensor) -> bool:
    readable = {a.dtype, b.dtype} <= {*DTYPES}
    return readable and a.shape == b.shape and np.array_equal(a.read(), b.read())


def all_finite(array: np.ndarray) -> bool:
    """Whether a float32, float16, bfloat16 or int8 array holds neither NaN nor infinity."""
    if array.dtype.itemsize != 2:
        return bool(np.isfinite(array).all())
    # Ten times as fast as np.isfinite in 16 bit: the exponent bits, all set, mean infinity or NaN.
    exponent = np.uint16(0x7C00 if array.dtype == np.float16 else 0x7F80)
    return not array.size or bool((array.view(np.uint16) & exponent).max() != exponent)
