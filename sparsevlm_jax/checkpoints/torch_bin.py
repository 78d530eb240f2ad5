"""Tensors in PyTorch's own files (`pytorch_model.bin`): the only source that needs torch."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sparsevlm_jax.checkpoints.safetensors import Tensor, list_shards
from sparsevlm_jax.errors import UserError, first_line
from sparsevlm_jax.files import open_regular, refuse_pointer
from sparsevlm_jax.text import shortlist

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_START = 64  # bytes that tell what a file is


def holds_bins(folder: Path) -> bool:
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's `.bin` file or shards, by name; nothing is read.

    Raises:
      UserError: torch is not installed, or whatever is wrong with index and files; a file that holds anything but
        tensors is refused, its code never runs.
    """
    return list_shards(folder, SINGLE, folder / INDEX, _list_file)


def release() -> None:
    """Closes the mapped files: pages that were read count towards the process until then."""
    _open.cache_clear()


def _list_file(file: Path) -> dict[str, Tensor]:
    found = {
        name: Tensor(file, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), partial(_read, file, name))
        for name, tensor in _open(file).items()
    }
    release()
    return found


def _read(file: Path, name: str) -> np.ndarray:
    import torch

    tensor = _open(file)[name]
    # NumPy has no bfloat16 of its own: the bits travel as integers. A copy, for the mapped file will be closed.
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy(force=True).copy(order="C")


def _fault(tensors: Any) -> str | None:
    """Why what a file holds are not the weights of a model."""
    import torch

    if not isinstance(tensors, dict) or not tensors or not all(isinstance(name, str) for name in tensors):
        return "expected tensors by name"
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            return f"expected tensors by name, {shortlist([name])} is {type(tensor).__name__}"
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            return f"{shortlist([name])} is sparse or without data, expected an array"
    return None


@lru_cache(maxsize=2)
def _open(file: Path) -> dict[str, Any]:
    """The tensors of a file, mapped, without what training knows of them (`nn.Parameter`, `requires_grad`)."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file}: reading .bin weights needs torch; install it, or use safetensors") from None

    with open_regular(file) as stream:
        refuse_pointer(stream.read(_START), file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling has no error type of its own
        raise UserError(
            f"{file}: truncated, damaged, or holds more than tensors (refused): {first_line(error)}"
        ) from error
    if fault := _fault(tensors):
        raise UserError(f"{file}: {fault}")
    return {name: tensor.detach() for name, tensor in tensors.items()}
