"""Accelerators that XLA can compile for without one: their public figures, and how XLA is told of them.

Figures are those of the makers' data sheets: memory and its bandwidth, and dense FLOP/s of the matrix units. What XLA
needs beyond them (cores, registers, shared memory of a streaming multiprocessor) stands in NVIDIA's programming guide
by compute capability.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from sparsevlm_jax.errors import UserError

GIB = 2**30
_CUDNN = (9, 10)  # what programs are compiled for: the oldest that JAX 0.10 takes


@dataclass(frozen=True)
class Device:
    """One chip.

    Attributes:
      platform: what JAX calls its kind: "cuda" or "tpu".
      memory: bytes that a program can have.
      bandwidth: bytes per second from that memory.
      peak: FLOP/s of its matrix units in 16 bit.
      peak_float32: of products in float32 as this package asks for them: no TF32 on NVIDIA; on TPUs six passes in
        bfloat16.
      target: of a GPU what XLA is told about it, of a TPU the name of the smallest slice with such chips.
    """

    name: str
    platform: str
    memory: int
    bandwidth: float
    peak: float
    peak_float32: float
    target: str


def _gpu(
    name: str,
    *,
    capability: int,
    cores: int,
    fpus: int,
    shared: int,
    l2: int,
    clock: float,
    memory: int,
    bandwidth: float,
    peak: float,
    peak_float32: float,
) -> Device:
    """An NVIDIA GPU of so many streaming multiprocessors.

    Args:
      shared: KiB of shared memory in each; a block gets one less.
      l2: MiB.
      clock: GHz.
    """
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": shared * 1024,
        "shared_memory_per_block_optin": (shared - 1) * 1024,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": round(bandwidth),
        "l2_cache_size": l2 * 2**20,
        "clock_rate_ghz": clock,
        "device_memory_size": memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    info = " ".join(f"{field}: {value}" for field, value in fields.items())
    info += f" cuda_compute_capability {{ major: {capability} }}"
    major, minor = _CUDNN
    target = (
        f'gpu_device_info {{ {info} }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: {major} minor: {minor} }} device_description_str: "{name}"'
    )
    return Device(name, "cuda", memory, bandwidth, peak, peak_float32, target)


def _tpu(name: str, *, memory: float, bandwidth: float, peak: float, slice_of: str) -> Device:
    """A TPU chip; `memory` in GiB is what its compiler gives to programs."""
    return Device(name, "tpu", int(memory * GIB), bandwidth, peak, peak / 6, slice_of)


_HOPPER: dict[str, Any] = {
    "capability": 9,
    "cores": 132,
    "fpus": 128,
    "shared": 228,
    "l2": 50,
    "clock": 1.98,
    "peak": 989e12,
    "peak_float32": 67e12,
}
_DEVICES = (
    _gpu(
        "a100",  # SXM, 80 GB
        capability=8,
        cores=108,
        fpus=64,
        shared=164,
        l2=40,
        clock=1.41,
        memory=80 * GIB,
        bandwidth=2.039e12,
        peak=312e12,
        peak_float32=19.5e12,
    ),
    _gpu("h100", **_HOPPER, memory=80 * GIB, bandwidth=3.35e12),  # SXM
    _gpu("h200", **_HOPPER, memory=141 * 10**9, bandwidth=4.8e12),  # SXM
    _gpu(
        "b200",
        capability=10,
        cores=148,
        fpus=128,
        shared=228,
        l2=126,
        clock=1.965,
        memory=180 * 10**9,
        bandwidth=7.7e12,
        peak=2250e12,
        peak_float32=75e12,
    ),
    _tpu("v5e", memory=15.75, bandwidth=0.819e12, peak=197e12, slice_of="v5e:2x2"),
    _tpu("v5p", memory=95.0, bandwidth=2.765e12, peak=459e12, slice_of="v5p:2x2x1"),
    _tpu("v6e", memory=31.25, bandwidth=1.64e12, peak=918e12, slice_of="v6e:2x2"),
)
DEVICES = {device.name: device for device in _DEVICES}
# Platform -> the makers' name, the extra that brings the compiler, and the modules of which one is there then.
_COMPILERS = {
    "cuda": ("NVIDIA GPUs", "cuda12", ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")),
    "tpu": ("TPUs", "tpu", ("libtpu",)),
}


def require_compiler(device: Device) -> None:
    """Makes XLA's compiler for a device loadable where no such device is: to be called before JAX looks for its
    backends, which it does once in a process.

    Raises:
      UserError: the compiler is not installed.
    """
    what, extra, modules = _COMPILERS[device.platform]
    if not any(map(_installed, modules)):
        raise UserError(
            f"{device.name}: XLA's compiler for {what} is not installed; in an environment of its own: "
            f"pip install 'sparsevlm_jax[{extra}]'"
        )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin asks for a driver
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud which machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and takes a lock, as if there were chips to share
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def chips(device: Device, number: int = 1) -> list[Any]:
    """What stands for so many such chips in shardings, to compile for.

    Raises:
      UserError: the compiler is not there, or does not know the device or so many of them together.
    """
    require_compiler(device)
    try:
        if device.platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=device.target)
        else:
            found = topologies.get_topology_desc(
                platform="cuda", topology_name=device.name, target_config=device.target, topology=f"1x1x{number}"
            )
    except Exception as error:  # which ones depends on the plugin
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{device.name}: XLA's compiler cannot be used: {said}") from error
    there = list(found.devices)
    if len(there) < number:
        raise UserError(f"{device.name}: {number} of them are asked for, a slice {device.target} has {len(there)}")
    return there[:number]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not there, either
        return False
