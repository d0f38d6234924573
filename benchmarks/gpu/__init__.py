"""Checks 132B's kernels on one Hopper GPU (H100 or H200), then measures rates, within a budget of seconds."""
