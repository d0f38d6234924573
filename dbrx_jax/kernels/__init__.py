"""Experts and attention by Pallas kernels for TPUs and Hopper GPUs, and by plain XLA everywhere else."""
