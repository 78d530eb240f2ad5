"""Towers and projector on the host: on the device only while images become visual tokens.

Where they are so is told by the parameters themselves: arrays of NumPy in place of JAX's. Programs that are given what
images have become already do not take them as arguments, because nothing in those programs uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

from sparsevlm_jax.models.stages import Params, beside_decoder


def to_host(params: Params) -> Params:
    """The same parameters, those of towers and projector on the host."""
    return params | jax.device_get(beside_decoder(params))


def is_offloaded(params: Params) -> bool:
    """Whether towers and projector are on the host."""
    return any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(beside_decoder(params)))


@contextmanager
def tower_on_device(params: Params) -> Iterator[Params]:
    """The parameters as programs take them that see images. What lies on the host is put on the device, and let go of
    at the end; the programs have to be done by then."""
    if not is_offloaded(params):
        yield params
        return
    placed = jax.device_put(beside_decoder(params))
    try:
        yield params | placed
    finally:
        for leaf in jax.tree.leaves(placed):
            leaf.delete()
