"""Times small-batch matmuls on a CPU: the library's, with and without native kernels, against plain JAX.

    python -m benchmarks.products

Multiplies 1 to 64 rows with 24 weights of (1792, 1024), more than the caches hold; weights of floats also by a
dot_general with float32 sums. GB/s are of the weights' bytes. Writes results/products-JAX_VERSION.json; docs/cpu.md
discusses it.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.record import RESULTS, stamp, write
from dbrx_jax.kernels.cpu.library import instruction_sets
from dbrx_jax.kernels.linear import linear
from dbrx_jax.ops import linear as without_kernels
from dbrx_jax.ops.small_batch_matmul import CPU_OPTIONS
from dbrx_jax.quantization import Format, QuantizedArray, quantize

WEIGHTS, SHAPE = 24, (1792, 1024)
ROWS = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("float32", "bfloat16", "int8", "int4-128", "fp8")
REPEATS = 7


def weights(kind: str, contracted: int) -> list[Any]:
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(WEIGHTS)]
    if kind in ("float32", "bfloat16"):
        return [jnp.asarray(w, kind) for w in drawn]
    format = Format.parse(kind)
    return [jax.tree.map(jnp.asarray, quantize(w, format, (contracted - 2,), "bfloat16")) for w in drawn]


def plain(x: Array, weight: Any, contracted: int) -> Array:
    """Multiplies with the @ operator; dequantises first."""
    w = weight.dequantize(x.dtype) if isinstance(weight, QuantizedArray) else weight
    return x @ w.T if contracted == 1 else x @ w


def right(x: Array, weight: Array, contracted: int) -> Array:
    """Multiplies by a dot_general with float32 sums; one row is doubled, or XLA would cast the whole weight."""
    dimensions = (((1,), (contracted,)), ((), ()))
    rows = jnp.concatenate([x] * 2) if x.shape[0] == 1 else x
    return lax.dot_general(rows, weight, dimensions, preferred_element_type=jnp.float32)


def ours(x: Array, weight: Any, contracted: int) -> Array:
    return linear(x, weight, contracted, "cpu")


def xla(x: Array, weight: Any, contracted: int) -> Array:
    """Multiplies as where no native kernels were built."""
    return without_kernels.linear(x, weight, contracted, "cpu")


def seconds(product: Callable, x: Array, all_weights: list[Any], contracted: int) -> float:
    """Returns the least seconds of multiplying x with all weights."""
    options = None if product is plain else CPU_OPTIONS  # those of the decode program
    run = jax.jit(lambda x, ws: [product(x, w, contracted) for w in ws], compiler_options=options)
    jax.block_until_ready(run(x, all_weights))
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(run(x, all_weights))
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    description = str(__doc__).splitlines()[0]
    argparse.ArgumentParser(prog="python -m benchmarks.products", description=description).parse_args()
    table = []
    for kind in KINDS:
        for contracted in (1, 0):
            all_weights = weights(kind, contracted)
            size = sum(w.nbytes for w in all_weights)
            for rows in ROWS:
                dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
                x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, SHAPE[contracted])), dtype)
                products = (ours, xla, right, plain) if isinstance(all_weights[0], Array) else (ours, xla, plain)
                times = {f.__name__: seconds(f, x, all_weights, contracted) for f in products}
                entry = {"weights": kind, "summed_over": "columns" if contracted else "rows", "rows": rows}
                entry |= {f"{name}_gb_per_second": round(size / s / 1e9, 2) for name, s in times.items()}
                table.append(entry | {f"{name}_ms": round(s * 1e3, 2) for name, s in times.items()})
                print(json.dumps(table[-1]), flush=True)
    shapes = {"weight_shape": SHAPE, "weights": WEIGHTS, "native_kernels": next(iter(instruction_sets()), None)}
    result = stamp("dbrx-jax", "jax") | shapes | {"products": table}
    write(result, RESULTS / f"products-{jax.__version__}.json")


if __name__ == "__main__":
    main()
