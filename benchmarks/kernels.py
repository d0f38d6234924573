"""Compiles each kernel at 132B's shapes: registers, spills, instructions, temporaries and compile time.

    python -m benchmarks.kernels [h200|v5e|v6e ...]

Needs the extra [compile] and no accelerator. Updates these devices in results/kernels.json, and prints a Markdown
table. Registers are reported for Hopper only, and there the instructions of a lane for each weight in the main loops of
integer decode kernels. A TPU kernel that needs too much VMEM does not compile.
"""

import argparse
import json
import re
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
from benchmarks.sass import dumped_kernels, find_nvdisasm
from dbrx_jax.kernels.tile_table import table
from dbrx_jax.model.cache import CACHE_BLOCK, LayerCache, swap_layout
from dbrx_jax.planning import targets
from dbrx_jax.quantization import Format
from dbrx_jax.quantization.array import abstract

KINDS = {"h200": "gpu", "v5e": "tpu", "v6e": "tpu"}
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
POSITIONS = 8192
LANES = 128  # of a thread block


class Case(NamedTuple):
    """A call of a kernel."""

    name: str
    call: Callable[..., Any]
    arguments: Any  # shapes
    weights: dict[str, float] = {}  # of a lane in a step of a kernel's main loop, by kernel  # noqa: RUF012


def cases(kind: str) -> Iterator[Case]:
    """Yields calls of a backend's kernels at 132B's sizes, without JAX's own (splash attention, cuDNN)."""
    yield from experts(kind, tiles.WEIGHTS)
    yield from attention(kind)
    yield from gradients(kind)
    if kind == "gpu":
        yield from token_steps()
    else:
        yield from experts(kind, ("fp8",))
        yield from cache_writes()


def experts(kind: str, weights: tuple[str, ...]) -> Iterator[Case]:
    """Yields calls of the experts' kernels, with the tile sizes that they would use."""
    named: dict[str, Case] = {}  # calls that differ in few rows share a kernel
    for case in tiles.cases(kind, weights=weights):
        chosen = {s.name: type(s.rule)(*table()[s.name]) if s.name in table() else s.rule for s in case.slots}
        name = "; ".join(chosen)
        call = lambda *a, case=case, chosen=chosen: case.call(chosen, *a)  # noqa: E731
        named[name] = Case(name, call, case.arguments, weights_a_step(chosen) if kind == "gpu" else {})
    yield from named.values()


def weights_a_step(tiles_by_name: dict[str, Any]) -> dict[str, float]:
    """Returns the weights of a lane in a step of the integer decode kernels' main loops, by kernel."""
    from dbrx_jax.kernels.gpu.integer_products import IntegerTiles
    from dbrx_jax.kernels.gpu.integer_weights import CHANNELS

    if not all(isinstance(t, IntegerTiles) for t in tiles_by_name.values()):
        return {}
    per_byte = 2 if any("int4" in name for name in tiles_by_name) else 1
    gate_up, down = (CHANNELS * t.depth * per_byte / LANES for t in tiles_by_name.values())
    return {"experts_gate_and_up": gate_up, "experts_inner": 2 * gate_up, "experts_down": 2 * down}


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


def token_steps() -> Iterator[Case]:
    """Yields calls of a Hopper GPU's kernels that do several steps of decoding one token."""
    from dbrx_jax.kernels.gpu.cache_attention import write_and_attend
    from dbrx_jax.kernels.gpu.integer_weights import pack
    from dbrx_jax.kernels.gpu.norm_route import norm_route

    c = tiles.CONFIG
    blocks = POSITIONS // CACHE_BLOCK
    new = [jax.ShapeDtypeStruct((1, 1, heads, c.head_dim), jnp.bfloat16) for heads in (c.n_heads, *[c.kv_n_heads] * 2)]
    pools = [jax.ShapeDtypeStruct((blocks + 1, c.kv_n_heads, CACHE_BLOCK, c.head_dim), jnp.bfloat16)] * 2
    indices = [jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), bool)]
    table = jax.ShapeDtypeStruct((1, blocks), jnp.int32)
    yield Case("attention that writes its token, bfloat16 cache", write_and_attend, (*new, *pools, *indices, table))
    (D, E), x = (c.d_model, c.moe_num_experts), jax.ShapeDtypeStruct((4, c.d_model), jnp.bfloat16)
    scale, router = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((D,), (E, D)))
    w1 = abstract((E, c.ffn_hidden_size, D), Format.parse("int4-128"), (-1,), jnp.bfloat16)

    def route(x, y, norm_scale, router, valid, w1):
        options = 0, E, c.moe_top_k, c.moe_normalize_expert_weights, pack(w1, 1)
        return norm_route(x, y, norm_scale, router, valid, *options)

    yield Case("norm and routing of a token", route, (x, x, scale, router, jax.ShapeDtypeStruct((), bool), w1))


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
    with dumped_kernels() as dumped, jax.set_mesh(mesh):
        program = jax.jit(case.call).lower(*arguments).compile()
    seconds, text = time.perf_counter() - begin, "\n".join(dumped.resources)
    loops = {name: (dumped.loops[name], n) for name, n in case.weights.items() if name in dumped.loops}
    return {
        "kernel": case.name,
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", text)],
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
        "instructions_a_weight": {name: round(count / n, 2) for name, (count, n) in loops.items()},
    }


def line(device: str, found: dict[str, Any]) -> str:
    registers = ", ".join(map(str, found["registers"]))
    spilled = str(found["spilled_bytes"]) if registers else ""
    size = f"{found['temporaries'] / 1e6:.1f} MB"
    instructions = ", ".join(map(str, found["instructions_a_weight"].values()))
    columns = found["kernel"], size, registers, spilled, instructions, f"{found['compile_seconds']} s"
    return f"| {device} | {' | '.join(columns)} |"


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # else plugins warn of missing devices
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=str(__doc__).splitlines()[0])
    parser.add_argument("device", nargs="*", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json", help="JSON to update")
    options = parser.parse_args()
    if unknown := set(options.device) - set(KINDS):
        parser.error(f"{', '.join(sorted(unknown))}: no such device; choose of {', '.join(KINDS)}")
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    print("| device | kernel | temporaries | registers | bytes spilled | instructions a weight | compiled in |")
    print("|---|---|---|---|---|---|---|")
    if "gpu" in map(KINDS.get, options.device or KINDS) and not find_nvdisasm():
        parser.error("nvdisasm is missing; install the extra [compile]")
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
