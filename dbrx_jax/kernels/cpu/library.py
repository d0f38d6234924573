"""Loads the native kernels and registers them with JAX, if they were built when the package was installed."""

import functools

import jax


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Returns the processor's instruction sets that have kernels, best first; empty if no kernels can be used."""
    try:
        from dbrx_jax.kernels.cpu import _native
    except ImportError:
        return ()
    try:
        for name, target in _native.targets().items():
            jax.ffi.register_ffi_target(name, target, platform="cpu")
    except jax.errors.JaxRuntimeError:  # this JAX has another interface than the one that they were built for
        return ()
    return tuple(_native.instruction_sets())
