"""Fixtures of the Hopper GPU kernel tests: Pallas' interpreter and the bytes that it copies."""

from collections import Counter

import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.weights import to_float32

INTERPRET = plgpu.InterpretGPUParams()


def max_error(y, reference):
    return np.abs(to_float32(y) - reference).max() / max(np.abs(reference).max(), 1e-30)


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """Resets the interpreter, whose state after a failure would fail the next test."""
    callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def copied_bytes(monkeypatch):
    """Counts the bytes that kernels copy: "in" (also by element type) and "out"."""
    count = Counter()
    original = callbacks.AsyncCopyTask.__call__

    def copy(task, thread):
        dtype = np.dtype(callbacks._get_shared_memory().buffer_shape_and_dtype(task.src_allocation_key).dtype)
        size = int(np.prod(task.src_access.shape)) * dtype.itemsize
        if isinstance(task, callbacks.AsyncCopyGmemToSmemTask):
            count["in"] += size
            count["in", dtype.name] += size
        else:
            count["out"] += size
        return original(task, thread)

    monkeypatch.setattr(callbacks.AsyncCopyTask, "__call__", copy)
    return count
