"""The one place that chooses kernels: by platform, shapes and dtype. Where none fits, XLA's own arrangement is used."""

import dataclasses
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jax import Array

# Whose kernels run on what JAX calls a platform. One that is not of its own kind interprets them, in tests.
KINDS = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}
# Mosaic's kernels for GPUs can be tested without one from here on.
LEAST_JAX_ON_GPU = (0, 11, 1)
HOPPER = "9.0"  # compute capability
# An environment variable: 0 turns all kernels off.
SWITCH = "DBRX_KERNELS"


def kind_of(platform: str) -> str | None:
    """Whose kernels run on a platform: "tpu", "gpu", or None where none do."""
    kind = KINDS.get(platform)
    if os.environ.get(SWITCH) == "0" or (kind == "gpu" and jax.__version_info__ < LEAST_JAX_ON_GPU):
        return None
    return None if kind == "gpu" and platform != "cpu" and not _all_hopper() else kind


@functools.cache
def _all_hopper() -> bool:
    """Whether the GPUs that are here are those that the kernels are made for; of those compiled for, all are."""
    here = jax.devices() if jax.default_backend() == "gpu" else []
    return all(getattr(device, "compute_capability", None) == HOPPER for device in here)


@dataclasses.dataclass(frozen=True)
class ExpertKernels:
    """The experts' kernels of one kind of device.

    Args:
      few: module with decode_experts, for few tokens.
      many: module with grouped_matmul.
      gradient: of grouped_matmul for its weight: (left (P, M), right (P, C), sizes (E,)) to (E, M, C).
      takes_gradient: whether it takes these two.
      interpret: what makes Pallas interpret them, on a CPU.
    """

    few: ModuleType
    many: ModuleType
    gradient: Callable[..., Array]
    takes_gradient: Callable[..., bool]
    interpret: Any

    def take_few(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """Whether the kernel for few tokens takes rows x (N, D) and these weights (E, F, D)."""
        return self.few.supports(x, w1, v1, w2, interpret=bool(self.interpret))

    def take_many(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """The same of the grouped products, for all that a forward pass takes."""
        inner = jax.ShapeDtypeStruct((x.shape[0], w1.shape[1]), x.dtype)
        products = ((x, w1, 1), (x, v1, 1), (inner, w2, 0))
        return all(self.many.supports(*product, interpret=bool(self.interpret)) for product in products)

    def take_gradients(self, x: Array, w1: Any, v1: Any, w2: Any) -> bool:
        """The same for all that a backward pass takes; of plain weights alone."""
        if not all(isinstance(w, Array) for w in (w1, v1, w2)):
            return False
        inner = jax.ShapeDtypeStruct((x.shape[0], w1.shape[1]), x.dtype)
        products = ((x, w2, 1), (inner, w1, 0), (inner, v1, 0))
        fit = all(self.many.supports(*product, interpret=bool(self.interpret)) for product in products)
        return fit and self.takes_gradient(inner, x, interpret=bool(self.interpret))


def expert_kernels(platform: str) -> ExpertKernels | None:
    """Those for the platform, imported now, as Pallas takes seconds; None where there are none."""
    kind = kind_of(platform)
    return None if kind is None else _of_kind(kind, platform == "cpu")


@functools.cache
def _of_kind(kind: str, interpret: bool) -> ExpertKernels:
    if kind == "tpu":
        from dbrx_jax.kernels import experts_tpu, grouped_tpu

        return ExpertKernels(
            experts_tpu, grouped_tpu, grouped_tpu.grouped_gradient, grouped_tpu.gradient_supports, interpret
        )
    from jax.experimental.pallas import mosaic_gpu

    from dbrx_jax.kernels import experts_gpu, grouped_gpu
    from dbrx_jax.kernels.grouped_gradient_gpu import gradient_supports, grouped_gradient

    mosaic: Any = mosaic_gpu  # of which versions before LEAST_JAX_ON_GPU have no interpreter
    how = mosaic.InterpretGPUParams() if interpret else None
    return ExpertKernels(experts_gpu, grouped_gpu, grouped_gradient, gradient_supports, how)
