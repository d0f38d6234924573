"""Finds the fastest tile sizes of the experts' kernels at 132B's shapes on this machine's accelerator.

    python -m benchmarks.tiles [--rules]

Times every candidate of every kernel of this backend and writes the fastest to dbrx_jax/kernels/tiles.json, where the
kernels look first, with device, date and JAX's version. `--rules` needs no accelerator: it writes the choices of the
kernels' own rules where nothing has been timed.
"""

import argparse
import datetime
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.machine import best_seconds
from dbrx_jax.backend import kernel_backend
from dbrx_jax.config import DbrxConfig
from dbrx_jax.console import print_status
from dbrx_jax.kernels.tile_table import TABLE, table
from dbrx_jax.quantization import Format
from dbrx_jax.quantization.array import abstract

CONFIG = DbrxConfig.from_name("132b-instruct")
WEIGHTS = ("bfloat16", "int8", "int4-128")
DECODE_ROWS = (1, 8, 64)
PREFILL_ROWS = 4096
Tiles = Any  # one of the kernels' tuples


class Slot(NamedTuple):
    """An entry of the table: its name, candidate tiles, and the rule's choice."""

    name: str
    candidates: list[Tiles]
    rule: Tiles


class Case(NamedTuple):
    """A kernel call to time."""

    slots: list[Slot]
    arguments: Any  # shapes
    call: Callable[..., Any]  # takes tiles by name, and the arguments


def cases(kind: str, config: DbrxConfig = CONFIG, weights: tuple[str, ...] = WEIGHTS) -> Iterator[Case]:
    """Yields a backend's kernel calls: a device's experts of 16 or 8 TPUs; of one GPU, or of 8 GPUs."""
    F, D, K = config.ffn_hidden_size, config.d_model, config.moe_top_k
    for text, experts in itertools.product(weights, (1, 2) if kind == "tpu" else (2, config.moe_num_experts)):
        w1, w2 = (_weight(text, (experts, F, D), (c,)) for c in (-1, -2))
        for rows in DECODE_ROWS:
            yield (_tpu_decode_case if kind == "tpu" else _gpu_decode_case)(rows, min(experts, rows * K), w1, w2)
        for weight, contracted in ((w1, 1), (w2, 0)):
            yield _grouped_case(kind, _rows(PREFILL_ROWS, (F, D)[contracted]), weight, contracted)


def _tpu_decode_case(rows: int, num_active: int, w1: Any, w2: Any) -> Case:
    from dbrx_jax.kernels.tpu import decode_experts as module
    from dbrx_jax.kernels.tpu.packed_weights import tiles_name

    x = _rows(rows + -rows % module.ROWS, w1.shape[2])
    slot = Slot(tiles_name("experts_tpu", w1, x.shape[0]), module.tile_candidates(x, w1), module.rule_tiles(x, w1))

    def call(tiles: Mapping[str, Tiles], x, w1, v1, w2):
        return module.decode_experts(x, *_active_experts(x, num_active), w1, v1, w2, "silu", tiles=tiles[slot.name])

    return Case([slot], (x, w1, w1, w2), call)


def _gpu_decode_case(rows: int, num_active: int, w1: Any, w2: Any) -> Case:
    from dbrx_jax.kernels.gpu import decode_experts as module
    from dbrx_jax.kernels.gpu import integer_experts

    x = _rows(rows, w1.shape[2])
    products: Any = module
    size = rows + -rows % module.MIN_TOKENS
    if integer_experts.supports(w1, w1, w2):
        products, size = integer_experts, integer_experts.item_rows(rows)
    up, _, down = products.packed_shapes(w1, w1, w2)
    slots = []
    for weights in ((up, up), (down,)):
        candidates = products.candidate_tiles(weights, size, num_active)
        slots.append(Slot(products.tiles_name(weights, size, num_active), candidates, candidates[0]))

    def call(tiles: Mapping[str, Tiles], x, w1, v1, w2):
        gate_up_and_down = tuple(tiles[slot.name] for slot in slots)
        return module.decode_experts(x, *_active_experts(x, num_active), w1, v1, w2, "silu", tiles=gate_up_and_down)

    return Case(slots, (x, w1, w1, w2), call)


def _grouped_case(kind: str, rows: Any, weight: Any, contracted: int) -> Case:
    module: Any
    if kind == "tpu":
        from dbrx_jax.kernels.tpu import grouped_matmul as module
        from dbrx_jax.kernels.tpu.packed_weights import tiles_name

        share = math.ceil(rows.shape[0] / weight.shape[0])
        name = tiles_name(f"grouped_tpu {contracted}", weight, share)
        candidates, rule = module.tile_candidates(rows, weight, contracted), module.rule_tiles(rows, weight, contracted)
    else:
        from dbrx_jax.kernels.gpu import grouped_matmul as module

        name = module.tiles_name(rows, weight, contracted)
        candidates = module.candidate_tiles(weight, contracted)
        rule = candidates[0]
    slot = Slot(name, candidates, rule)

    def call(tiles: Mapping[str, Tiles], rows, weight):
        sizes = jnp.full(weight.shape[0], rows.shape[0] // weight.shape[0], jnp.int32)
        return module.grouped_matmul(rows, weight, contracted, sizes, tiles=tiles[slot.name])

    return Case([slot], (rows, weight), call)


def _weight(text: str, shape: tuple[int, ...], contracted: tuple[int, ...]) -> Any:
    if text == "bfloat16":
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return abstract(shape, Format.parse(text), contracted, jnp.bfloat16)


def _rows(rows: int, columns: int) -> Any:
    return jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)


def _active_experts(x: Any, num_active: int) -> tuple[Any, Any, Any]:
    """Returns the arguments for as many active experts as the rows can have, each with all rows."""
    weights = jnp.ones((num_active, x.shape[0]), jnp.float32)
    return jnp.arange(num_active, dtype=jnp.int32), jnp.int32(num_active), weights


def _random_arrays(shapes: Any) -> Any:
    """Returns random arrays of these shapes and dtypes."""

    def leaf(shape: Any) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return (0.02 * jax.random.normal(jax.random.key(0), shape.shape, jnp.bfloat16)).astype(shape.dtype)
        return jax.random.bits(jax.random.key(1), shape.shape, jnp.uint8).view(shape.dtype)

    return jax.tree.map(leaf, shapes)


def search(case: Case, seconds: Callable[[Mapping[str, Tiles]], float]) -> dict[str, Tiles]:
    """Returns the fastest tiles of each slot of a call, by coordinate descent: one slot after the other."""
    best = {slot.name: slot.rule for slot in case.slots}
    for slot in case.slots:
        timed = [(seconds(best | {slot.name: tiles}), number) for number, tiles in enumerate(slot.candidates)]
        best[slot.name] = slot.candidates[min(timed)[1]]
    return best


def on_device(case: Case) -> Callable[[Mapping[str, Tiles]], float]:
    """Returns a function that times a call with given tiles on the accelerator, the best of several runs."""
    arguments = _random_arrays(case.arguments)

    def seconds(tiles: Mapping[str, Tiles]) -> float:
        run = jax.jit(partial(case.call, dict(tiles)))
        try:
            return best_seconds(lambda: jax.block_until_ready(run(*arguments)))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:  # too large for the device
            print_status(f"{dict(tiles)}: {str(error).splitlines()[0]:.100}")
            return math.inf

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=str(__doc__).splitlines()[0])
    parser.add_argument("--rules", action="store_true", help="write the rules' choices; needs no accelerator")
    options = parser.parse_args()
    device = jax.devices()[0]
    kind = kernel_backend(device.platform)
    if not options.rules and kind is None:
        print_status(
            f"There is nothing to time on a {device.device_kind}: kernels are for TPUs and Hopper GPUs (or --rules)"
        )
        sys.exit(2)
    entries = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name in ("tpu", "gpu") if options.rules else (kind,):
        for case in cases(str(name)):
            if options.rules:
                chosen, by = {slot.name: slot.rule for slot in case.slots}, "rule, not timed"
            else:
                chosen, by = search(case, on_device(case)), device.device_kind
            for slot, tiles in chosen.items():
                is_timed = "rule" not in entries.get(slot, {"by": "rule"})["by"]
                if options.rules and is_timed:
                    continue
                circumstances = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
                entries[slot] = {"tiles": list(tiles), "by": by, **({} if options.rules else circumstances)}
                print_status(f"{slot}: {list(tiles)}")
            lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
            TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    table.cache_clear()


if __name__ == "__main__":
    main()
