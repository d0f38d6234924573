"""The kernel backend of a platform: whether Pallas kernels run there, and whose."""

import functools
import os

import jax

GPU_PLATFORMS = ("gpu", "cuda")  # JAX's names of the platform
# Kernel backend by platform. Tests interpret the kernels of either backend on a CPU.
KERNEL_BACKENDS = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
# The first version of JAX with which the kernels for GPUs were tested.
MIN_JAX_FOR_GPU_KERNELS = (0, 11, 2)
HOPPER = "9.0"  # compute capability
# Environment variable that turns all kernels off when it is 0.
KERNELS_VARIABLE = "DBRX_KERNELS"


def kernel_backend(platform: str) -> str | None:
    """The backend whose kernels run on a platform: "tpu", "gpu", or None where XLA's own operations are used."""
    backend = KERNEL_BACKENDS.get(platform)
    if os.environ.get(KERNELS_VARIABLE) == "0":
        return None
    if backend == "gpu" and jax.__version_info__ < MIN_JAX_FOR_GPU_KERNELS:
        return None
    if backend == "gpu" and platform != "cpu" and not _only_hopper_gpus():
        return None
    return backend


@functools.cache
def _only_hopper_gpus() -> bool:
    """Returns whether every GPU here is a Hopper; true if there is none, as when compiling ahead of time."""
    gpus = jax.devices() if jax.default_backend() == "gpu" else []
    return all(getattr(device, "compute_capability", None) == HOPPER for device in gpus)
