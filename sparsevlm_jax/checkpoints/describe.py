"""What a checkpoint holds, converted or not; no weights are read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsevlm_jax.checkpoints import llava_original
from sparsevlm_jax.checkpoints.joined import parts_of
from sparsevlm_jax.checkpoints.manifest import is_converted, read_manifest
from sparsevlm_jax.checkpoints.source import list_tensors
from sparsevlm_jax.config import is_original, read_config, refuse_adapter
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import user_path
from sparsevlm_jax.models.family import FAMILIES, config_from_hf
from sparsevlm_jax.models.names import DECODER
from sparsevlm_jax.text import printable

_PARTS = ("vision_tower", "image_tower", "video_tower", "multi_modal_projector", DECODER)


class _Held(NamedTuple):
    """A tensor or parameter."""

    part: str
    dtype: str
    parameters: int


def describe(path: str | Path) -> dict[str, Any]:
    """Format, configuration, parameters by part and dtype, and a converted checkpoint's origin, as JSON has it.

    Raises:
      UserError: no such folder, or no checkpoint.
    """
    folder = user_path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder")
    if is_converted(folder):
        manifest = read_manifest(folder)
        held = [_Held(r.path.split("/")[0], r.stored_dtype, math.prod(r.shape)) for r in manifest.records]
        origin = {**manifest.source, "versions": manifest.versions, "groups": len(manifest.groups)}
        return {"format": "orbax", "config": _config(folder), "parts": _sums(held), "origin": origin}
    refuse_adapter(folder)
    tensors, config = list_tensors(folder), _config(folder)
    suffix = next(iter(tensors.values())).file.suffix.removeprefix(".") if tensors else "empty"
    # The original layout calls itself all sorts of things.
    names = FAMILIES[llava_original.family_name(config) if "layout" in config else config["model_type"]].names
    held = [
        _Held(names.part(parts_of(name)[0]) or "other", tensor.dtype, math.prod(tensor.shape))
        for name, tensor in tensors.items()
    ]
    return {"format": suffix, "config": config, "parts": _sums(held)}


def print_description(found: dict[str, Any]) -> None:
    """Prints what `describe` found as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table("part", "dtype", "tensors", "parameters", "bytes", title=f"{found['format']} checkpoint")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in found["parts"]:
        table.add_row(*(f"{row[key]:,}" if isinstance(row[key], int) else printable(row[key]) for key in row))
    console.print(table)
    for part in ("config", "origin"):
        for key, value in found.get(part, {}).items():
            console.print(printable(f"{part}: {key}: {value}"), soft_wrap=True)


def _config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    if is_original(config):
        return {"layout": "original", **config}
    return asdict(config_from_hf(config, str(folder / "config.json")))


def _sums(held: list[_Held]) -> list[dict[str, Any]]:
    rows = []
    for part, dtype in sorted({(item.part, item.dtype) for item in held}, key=lambda key: _order(*key)):
        sizes = [item.parameters for item in held if (item.part, item.dtype) == (part, dtype)]
        width = _width(dtype)
        row = {"part": part, "dtype": dtype, "tensors": len(sizes), "parameters": sum(sizes)}
        rows.append(row | {"bytes": sum(sizes) * width})
    return rows


def _order(part: str, dtype: str) -> tuple[int, str]:
    return (_PARTS.index(part) if part in _PARTS else len(_PARTS), dtype)


def _width(dtype: str) -> int:
    """Bytes of a value; extras may be of types that NumPy names otherwise (I64)."""
    bits = re.search(r"[0-9]{1,3}", dtype)
    return max(1, int(bits[0]) // 8) if bits else np.dtype(bool).itemsize
