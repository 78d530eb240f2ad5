"""Between the host and a mesh: what goes with parameters onto their devices, and what comes back.

A mesh may span several processes. Each then calls the same functions with the same arguments, puts what its own
devices need, and gets everything that is brought back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.parallel.mesh import DATA, TENSOR
from sparsevlm_jax.text import count


def mesh_of(params: Any) -> Mesh | AbstractMesh | None:
    """The mesh on which parameters were put; None for one device, or any other way of putting them."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or set(sharding.mesh.axis_names) != {DATA, TENSOR}:
        return None
    return sharding.mesh


def require_rows(params: Any, rows: int) -> None:
    """Refuses a batch whose rows the mesh of the parameters does not divide.

    Raises:
      UserError: naming both.
    """
    mesh = mesh_of(params)
    if mesh is not None and rows % mesh.shape[DATA]:
        raise UserError(
            f"a batch of {count(rows, 'prompt')}, which {DATA}={mesh.shape[DATA]} of the mesh does not divide: fill it "
            f"up, or cut the layers instead ({TENSOR}=N)"
        )


@contextmanager
def on_mesh_of(params: Any) -> Iterator[None]:
    """Programs that are traced within run on the mesh of the parameters, if they have one."""
    mesh = mesh_of(params)
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def device_bytes(tree: Any) -> int:
    """What arrays, or shapes with shardings, take of each device."""
    return sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def shapes_on(tree: Any, sharding: Sharding) -> Any:
    """The shapes of arrays, each with the sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def put_beside(params: Any, tree: Any) -> Any:
    """Arrays of the host where the parameters are, whole on every device; arrays that are there already as they are."""
    mesh = mesh_of(params)
    if mesh is None:
        return jax.device_put(tree)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            if mesh_of(leaf) == mesh:
                return leaf
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return _as_keys(everywhere, jax.random.key_impl(leaf))(put(jax.random.key_data(leaf)))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """Arrays as the host has them, whole, wherever their parts are."""
    return jax.device_get(jax.tree.map(_readable, tree))


def _readable(leaf: jax.Array) -> jax.Array:
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    assert isinstance(leaf.sharding, NamedSharding)
    return _gather(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)


@cache
def _gather(everywhere: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=everywhere)


@cache
def _as_keys(everywhere: NamedSharding, impl: Any) -> Any:
    return jax.jit(partial(jax.random.wrap_key_data, impl=impl), out_shardings=everywhere)
