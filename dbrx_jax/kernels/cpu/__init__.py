"""Native kernels for CPUs (native/, C++): matmuls and experts of small batches, called through jax.ffi."""
