"""Kernel dispatch: the one place that maps a platform to the kernels of its backend.

Callers (attention.py, experts.py and the model's cache) use plain XLA if a function here returns None, or if the
kernel's `supports` refuses the shapes and dtypes. A kernel is imported on first use, because Pallas takes seconds.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax import Array

from dbrx_jax.backend import kernel_backend, native_kernels_allowed


@dataclasses.dataclass(frozen=True)
class ExpertKernels:
    """The expert kernels of one backend.

    Args:
      decode: module with decode_experts, for small batches, and supports.
      grouped: module with grouped_matmul and supports.
      fused: module with grouped_experts, all three matmuls of sorted rows in one kernel, and supports; or None.
      gradient: gradient of grouped_matmul for its weight: (left (P, M), right (P, C), sizes (E,)) to (E, M, C).
      gradient_supported: returns whether `gradient` supports its first two arguments.
      norm_route: module with norm_route and supports, or None.
      interpret: argument of the kernels that makes Pallas interpret them on a CPU; false, or None for a GPU, elsewhere.
    """

    decode: ModuleType
    grouped: ModuleType
    fused: ModuleType | None
    gradient: Callable[..., Array]
    gradient_supported: Callable[..., bool]
    norm_route: ModuleType | None
    interpret: Any

    def supports_decode(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """Returns whether the decode kernel supports rows x (N, D) with weights (E, F, D)."""
        return self.decode.supports(x, w1, v1, w2, interpret=bool(self.interpret))

    def supports_grouped(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """Returns whether the grouped matmul supports the three matmuls of a forward pass."""
        inner = jax.ShapeDtypeStruct((x.shape[0], w1.shape[1]), x.dtype)
        products = ((x, w1, 1), (x, v1, 1), (inner, w2, 0))
        return all(self.grouped.supports(*product, interpret=bool(self.interpret)) for product in products)

    def supports_gradients(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """Returns whether the kernels support every matmul of a backward pass; only with plain weights."""
        if not all(isinstance(w, Array) for w in (w1, v1, w2)):
            return False
        inner = jax.ShapeDtypeStruct((x.shape[0], w1.shape[1]), x.dtype)
        products = ((x, w2, 1), (inner, w1, 0), (inner, v1, 0))
        grouped = all(self.grouped.supports(*product, interpret=bool(self.interpret)) for product in products)
        return grouped and self.gradient_supported(inner, x, interpret=bool(self.interpret))


def expert_kernels(platform: str) -> ExpertKernels | None:
    """Returns the expert kernels for a platform, or None for plain XLA."""
    backend = kernel_backend(platform)
    return None if backend is None else _import_expert_kernels(backend, platform == "cpu")


@functools.cache
def _import_expert_kernels(backend: str, interpret: bool) -> ExpertKernels:
    if backend == "tpu":
        from dbrx_jax.kernels.tpu import decode_experts, grouped_experts, grouped_matmul

        gradient = grouped_matmul.grouped_gradient, grouped_matmul.gradient_supports
        return ExpertKernels(decode_experts, grouped_matmul, grouped_experts, *gradient, None, interpret)
    from jax.experimental.pallas import mosaic_gpu

    from dbrx_jax.kernels.gpu import decode_experts as gpu_decode
    from dbrx_jax.kernels.gpu import grouped_matmul as gpu_grouped
    from dbrx_jax.kernels.gpu import norm_route
    from dbrx_jax.kernels.gpu.grouped_gradient import gradient_supports, grouped_gradient

    mosaic: Any = mosaic_gpu  # older versions of JAX have no InterpretGPUParams
    interpreter = mosaic.InterpretGPUParams() if interpret else None
    return ExpertKernels(gpu_decode, gpu_grouped, None, grouped_gradient, gradient_supports, norm_route, interpreter)


@dataclasses.dataclass(frozen=True)
class LinearKernels:
    """The kernel of one backend for matmuls of few rows.

    Args:
      supports: returns whether integer_linear supports its arguments.
      interpret: as in :class:`ExpertKernels`.
    """

    supports: Callable[..., bool]
    integer_linear: Callable[..., list[Array]]
    interpret: Any


def linear_kernels(platform: str) -> LinearKernels | None:
    """Returns the kernels for matmuls of few rows, or None for plain XLA."""
    if kernel_backend(platform) != "gpu":
        return None
    from dbrx_jax.kernels.gpu.integer_linear import integer_linear, supports

    kernels = expert_kernels(platform)
    assert kernels is not None
    return LinearKernels(supports, integer_linear, kernels.interpret)


class AttentionKernels(NamedTuple):
    """The modules of one backend's attention kernels."""

    cache: ModuleType  # with cache_attention and supports
    sequence: ModuleType  # with sequence_attention and supports


def attention_kernels(platform: str) -> AttentionKernels | None:
    """Returns the attention kernels for a platform, or None for plain XLA."""
    backend = kernel_backend(platform)
    if backend == "tpu":
        from dbrx_jax.kernels.tpu import cache_attention, sequence_attention

        return AttentionKernels(cache_attention, sequence_attention)
    if backend == "gpu":
        from dbrx_jax.kernels.gpu import cache_attention as gpu_cache
        from dbrx_jax.kernels.gpu import sequence_attention as gpu_sequence

        return AttentionKernels(gpu_cache, gpu_sequence)
    return None


def cache_write_kernels(platform: str) -> ModuleType | None:
    """Returns the module whose kernels write a decode step to the cache in place, or None for XLA's scatter."""
    if platform != "tpu" or kernel_backend(platform) is None:
        return None
    from dbrx_jax.kernels.tpu import cache_write

    return cache_write


class NativeKernels(NamedTuple):
    """The modules of the native kernels for CPUs."""

    matmul: ModuleType  # with matmul and supports
    experts: ModuleType  # with apply_experts and supports


def native_kernels(platform: str) -> NativeKernels | None:
    """Returns the native kernels if they were built and the platform is a CPU, or None for plain XLA."""
    if not native_kernels_allowed(platform):
        return None
    from dbrx_jax.kernels.cpu import experts, library, matmul

    return NativeKernels(matmul, experts) if library.instruction_sets() else None
