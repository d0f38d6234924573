"""Skips the files of GPU kernel tests with versions of JAX that cannot interpret GPU kernels."""

import jax

from dbrx_jax.backend import MIN_JAX_FOR_GPU_KERNELS

_NEED_INTERPRETER = [
    "test_gpu_cache_attention.py",
    "test_gpu_decode_experts.py",
    "test_gpu_grouped_matmul.py",
    "test_gpu_integer_products.py",
    "test_gpu_norm_route.py",
]
collect_ignore = _NEED_INTERPRETER if jax.__version_info__ < MIN_JAX_FOR_GPU_KERNELS else []
