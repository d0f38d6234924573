"""Specifications of the supported TPUs and GPUs, and their JAX devices for deviceless compilation."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dbrx_jax.errors import PlanError


@dataclass(frozen=True)
class Target:
    """Specification of one kind of accelerator, per JAX device (on tpu7x half a chip).

    Peaks are dense. TPU figures other than memory: docs.cloud.google.com/tpu/docs, the pages v5e, v5p,
    v6e and tpu7x. GPU figures: NVIDIA's data sheets of the SXM cards.
    """

    name: str
    platform: str  # "tpu" or "cuda"
    # TPU: the compiler's limit, from its error for a program that is too large ("exceeds available HBM (15.75G)",
    # in GiB with two decimals). GPU: the driver's total, which no compiler enforces; JAX allocates three quarters
    # of it unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    bf16_flops: float  # FLOP/s
    int8_flops: float | None  # operations/s; None: not published
    interconnect: float  # bytes/s out of one device over all its links, half the published bidirectional figure
    devices_per_chip: int = 1


_GIB = 1 << 30

TARGETS = {
    target.name: target
    for target in (
        Target("v5e", "tpu", int(15.75 * _GIB), 819e9, 197e12, 393e12, 200e9),
        Target("v5p", "tpu", int(95.74 * _GIB), 2765e9, 459e12, 918e12, 600e9),
        Target("v6e", "tpu", int(31.25 * _GIB), 1638e9, 918e12, 1836e12, 400e9),
        Target("tpu7x", "tpu", int(94.75 * _GIB), 7380e9 / 2, 2307e12 / 2, None, 600e9 / 2, devices_per_chip=2),
        Target("h100", "cuda", 85520809984, 3350e9, 989e12, 1979e12, 450e9),
        Target("h200", "cuda", 151397597184, 4800e9, 989e12, 1979e12, 450e9),
    )
}


def _by_chips(*topologies: str) -> dict[int, str]:
    return {math.prod(map(int, topology.split("x"))): topology for topology in topologies}


_2D = _by_chips("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = _by_chips("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_GPU = _by_chips("1x1x1", "1x1x2", "1x1x4", "1x1x8")  # slices x hosts x GPUs
_SLICES = {"v5e": _2D, "v6e": _2D, "v5p": _3D, "tpu7x": _3D, "h100": _GPU, "h200": _GPU}


def target(kind: str) -> Target:
    """Returns the specification of a kind of accelerator, or raises PlanError."""
    if kind not in TARGETS:
        raise PlanError(f"no accelerator is called {kind!r}: choose one of {', '.join(TARGETS)}")
    return TARGETS[kind]


def slice_sizes(kind: str) -> tuple[int, ...]:
    """Returns the numbers of chips of the usual slices, in ascending order."""
    return tuple(_SLICES[kind])


def topology_for(kind: str, chips: int) -> str:
    """Returns the topology of a slice, such as "8x8" for 64 chips of v5e, or raises PlanError."""
    target(kind)
    slices = _SLICES[kind]
    if chips not in slices:
        raise PlanError(f"no slice of {kind} has {chips!r} chips: choose one of {', '.join(map(str, slices))}")
    return slices[chips]


def devices(kind: str, slice_: int | str) -> list[Any]:
    """Returns the JAX devices of a slice that is not attached, for lowering and compiling only.

    Args:
      kind: a name of :data:`TARGETS`.
      slice_: a number of chips, or a topology such as "8x8", "2x2x4" or, for GPUs, "1x1x8".

    Raises:
      PlanError: the kind or the slice is unknown, or the compiler is not installed.
    """
    accelerator = target(kind)
    topology = topology_for(kind, slice_) if isinstance(slice_, int) else slice_
    if topology not in _SLICES[kind].values():
        raise PlanError(f"{kind} has no slice {topology!r}: choose one of {', '.join(_SLICES[kind].values())}")
    import jax
    from jax.experimental import topologies

    try:
        if accelerator.platform == "tpu":
            options = {"chips_per_host_bounds": (1, 1, 1)} if topology in ("1x1", "1x1x1") else {}
            with _without_metadata_server():
                description = topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{kind}:{topology}", **options
                )
        else:
            proto = _gpu_target_config(accelerator)
            description = topologies.get_topology_desc(platform="cuda", target_config=proto, topology=topology)
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError, ImportError) as error:
        raise PlanError(
            f"cannot compile for {kind}: pip install 'dbrx-jax[compile]' ({str(error).splitlines()[0]:.200})"
        ) from None
    return list(description.devices)


@contextlib.contextmanager
def _without_metadata_server() -> Iterator[None]:
    """Keeps libtpu from querying Google Cloud's metadata server, which it waits for in vain elsewhere."""
    variables = {  # libtpu reads them once
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # these two only silence warnings: the topology is named
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    added = {key: value for key, value in variables.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:  # so that JAX still finds a TPU of this machine
        for key in added:
            os.environ.pop(key, None)


def _gpu_target_config(gpu: Target) -> str:
    """Returns the xla.GpuTargetConfigProto of a Hopper SXM card as text, with the data sheet's figures."""
    name = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200 141GB HBM3e"}[gpu.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.hbm_bandwidth)} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {gpu.hbm_bytes} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" name: "{name}"
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
