"""Run by test_convert.py with 8 devices: loads a converted checkpoint, every matrix cut over all of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np
from jax._src import array as jax_array
from jax.sharding import NamedSharding, PartitionSpec

from sparsevlm_jax import load
from sparsevlm_jax.checkpoints.convert import convert
from tests.layouts import HF

mesh = jax.make_mesh((8,), ("model",))
placed: list[tuple[int, ...]] = []  # shapes of what was put on a single device


def sharding(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    axes = [axis for axis, size in enumerate(shape) if size % 8 == 0]
    spec: list[str | None] = [None] * len(shape)
    if len(shape) > 1 and axes:
        spec[axes[-1]] = "model"
    return NamedSharding(mesh, PartitionSpec(*spec))


assert jax.device_count() == 8
whole = load(HF).params
with tempfile.TemporaryDirectory() as folder:
    convert(HF, Path(folder) / "orbax")
    put = jax_array.ArrayImpl.__init__

    def watch(self, aval, sharding, arrays, *args, **kwargs):  # every array that comes to be passes here
        if len(sharding.device_set) == 1:
            placed.append(tuple(aval.shape))
        put(self, aval, sharding, arrays, *args, **kwargs)

    jax_array.ArrayImpl.__init__ = watch
    params = load(Path(folder) / "orbax", sharding=sharding).params
    jax_array.ArrayImpl.__init__ = put

cut = 0
for wanted, found in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True):
    assert np.array_equal(np.asarray(wanted), np.asarray(found))
    if not found.sharding.is_fully_replicated:
        cut += 1
        assert {shard.data.size for shard in found.addressable_shards} == {wanted.size // 8}
        assert wanted.shape not in placed, wanted.shape
assert cut > 50
