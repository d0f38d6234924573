"""Kernels written by hand for accelerators; plain XLA stands in wherever they do not fit."""
