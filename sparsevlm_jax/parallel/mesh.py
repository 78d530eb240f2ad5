"""Arrangements of devices: "tensor" cuts every layer of the decoder, "data" shares the rows of a batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sparsevlm_jax.errors import UserError

DATA, TENSOR = "data", "tensor"
_PARTS = re.compile(rf"(?:(?:{DATA}|{TENSOR})=[1-9]\d{{0,5}})(?:,(?:{DATA}|{TENSOR})=[1-9]\d{{0,5}})?")


@dataclass(frozen=True)
class MeshShape:
    """How many devices share the rows of a batch, and how many each layer."""

    data: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Reads "tensor=4", "data=2" or "data=2,tensor=4".

        Raises:
          UserError: anything else.
        """
        sizes = [part.split("=") for part in text.split(",")] if _PARTS.fullmatch(text) else []
        if not sizes or len(dict(sizes)) != len(sizes):
            raise UserError(f'mesh="{text}": expected tensor=N, data=N or both, as in data=2,tensor=4')
        return cls(**{name: int(size) for name, size in sizes})

    @property
    def devices(self) -> int:
        return self.data * self.tensor

    def __str__(self) -> str:
        sizes = {DATA: self.data, TENSOR: self.tensor}
        return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or f"{TENSOR}=1"


ONE = MeshShape()


def make_mesh(shape: str | MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Devices in such an arrangement; both axes are there, whatever their sizes.

    Args:
      devices: by default those of all processes, of which the first are taken.

    Raises:
      UserError: there are too few, or several processes of which some would have none.
    """
    shape = MeshShape.parse(shape) if isinstance(shape, str) else shape
    found = jax.devices() if devices is None else devices
    if len(found) < shape.devices:
        mend = " (on a CPU XLA_FLAGS=--xla_force_host_platform_device_count=N makes N)"
        raise UserError(
            f'mesh="{shape}" takes {shape.devices} devices, there are {len(found)}'
            + mend * (found[0].platform == "cpu")
        )
    chosen = found[: shape.devices]
    if devices is None and len({device.process_index for device in chosen}) < jax.process_count():
        raise UserError(f'mesh="{shape}" takes {shape.devices} of {len(found)} devices: some processes would have none')
    return jax.make_mesh((shape.data, shape.tensor), (DATA, TENSOR), (AxisType.Auto,) * 2, devices=chosen)
