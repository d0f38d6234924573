"""Specifications of TPUs and GPUs, and their JAX devices for deviceless compilation."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

from dbrx_jax.errors import PlanError, install_advice


@dataclasses.dataclass(frozen=True)
class Target:
    """Specification of one kind of device, per JAX device (on tpu7x half a chip). None: not published.

    Peaks are dense. TPU figures other than memory: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p, v6e and
    tpu7x; v4's links are from the paper that its page names (six of 50 GB/s). GPU figures: NVIDIA's data sheets of
    the SXM cards and, for B200, of HGX B200 and DGX B200; network: those of DGX systems, a port for each GPU.
    """

    name: str
    platform: str  # "tpu", "cuda" or "cpu"
    # TPU: the compiler's limit, from its error for a program that is too large ("exceeds available HBM (15.75G)",
    # in GiB with two decimals). GPU: the driver's total, which no compiler enforces (A100 and B200: as XLA's
    # descriptions of these cards have it); JAX allocates three quarters of it unless XLA_PYTHON_CLIENT_MEM_FRACTION
    # is set. CPU: a share of the machine's memory.
    hbm_bytes: int
    hbm_bandwidth: float | None  # bytes/s
    bf16_flops: float | None  # FLOP/s
    int8_flops: float | None  # operations/s
    interconnect: float | None  # bytes/s out of one device over all its links, half the bidirectional figure
    devices_per_chip: int = 1
    devices_per_host: int = 4
    network: float | None = None  # bytes/s out of one device to other hosts, where these are not on the links above
    reserved: float = 0.0  # share of hbm_bytes that programs cannot use
    kernels: bool = True  # whether this package has kernels for it, as dbrx_jax.backend decides on a device

    @property
    def usable_bytes(self) -> int:
        """Bytes of a device that programs can use."""
        return round((1 - self.reserved) * self.hbm_bytes)


def _gpu(
    name: str, memory: int, bandwidth: float, bf16: float, int8: float, links: float, network: float, kernels: bool
) -> Target:
    """Returns a GPU in a host of eight. Programs get 95 percent of its memory."""
    target = Target(name, "cuda", memory, bandwidth, bf16, int8, links, devices_per_host=8, network=network)
    return dataclasses.replace(target, reserved=0.05, kernels=kernels)


_GIB = 1 << 30

TARGETS = {
    target.name: target
    for target in (
        Target("v4", "tpu", int(30.75 * _GIB), 1200e9, 275e12, 275e12, 300e9, kernels=False),
        Target("v5e", "tpu", int(15.75 * _GIB), 819e9, 197e12, 393e12, 200e9),
        Target("v5p", "tpu", int(95.74 * _GIB), 2765e9, 459e12, 918e12, 600e9),
        Target("v6e", "tpu", int(31.25 * _GIB), 1638e9, 918e12, 1836e12, 400e9),
        Target("tpu7x", "tpu", int(94.75 * _GIB), 7380e9 / 2, 2307e12 / 2, None, 600e9 / 2, 2, devices_per_host=8),
        _gpu("a100", 85100068864, 2039e9, 312e12, 624e12, 300e9, network=25e9, kernels=False),
        _gpu("h100", 85520809984, 3350e9, 989e12, 1979e12, 450e9, network=50e9, kernels=True),
        _gpu("h200", 151397597184, 4800e9, 989e12, 1979e12, 450e9, network=50e9, kernels=True),
        _gpu("b200", 191514411008, 8000e9, 2250e12, 4500e12, 900e9, network=50e9, kernels=False),
    )
}


def _by_chips(*topologies: str) -> dict[int, str]:
    return {math.prod(map(int, topology.split("x"))): topology for topology in topologies}


_2D = _by_chips("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = _by_chips(
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
_GPU = _by_chips("1x1x1", "1x1x2", "1x1x4", "1x1x8")  # slices x hosts x GPUs
_SLICES = {"v4": _3D, "v5e": _2D, "v5p": _3D, "v6e": _2D, "tpu7x": _3D, "h100": _GPU, "h200": _GPU}


def target(kind: str) -> Target:
    """Returns the specification of a kind of accelerator, or raises PlanError."""
    if kind not in TARGETS:
        raise PlanError(f"no accelerator is called {kind!r:.40}: choose one of {', '.join(TARGETS)}")
    return TARGETS[kind]


def slice_sizes(kind: str) -> tuple[int, ...]:
    """Returns the numbers of chips of the usual slices, or of GPUs in a host, in ascending order."""
    return tuple(_SLICES.get(kind, _GPU))


def topology_for(kind: str, chips: int) -> str:
    """Returns the topology to compile for, such as "8x8" for 64 chips of v5e.

    Raises:
      PlanError: the kind is unknown, or the compiler has no description of it or of so many chips.
    """
    slices = _known_slices(kind)
    if chips not in slices:
        raise PlanError(f"no slice of {kind} has {chips!r} chips: choose one of {', '.join(map(str, slices))}")
    return slices[chips]


def _known_slices(kind: str) -> dict[int, str]:
    """Returns the topologies of a kind that the compiler has a description of, or raises PlanError."""
    if kind not in _SLICES and kind in (*TARGETS, "cpu"):
        raise PlanError(f"cannot compile for {kind}, whose description is not known: choose of {', '.join(_SLICES)}")
    target(kind)
    return _SLICES[kind]


def devices(kind: str, slice_: int | str) -> list[Any]:
    """Returns the JAX devices of a slice that is not attached, for lowering and compiling only.

    Args:
      kind: a name of :data:`TARGETS`.
      slice_: a number of chips, or a topology such as "8x8", "2x2x4" or, for GPUs, "1x1x8".

    Raises:
      PlanError: the kind or the slice is unknown, or the compiler is not installed.
    """
    slices = _known_slices(kind)
    topology = topology_for(kind, slice_) if isinstance(slice_, int) else slice_
    if topology not in slices.values():
        raise PlanError(f"{kind} has no slice {topology!r:.40}: choose one of {', '.join(slices.values())}")
    accelerator = target(kind)
    import jax
    from jax.experimental import topologies

    try:
        if accelerator.platform == "tpu":
            options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if topology in ("1x1", "1x1x1") else {}
            if kind == "v4":
                options["chip_config_name"] = "megacore"  # one JAX device a chip, as on a TPU VM
            with _without_metadata_server():
                description = topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{kind}:{topology}", **options
                )
        else:
            proto = _gpu_target_config(accelerator)
            description = topologies.get_topology_desc(platform="cuda", target_config=proto, topology=topology)
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise PlanError(f"cannot compile for {kind} ({reason:.200}); {install_advice('compile')}") from None
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
  memory_bandwidth: {int(gpu.hbm_bandwidth or 0)} l2_cache_size: 52428800 clock_rate_ghz: 1.98
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
