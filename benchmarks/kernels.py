"""Compiles each kernel at 132B's shapes: registers, spills, temporaries and compile time.

    python -m benchmarks.kernels [h200|v5e|v6e ...]

Needs the extra [compile] and no accelerator. Updates these devices in results/kernels.json, and prints a Markdown
table. Registers are reported for Hopper only. A TPU kernel that needs too much VMEM does not compile.
"""

import argparse
import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import tiles
from benchmarks.record import RESULTS, stamp, write
from dbrx_jax.kernels.tile_table import table
from dbrx_jax.model.cache import CACHE_BLOCK, LayerCache, swap_layout
from dbrx_jax.planning import targets

KINDS = {"h200": "gpu", "v5e": "tpu", "v6e": "tpu"}
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
POSITIONS = 8192


class Case(NamedTuple):
    """A call of a kernel."""

    name: str
    call: Callable[..., Any]
    arguments: Any  # shapes


def cases(kind: str) -> Iterator[Case]:
    """Yields calls of a backend's kernels at 132B's sizes, without JAX's own (splash attention, cuDNN)."""
    yield from experts(kind, tiles.WEIGHTS)
    yield from attention(kind)
    yield from gradients(kind)
    if kind == "tpu":
        yield from experts(kind, ("fp8",))
        yield from cache_writes()


def experts(kind: str, weights: tuple[str, ...]) -> Iterator[Case]:
    """Yields calls of the experts' kernels, with the tile sizes that they would use."""
    named: dict[str, Case] = {}  # calls that differ in few rows share a kernel
    for case in tiles.cases(kind, weights=weights):
        chosen = {s.name: type(s.rule)(*table()[s.name]) if s.name in table() else s.rule for s in case.slots}
        name = "; ".join(chosen)
        named[name] = Case(name, lambda *a, case=case, chosen=chosen: case.call(chosen, *a), case.arguments)
    yield from named.values()


def attention(kind: str) -> Iterator[Case]:
    """Yields calls of attention over the cache, for decode steps and a prefill chunk."""
    from dbrx_jax.kernels.gpu import cache_attention as gpu_cache_attention
    from dbrx_jax.kernels.tpu import cache_attention as tpu_cache_attention

    attend: Any = (gpu_cache_attention if kind == "gpu" else tpu_cache_attention).cache_attention
    config = tiles.CONFIG
    heads, G, K = config.n_heads, config.kv_n_heads, config.head_dim
    block_shape = (G, CACHE_BLOCK) if kind == "gpu" else (CACHE_BLOCK, G)  # in the cache's stored layout
    for rows, tokens, dtype in ((8, 1, "bfloat16"), (8, 1, "int8"), (1, 2048, "bfloat16"), (1, 2048, "int8")):
        query = jax.ShapeDtypeStruct((rows, tokens, heads, K), jnp.bfloat16)
        blocks = rows * POSITIONS // CACHE_BLOCK + 1
        cache = [jax.ShapeDtypeStruct((blocks, *block_shape, K), dtype)] * 2
        scales = [jax.ShapeDtypeStruct((blocks, *block_shape), jnp.bfloat16)] * 2 if dtype == "int8" else []
        indices = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((rows,), (rows, POSITIONS // CACHE_BLOCK))]

        def call(query, starts, table, *cache):
            key, value, *scales = swap_layout(LayerCache(*cache), "cuda" if kind == "gpu" else kind)
            return attend(query, key, value, starts, table, scales=None if scales[0] is None else scales)

        yield Case(f"attention, {dtype} cache, {rows} x {tokens} queries", call, (query, *indices, *cache, *scales))


def gradients(kind: str) -> Iterator[Case]:
    """Yields calls of the weight gradient, for both shapes of an expert's weights."""
    from dbrx_jax.kernels.gpu import grouped_gradient as gpu_grouped_gradient
    from dbrx_jax.kernels.tpu import grouped_matmul as tpu_grouped_matmul

    gradient: Any = (gpu_grouped_gradient if kind == "gpu" else tpu_grouped_matmul).grouped_gradient
    F, D, P, E = tiles.CONFIG.ffn_hidden_size, tiles.CONFIG.d_model, tiles.PREFILL_ROWS, 2
    for M, C in ((F, D), (D, F)):
        rows = [jax.ShapeDtypeStruct((P, n), jnp.bfloat16) for n in (M, C)]
        yield Case(f"gradient, {M} x {C}, {P} rows", lambda a, b: gradient(a, b, jnp.full(E, P // E, jnp.int32)), rows)


def cache_writes() -> Iterator[Case]:
    """Yields calls that write a decode step's keys or values, and their scales, to a TPU's cache."""
    from dbrx_jax.kernels.tpu.cache_write import write_positions, write_scales

    G, K = tiles.CONFIG.kv_n_heads, tiles.CONFIG.head_dim
    indices = [jax.ShapeDtypeStruct((8,), jnp.int32)] * 2  # blocks, and positions in them
    blocks = 8 * POSITIONS // CACHE_BLOCK + 1
    for name, kernel, shapes in (
        ("8 positions", write_positions, ((blocks, CACHE_BLOCK, G, K), (8, G, K))),
        ("8 positions' scales", write_scales, ((blocks, G, CACHE_BLOCK), (8, G))),
    ):
        stored, new = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
        yield Case(f"writing {name}", kernel, (stored, new, *indices))


def compiled(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Compiles a call; returns what the compiler reports of it."""
    replicated = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated), case.arguments)
    begin = time.perf_counter()
    with captured_output() as outputs, jax.set_mesh(mesh):
        program = jax.jit(case.call).lower(*arguments).compile()
    seconds, text = time.perf_counter() - begin, outputs[0]
    return {
        "kernel": case.name,
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", text)],
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


@contextlib.contextmanager
def captured_output() -> Iterator[list[str]]:
    """Captures stdout and stderr of C++ code in the block; the list has the text when the block has ended."""
    outputs: list[str] = []
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        originals = [os.dup(n) for n in (1, 2)]
        for n in (1, 2):
            os.dup2(file.fileno(), n)
        try:
            yield outputs
        finally:
            for n, original in zip((1, 2), originals, strict=True):
                os.dup2(original, n)
                os.close(original)
            file.seek(0)
            outputs.append(file.read())


def line(device: str, found: dict[str, Any]) -> str:
    registers = ", ".join(map(str, found["registers"]))
    spilled = str(found["spilled_bytes"]) if registers else ""
    size = f"{found['temporaries'] / 1e6:.1f} MB"
    return f"| {device} | {found['kernel']} | {size} | {registers} | {spilled} | {found['compile_seconds']} s |"


def main() -> None:
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    jax.config.update("jax_platforms", "cpu")  # else plugins warn of missing devices
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=str(__doc__).splitlines()[0])
    parser.add_argument("device", nargs="*", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json", help="JSON to update")
    options = parser.parse_args()
    if unknown := set(options.device) - set(KINDS):
        parser.error(f"{', '.join(sorted(unknown))}: no such device; choose of {', '.join(KINDS)}")
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    print("| device | kernel | temporaries | registers | bytes spilled | compiled in |")
    print("|---|---|---|---|---|---|")
    for device in options.device or KINDS:
        mesh = Mesh(np.array(targets.devices(device, 1)), ("one",))
        kernels = []
        for case in cases(KINDS[device]):
            kernels.append(compiled(case, mesh))
            print(line(device, kernels[-1]), flush=True)
        result[device] = {**stamp(*PACKAGES), "kernels": kernels}
        write(result, options.output)


if __name__ == "__main__":
    main()
