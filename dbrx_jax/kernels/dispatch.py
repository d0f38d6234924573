"""Kernel dispatch: the Pallas kernels of each backend, imported when they are first used.

Importing Pallas takes seconds, and a CPU needs none of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax import Array

from dbrx_jax.backend import kernel_backend


@dataclasses.dataclass(frozen=True)
class ExpertKernels:
    """The experts' kernels of one kind of device.

    Args:
      decode: module with decode_experts, for small batches.
      grouped: module with grouped_matmul.
      gradient: gradient of grouped_matmul for its weight: (left (P, M), right (P, C), sizes (E,)) to (E, M, C).
      gradient_supported: whether `gradient` supports its first two arguments.
      interpret: the argument that makes Pallas interpret the kernels on a CPU.
    """

    decode: ModuleType
    grouped: ModuleType
    gradient: Callable[..., Array]
    gradient_supported: Callable[..., bool]
    interpret: Any

    def supports_decode(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """Returns whether the decode kernel supports rows x (N, D) with weights (E, F, D)."""
        return self.decode.supports(x, w1, v1, w2, interpret=bool(self.interpret))

    def supports_grouped(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """Returns whether the grouped matmul supports every product of a forward pass."""
        inner = jax.ShapeDtypeStruct((x.shape[0], w1.shape[1]), x.dtype)
        products = ((x, w1, 1), (x, v1, 1), (inner, w2, 0))
        return all(self.grouped.supports(*product, interpret=bool(self.interpret)) for product in products)

    def supports_gradients(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """Returns whether the kernels support every product of a backward pass, for plain weights only."""
        if not all(isinstance(w, Array) for w in (w1, v1, w2)):
            return False
        inner = jax.ShapeDtypeStruct((x.shape[0], w1.shape[1]), x.dtype)
        products = ((x, w2, 1), (inner, w1, 0), (inner, v1, 0))
        fit = all(self.grouped.supports(*product, interpret=bool(self.interpret)) for product in products)
        return fit and self.gradient_supported(inner, x, interpret=bool(self.interpret))


def expert_kernels(platform: str) -> ExpertKernels | None:
    """The experts' kernels of a platform, or None; imports Pallas, which takes seconds."""
    kind = kernel_backend(platform)
    return None if kind is None else _of_kind(kind, platform == "cpu")


@functools.cache
def _of_kind(kind: str, interpret: bool) -> ExpertKernels:
    if kind == "tpu":
        from dbrx_jax.kernels.tpu import decode_experts, grouped_matmul

        return ExpertKernels(
            decode_experts, grouped_matmul, grouped_matmul.grouped_gradient, grouped_matmul.gradient_supports, interpret
        )
    from jax.experimental.pallas import mosaic_gpu

    from dbrx_jax.kernels.gpu import decode_experts as gpu_decode
    from dbrx_jax.kernels.gpu import grouped_matmul as gpu_grouped
    from dbrx_jax.kernels.gpu.grouped_gradient import gradient_supports, grouped_gradient

    mosaic: Any = mosaic_gpu  # older versions of JAX have no interpreter for it
    interpreter = mosaic.InterpretGPUParams() if interpret else None
    return ExpertKernels(gpu_decode, gpu_grouped, grouped_gradient, gradient_supports, interpreter)


class AttentionKernels(NamedTuple):
    """The modules of one backend's attention kernels."""

    cache: ModuleType  # has cache_attention and supports
    sequence: ModuleType  # has sequence_attention and supports


def attention_kernels(platform: str) -> AttentionKernels | None:
    """The attention kernels of a platform, or None."""
    kind = kernel_backend(platform)
    if kind == "tpu":
        from dbrx_jax.kernels.tpu import cache_attention, sequence_attention

        return AttentionKernels(cache_attention, sequence_attention)
    if kind == "gpu":
        from dbrx_jax.kernels.gpu import cache_attention as gpu_cache
        from dbrx_jax.kernels.gpu import sequence_attention as gpu_sequence

        return AttentionKernels(gpu_cache, gpu_sequence)
    return None
