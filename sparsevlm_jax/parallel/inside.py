"""What programs keep where while they run on a mesh. Without one everything here does nothing.

The mesh is the one that JAX has in its context while a program is traced (`jax.set_mesh`, or `on_mesh_of`), as far as
it has the axes of this package and leaves them to the compiler.

Axis letters: b batch, l length, n heads, h head dim, m images, c words of a vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from sparsevlm_jax.parallel.mesh import DATA, TENSOR

BY_ROW = PartitionSpec(DATA)
BY_HEAD = PartitionSpec(DATA, None, TENSOR, None)  # of [b, l, n, h]


def sizes() -> dict[str, int] | None:
    """Devices along both axes; None where programs run on one."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(types.get(axis) != AxisType.Auto for axis in (DATA, TENSOR)):
        return None
    return {axis: mesh.shape[axis] for axis in (DATA, TENSOR)}


def keep(x: Array, spec: PartitionSpec = BY_ROW) -> Array:
    """The same array, cut so: by default rows shared, and whole otherwise."""
    return x if sizes() is None else jax.lax.with_sharding_constraint(x, spec)


def whole(x: Array) -> Array:
    """The same array, whole on every device."""
    return keep(x, PartitionSpec())


def divides(size: int) -> bool:
    """Whether a vocabulary of so many is cut."""
    found = sizes()
    return found is not None and size % found[TENSOR] == 0


def rows_of(table: Array, ids: Array) -> Array:
    """table[ids] of a table [c, d] that is cut by its rows: each device gives those that it has, and all are summed.

    Written out, because the compiler brings the whole table to every device where there is one id only.
    """

    def own_rows(table: Array, ids: Array) -> Array:
        at = ids - jax.lax.axis_index(TENSOR) * len(table)
        own = (at >= 0) & (at < len(table))
        rows = table[jnp.where(own, at, 0)]
        return jax.lax.psum(jnp.where(own[..., None], rows, jnp.zeros((), rows.dtype)), TENSOR)

    return _on_each(own_rows, (PartitionSpec(TENSOR), BY_ROW), BY_ROW)(table, ids)


def gathered(x: Array) -> Array:
    """Rows [..., c] whose channels each device makes some of, whole."""
    if not divides(x.shape[-1]):
        return keep(x)
    # Said of the parts first: the compiler would gather what makes them, which is larger.
    return keep(keep(x, PartitionSpec(DATA, *[None] * (x.ndim - 2), TENSOR)))


def by_head(function: Callable[..., Array], *heads: Array, lengths: Array) -> Array:
    """function(*heads, lengths) on arrays [b, l, n, h] and [b]: each device its own rows and heads."""
    if sizes() is None:
        return function(*heads, lengths)
    return _on_each(function, (*[BY_HEAD] * len(heads), BY_ROW), BY_HEAD)(*heads, lengths)


def by_image(function: Callable[[Any, Array], Any], params: Any, images: Array) -> Any:
    """function(params, images) on images [m, ...]: shared by as many devices as come out even, the result whole."""
    found = sizes()
    if found is None:
        return function(params, images)
    ways = ((DATA, TENSOR), (DATA,), (TENSOR,), ())
    axes = next(axes for axes in ways if images.shape[0] % prod(found[axis] for axis in axes) == 0)
    spec = PartitionSpec(axes) if axes else PartitionSpec()
    return jax.tree.map(whole, _on_each(function, (PartitionSpec(), spec), spec)(params, images))


def _on_each(function: Callable[..., Any], taken: Any, made: Any) -> Callable[..., Any]:
    return jax.shard_map(function, in_specs=taken, out_specs=made, check_vma=False)
