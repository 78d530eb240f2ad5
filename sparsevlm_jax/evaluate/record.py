"""What a file of answers was made with, beside it: the same command goes on, another one is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from sparsevlm_jax.checkpoints.load import Model
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.files import read_json, write
from sparsevlm_jax.generation.batches import Batcher
from sparsevlm_jax.models.quantize import quantization_of
from sparsevlm_jax.models.stages import Params
from sparsevlm_jax.process import versions
from sparsevlm_jax.pruning.methods import as_sparsity

PACKAGES = ("sparsevlm_jax", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy", "pillow", "av")
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def record_file(answers: Path) -> Path:
    return answers.with_name(f"{answers.name}.run.json")


def settings_of(batcher: Batcher) -> dict[str, Any]:
    """Everything that an answer depends on, as JSON has it."""
    model, settings = batcher.model, batcher.settings
    key = settings.get("key")
    found = {
        "model": describe_model(model),
        "plan": asdict(as_sparsity(settings["sparsity"])),
        "max_new_tokens": settings["max_new_tokens"],
        "end_tokens": settings["end_tokens"],
        "temperature": settings.get("temperature", 0.0),
        "top_p": settings.get("top_p", 1.0),
        "key": None if key is None else jax.device_get(jax.random.key_data(key)).tolist(),
        "aspect": batcher.aspect,
        "frames": batcher.sampling.frames,
        "sampling": batcher.sampling.rule,
        "versions": versions(PACKAGES),
    }
    return json.loads(json.dumps(found))


def describe_model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "dtype": jax.tree.leaves(model.params)[0].dtype.name,
        "quantize": quantization_of(model.params),
        "config": hashlib.sha256(repr(model.config).encode()).hexdigest()[:16],
        "weights": checksum(model.params),
    }


def checksum(params: Params) -> str:
    """Of all parameters, wherever they are: the sum of each one's bits, which no order of adding changes."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {jax.device_get(_sum_of_bits(leaf))}\n".encode())
    return found.hexdigest()[:16]


@jax.jit
def _sum_of_bits(leaf: Array) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize])
    return jnp.sum(bits, dtype=jnp.uint32)


def require_same(answers: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The sittings of earlier runs into the same file of answers.

    Raises:
      UserError: the file was begun with other settings, or by something else.
    """
    file = record_file(answers)
    begun = answers.exists() and answers.stat().st_size > 0
    if not begun:
        return []
    if not file.exists():
        raise UserError(f"{answers}: is there already, and no {file.name} says what made it: give another name")
    record = read_json(file)
    before, sittings = record.get("settings"), record.get("sittings")
    if not isinstance(before, dict) or not isinstance(sittings, list):
        raise UserError(f"{file}: is no record of a run: remove it together with {answers.name}")
    differing = sorted(differences(before, settings))
    if differing:
        raise UserError(
            f"{answers}: was begun with other settings ({'; '.join(differing[:3])}): give another name for the answers"
        )
    return sittings


def write_record(answers: Path, settings: dict[str, Any], sittings: Iterable[Any], summary: dict[str, Any]) -> None:
    """Writes the record; `sittings` are what each run into this file took."""
    content = {"settings": settings, "summary": summary, "sittings": list(sittings)}
    write(record_file(answers), f"{json.dumps(content, indent=2)}\n".encode())


def differences(before: Any, now: Any, name: str = "") -> Iterable[str]:
    """Which entries of two settings differ, by their path."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} was {shown(before)}, now {shown(now)}"
