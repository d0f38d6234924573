"""Expert and attention kernels: Pallas on TPUs and Hopper GPUs, plain XLA elsewhere."""
