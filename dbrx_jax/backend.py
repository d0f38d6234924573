"""Selects the backend of Pallas kernels for a platform, if they run there."""

import functools
import os

import jax

GPU_PLATFORMS = ("gpu", "cuda")  # JAX's names of the platform
# Tests add "cpu", to interpret the kernels of either backend there.
KERNEL_BACKENDS = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
MIN_JAX_FOR_GPU_KERNELS = (0, 11, 2)  # the first version with which they were tested
HOPPER = "9.0"  # compute capability
SMALL_VMEM_TPUS = ("TPU v2", "TPU v3", "TPU v4")  # device kinds: 16 MiB, and the kernels need more
KERNELS_VARIABLE = "DBRX_KERNELS"  # environment variable; 0 turns all kernels off


def kernel_backend(platform: str) -> str | None:
    """Returns the backend whose kernels run on a platform: "tpu", "gpu", or None where XLA's operations are used."""
    backend = KERNEL_BACKENDS.get(platform)
    if os.environ.get(KERNELS_VARIABLE) == "0":
        return None
    is_tested_jax = jax.__version_info__ >= MIN_JAX_FOR_GPU_KERNELS
    if backend == "gpu" and not (is_tested_jax and (platform == "cpu" or _only_hopper_gpus())):
        return None
    if backend == "tpu" and platform == "tpu" and _has_small_vmem():
        return None
    return backend


def native_kernels_allowed(platform: str) -> bool:
    """Returns whether a platform may use the native kernels for CPUs, if they were built."""
    return platform == "cpu" and KERNEL_BACKENDS.get("cpu") is None and os.environ.get(KERNELS_VARIABLE) != "0"


@functools.cache
def _has_small_vmem() -> bool:
    """Returns whether a TPU's VMEM is too small for the kernels; false without a TPU, as when compiling for one."""
    tpus = jax.devices() if jax.default_backend() == "tpu" else []
    return any(device.device_kind.startswith(SMALL_VMEM_TPUS) for device in tpus)


@functools.cache
def _only_hopper_gpus() -> bool:
    """Returns whether all GPUs are Hopper; true without a GPU, as in ahead-of-time compilation."""
    gpus = jax.devices() if jax.default_backend() == "gpu" else []
    return all(getattr(device, "compute_capability", None) == HOPPER for device in gpus)
