"""Measures the limits of the machine: memory bandwidth, and the rate of matrix products.

    python -m benchmarks.machine

Prints a line of JSON. The harness runs this in a process of its own before it loads models.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

import numpy as np

from benchmarks.record import ROOT, BenchmarkError, cpus

SIZE = 1 << 30  # bytes per read: many times the size of any cache
SIDE = 2048  # of the square matrices
# A GPU needs longer runs, or launches count: with the sizes above an H100 showed 2.0 TB/s and 149 TFLOP/s.
GPU_SIZE, GPU_SIDE = 4 << 30, 8192
REPEATS = 8


class Machine(TypedDict):
    """Rates of the device that JAX computes on."""

    device: str
    bandwidth: float  # bytes/s, reading
    float32: float  # FLOP/s of a product of float32 matrices
    bfloat16: float  # likewise, of bfloat16 matrices


def measure() -> Machine:
    """Measures the device that JAX uses: the best of several repetitions, as other load only slows it down."""
    import jax

    device = jax.devices()[0]
    bandwidth = _cpu_bandwidth() if device.platform == "cpu" else _device_bandwidth()
    return Machine(
        device=device.device_kind,
        bandwidth=bandwidth,
        float32=_matmul_rate("float32"),
        bfloat16=_matmul_rate("bfloat16"),
    )


def measure_apart() -> Machine:
    """Runs :func:`measure` in a process of its own, so that its memory and threads are freed.

    Raises:
      BenchmarkError: the process failed.
    """
    done = subprocess.run([sys.executable, "-m", "benchmarks.machine"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"the machine could not be measured: {(done.stderr.splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def best_seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Returns the least seconds of several runs after a warm-up."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def _cpu_bandwidth() -> float:
    """Returns bytes/s with every CPU reading its part of an array in a BLAS dot product, which memory limits."""
    data = np.ones(SIZE // 4, np.float32)
    parts = np.array_split(data, cpus())
    with ThreadPoolExecutor(len(parts)) as pool:
        return data.nbytes / best_seconds(lambda: list(pool.map(lambda part: part.dot(part), parts)))


def _device_bandwidth() -> float:
    import jax
    import jax.numpy as jnp

    data = jnp.ones((GPU_SIZE if _on_gpu() else SIZE) // 4, jnp.float32)
    largest = jax.jit(jnp.max)
    return data.nbytes / best_seconds(lambda: largest(data).block_until_ready())


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def _matmul_rate(dtype: str) -> float:
    import jax

    side = GPU_SIDE if _on_gpu() else SIDE
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * side**3 / best_seconds(lambda: product(x, x).block_until_ready())


if __name__ == "__main__":
    description = str(__doc__).splitlines()[0]
    argparse.ArgumentParser(prog="python -m benchmarks.machine", description=description).parse_args()
    print(json.dumps(measure()))
