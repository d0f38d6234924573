"""What the tests of kernels for Hopper GPUs share: Pallas' interpreter for them, and what it copies."""

from collections import Counter

import jax
import numpy as np
import pytest

from dbrx_jax.quantization import Format, quantize

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("needs a jax with an interpreter for Mosaic GPU kernels", allow_module_level=True)
callbacks = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")

INTERPRET = plgpu.InterpretGPUParams()


def weight(key, shape, form, contracted, dtype):
    """Stacked weights (E, ., .) in a format, None for plain, whose last dimension is contracted (1) or not (0)."""
    values = jax.random.normal(key, shape) * shape[1 + contracted] ** -0.5
    if form is None:
        return values.astype(dtype)
    return quantize(values, Format.parse(form), (-1,) if contracted == 1 else (-2,), dtype)


def floats(array):
    array = array.dequantize(np.float32) if hasattr(array, "dequantize") else array
    return np.asarray(array, np.float32)


def error(y, reference):
    return np.abs(floats(y) - reference).max() / max(np.abs(reference).max(), 1e-30)


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """A failure leaves the interpreter in a state that fails whatever runs next."""
    callbacks.reset_gpu_interpret_mode_state()


@pytest.fixture
def copied(monkeypatch):
    """Counts the bytes that kernels copy: "in", by element type too, and "out"."""
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
