"""Kernels for GPUs are interpreted by JAX 0.11.1 and newer: the tests of older ones do not collect them."""

import jax

from dbrx_jax.kernels.choice import LEAST_JAX_ON_GPU

collect_ignore_glob = ["test_*_gpu.py"] if jax.__version_info__ < LEAST_JAX_ON_GPU else []
