"""Loads the native kernels and registers them with JAX, if they were built when the package was installed."""

import functools
import importlib
from typing import Any

import jax


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Returns the processor's instruction sets that have kernels, best first; empty if no kernels can be used."""
    try:
        _native: Any = importlib.import_module("dbrx_jax.kernels.cpu._native")
    except ImportError:
        return ()
    jax.local_devices(backend="cpu")  # before, JAX would register them later, and fail to start if it refuses them
    try:
        for name, target in _native.targets().items():
            jax.ffi.register_ffi_target(name, target, platform="cpu")
    except RuntimeError:  # this jaxlib has another interface than the one that they were built for
        return ()
    return tuple(_native.instruction_sets())
