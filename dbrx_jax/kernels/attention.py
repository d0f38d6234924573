"""Which modules have the attention kernels of a platform."""

from types import ModuleType
from typing import NamedTuple

from dbrx_jax.kernels.choice import kind_of


class AttentionKernels(NamedTuple):
    """The modules with a platform's kernels, imported when they are asked for: Pallas takes seconds."""

    cache: ModuleType  # has cache_attention and supports
    sequence: ModuleType  # has sequence_attention and supports


def attention_kernels(platform: str) -> AttentionKernels | None:
    """Those for the platform; None where there are none."""
    kind = kind_of(platform)
    if kind == "tpu":
        from dbrx_jax.kernels import attention_splash, attention_tpu

        return AttentionKernels(attention_tpu, attention_splash)
    if kind == "gpu":
        from dbrx_jax.kernels import attention_cudnn, attention_gpu

        return AttentionKernels(attention_gpu, attention_cudnn)
    return None
