"""`load()`: a model from a converted checkpoint, a Hugging Face folder or a hub id, onto any device or sharding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sparsevlm_jax import bounds
from sparsevlm_jax.ahead import ahead
from sparsevlm_jax.checkpoints import orbax
from sparsevlm_jax.checkpoints.assign import all_finite, assign
from sparsevlm_jax.checkpoints.hub import locate
from sparsevlm_jax.checkpoints.joined import split
from sparsevlm_jax.checkpoints.manifest import Manifest, is_converted, read_manifest
from sparsevlm_jax.checkpoints.safetensors import list_tensors
from sparsevlm_jax.config import DTYPES, ModelConfig, check_depth, read_config, token_id
from sparsevlm_jax.config_json import complete
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import inside, read_json, user_path
from sparsevlm_jax.inputs.processor import Processor
from sparsevlm_jax.models.family import config_of, family_of
from sparsevlm_jax.models.names import Entry
from sparsevlm_jax.models.offload import to_host
from sparsevlm_jax.models.parameters import entries
from sparsevlm_jax.models.quantize import ParamPath, check_quantize, held_as, scale_of
from sparsevlm_jax.parallel.rules import Where, placement
from sparsevlm_jax.text import shortlist

Placement = jax.sharding.Sharding | Where  # where parameters go: one sharding for all, or by path and shape


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint says about ending an answer."""

    eos_token_ids: tuple[int, ...]  # any of them ends it; may be empty
    pad_token_id: int  # stands behind the end


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: static configuration, parameters (a plain nested dict), and what goes with them."""

    config: ModelConfig
    params: dict[str, Any]
    processor: Processor | None  # None where the checkpoint has no processor files: token ids and pixels only
    generation: GenerationDefaults
    name: str


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    sharding: str | jax.sharding.Mesh | Placement | None = None,
    offload_tower: bool = False,
    check: bool = True,
) -> Model:
    """Loads a checkpoint: one that `sparsevlm convert` wrote, or one in the Hugging Face layout.

    Args:
      source: a folder with config.json and either orbax or safetensors weights (one file, or shards and their index),
        or the id of a model with safetensors on the Hugging Face hub. Without network, ids resolve from its cache.
      revision: branch, tag or commit of a hub id.
      dtype: "float32", "bfloat16" or "float16"; by default the checkpoint's own, float32 where it mixes several.
      quantize: "int8" holds the weights of the decoder's layers in eight bits, made of the stored weights; everything
        else has the `dtype`, in which the model computes. A checkpoint that was converted so stays so.
      sharding: where the parameters go: by default the default device; an arrangement of devices such as "tensor=4", or
        its mesh from `parallel.mesh.make_mesh`, on which everything that takes the model then runs; or a sharding of
        your own. Host memory holds one tensor at a time, of a converted checkpoint one group, of which each device
        gets no more than its shard.
      offload_tower: keep vision towers and projector on the host: they are on the device only while images become
        visual tokens. For one device that is small.
      check: whether every file of a converted checkpoint is compared with its digest before it is used. That takes
        time, a third more where the files are in memory already. Weights in the Hugging Face layout have no digests.

    Raises:
      UserError: no such model, or whatever is wrong with its files; tensors that are missing, unknown, of a wrong
        shape or not finite are listed in one message.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f'dtype "{dtype}" is not supported: choose {", ".join(DTYPES)}')
    check_quantize(quantize)
    if offload_tower and sharding is not None:
        raise UserError("`offload_tower` is for one device: leave the mesh or sharding out, or keep the tower there")
    folder = locate(source, revision)
    manifest = read_manifest(folder) if is_converted(folder) else None
    if quantize and manifest and manifest.quantize:
        raise UserError(f"{folder}: is in {manifest.quantize} already, and stays so: leave `quantize` out")
    if manifest and check and (problems := orbax.changed_files(folder, manifest)):
        raise UserError(f"{'; '.join(problems)}; convert the source again, or load it unchecked (check=False)")
    config = config_of(folder)
    where = placement(sharding, config) if isinstance(sharding, str | jax.sharding.Mesh) else sharding
    params = (
        _restore_params(folder, manifest, config, dtype, quantize, where, check)
        if manifest
        else _read_params(folder, config, dtype, quantize, where)
    )
    return Model(
        config=config,
        generation=_generation_defaults(folder),
        processor=Processor.from_pretrained(folder, config),
        params=to_host(params) if offload_tower else params,
        name=folder.resolve().name if user_path(source).is_dir() else str(source),
    )


def _read_params(
    folder: Path, config: ModelConfig, dtype: str | None, quantize: str | None, sharding: Placement | None
) -> dict[str, Any]:
    """The parameter tree, each tensor on its devices before the next is read."""
    tensors = list_tensors(folder)
    check_depth(config, len(tensors), str(folder))
    wanted, names = entries(config), family_of(config).names
    if config.text.joined_weights:
        tensors = split(names, tensors, wanted, str(folder))
    pairs = assign(names, wanted, tensors, str(folder))
    stored = {tensors[name].dtype for name, _ in pairs}
    if dtype is None:
        dtype = stored.pop() if len(stored) == 1 else "float32"
    params, spoilt = {}, []
    for name, entry in pairs:
        with np.errstate(over="ignore"):  # an overflow is reported below, with its name
            array = tensors[name].read()
            if not scale_of(entry.path, quantize):
                array = array.astype(dtype, copy=False)
        if not all_finite(array):
            spoilt.append(name)
            continue
        placed = jax.device_put(array, _where(sharding, entry.path, entry.shape))
        params |= jax.block_until_ready(_held(entry.path, placed, quantize, sharding))
    if spoilt:
        count = f"{len(spoilt)} of {len(pairs)}"
        raise UserError(f"{folder}: NaN or infinity, as {dtype}, in {count} tensors: {shortlist(spoilt)}")
    return traverse_util.unflatten_dict(params)


def _held(
    path: ParamPath, parameter: jax.Array, quantize: str | None, sharding: Placement | None
) -> dict[ParamPath, jax.Array]:
    """What holds a parameter by path, each where it belongs: itself, or values and scale."""
    parts = held_as(path, parameter, quantize)
    return {path: jax.device_put(part, _where(sharding, path, part.shape)) for path, part in parts.items()}


def _where(sharding: Placement | None, path: ParamPath, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
    return sharding(path, shape) if callable(sharding) else sharding


def entries_of(folder: Path, manifest: Manifest, config: ModelConfig) -> dict[str, Entry]:
    """Every parameter of a converted checkpoint by its path in the tree.

    Raises:
      UserError: manifest and configuration do not belong together.
    """
    check_depth(config, len(manifest.records), str(folder))
    quantize = manifest.quantize
    by_path = {"/".join(entry.path): entry for entry in entries(config, quantize).values()}
    found = {record.path: (record.shape, record.stored_dtype == quantize) for record in manifest.records}
    wanted = {path: (entry.shape, scale_of(entry.path, quantize) is not None) for path, entry in by_path.items()}
    astray = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
    if astray:
        raise UserError(f"{folder}: manifest and config.json describe different parameters: {shortlist(astray)}")
    return by_path


def _restore_params(
    folder: Path,
    manifest: Manifest,
    config: ModelConfig,
    dtype: str | None,
    quantize: str | None,
    sharding: Placement | None,
    check: bool,
) -> dict[str, Any]:
    """The parameter tree of a converted checkpoint, group by group, each device reading its own shards."""
    by_path = entries_of(folder, manifest, config)
    stored = {tuple(record.path.split("/")): record.stored_dtype for record in manifest.records}
    scales = {path: scale for path in stored if (scale := scale_of(path, quantize or manifest.quantize))}
    as_stored = {*scales, *scales.values()}
    if dtype is None:
        stated = {stored[path] for path in stored.keys() - as_stored}
        dtype = stated.pop() if len(stated) == 1 else "float32"
    dtypes = {path: stored[path] if path in as_stored else dtype for path in stored}
    default = jnp.zeros(()).sharding

    def abstract(path: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        shape = by_path["/".join(path)].shape
        where = _where(sharding, path, shape) or default
        return jax.ShapeDtypeStruct(shape, np.dtype(dtypes[path]), sharding=where)

    params = {}
    for number in _compared(folder, manifest) if check else range(len(manifest.groups)):
        paths = [tuple(record.path.split("/")) for record in manifest.groups[number]]
        wanted = {path: abstract(path) for path in paths}
        for path, restored in orbax.restore_group(folder, number, wanted).items():
            params |= jax.block_until_ready(_held(path, restored, quantize, sharding))
    # What was converted is finite; a narrower dtype may overflow.
    narrowed = {path for path in stored if stored[path] != dtypes[path]}
    spoilt = ["/".join(path) for path in params if path in narrowed and not jnp.isfinite(params[path]).all()]
    if spoilt:
        raise UserError(f"{folder}: infinity, as {dtype}, in {len(spoilt)} parameters: {shortlist(spoilt)}")
    return traverse_util.unflatten_dict(params)


def _compared(folder: Path, manifest: Manifest) -> Iterator[int]:
    """The numbers of all groups, each compared with its digests while the one before it is restored."""

    def compared(number: int) -> int:
        orbax.require_whole(folder, number, manifest)
        return number

    return ahead(map(compared, range(len(manifest.groups))))


def _generation_defaults(folder: Path) -> GenerationDefaults:
    """generation_config.json, then config.json, then its text_config with transformers' own defaults."""
    file, config_file = inside(folder, "generation_config.json"), folder / "config.json"
    stated, full = read_json(file, missing={}), complete(read_config(folder), str(config_file))
    layers = [(stated, file), (full, config_file), (full["text_config"], f"{config_file}: text_config")]

    def first(key: str) -> tuple[Any, str]:
        value, where = next(((layer[key], where) for layer, where in layers if layer.get(key) is not None), (None, ""))
        return value, f"{where}: {key}"

    eos, name = first("eos_token_id")
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if len(found) > bounds.END_TOKENS:
        raise UserError(f"{name} lists {len(found)} tokens, expected at most {bounds.END_TOKENS}")
    ends = tuple(token_id(token, name) for token in found)
    pad, name = first("pad_token_id")
    # The first Llamas say -1 for having none.
    return GenerationDefaults(ends, next(iter(ends), 0) if pad in (None, -1) else token_id(pad, name))
