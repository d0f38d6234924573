"""The fastest tile sizes of the experts' kernels at 132B's shapes, timed on the accelerator that is here.

    python -m benchmarks.tiles [--rules]

Times every candidate of every kernel of this device's kind and writes the fastest into
dbrx_jax/kernels/tiles.json, with device, date and JAX's version; the kernels look there first. `--rules` needs no
accelerator: it notes what the kernels' own rules choose, where nothing has been timed.
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
    """A name in the table, its candidates, and what the rule takes."""

    name: str
    candidates: list[Tiles]
    rule: Tiles


class Case(NamedTuple):
    """A call of a kernel: what can be chosen, its arguments as shapes, and the call, of tiles by name and arguments."""

    slots: list[Slot]
    arguments: Any
    call: Callable[..., Any]


def cases(kind: str, config: DbrxConfig = CONFIG, weights: tuple[str, ...] = WEIGHTS) -> Iterator[Case]:
    """Kernel calls to time on a kind of device: experts on 16 or 8 TPUs; all on one GPU, or two of 8 GPUs."""
    F, D, K = config.ffn_hidden_size, config.d_model, config.moe_top_k
    for text, experts in itertools.product(weights, (1, 2) if kind == "tpu" else (2, config.moe_num_experts)):
        w1, w2 = (_weight(text, (experts, F, D), (c,)) for c in (-1, -2))
        for rows in DECODE_ROWS:
            yield (_tpu_decode_case if kind == "tpu" else _gpu_decode_case)(rows, min(experts, rows * K), w1, w2)
        for weight, contracted in ((w1, 1), (w2, 0)):
            yield _grouped_case(kind, _rows(PREFILL_ROWS, (F, D)[contracted]), weight, contracted)


def _tpu_decode_case(rows: int, places: int, w1: Any, w2: Any) -> Case:
    from dbrx_jax.kernels.tpu import decode_experts as module
    from dbrx_jax.kernels.tpu.packed_weights import tiles_name

    x = _rows(rows + -rows % module.ROWS, w1.shape[2])
    slot = Slot(tiles_name("experts_tpu", w1, x.shape[0]), module.tile_candidates(x, w1), module.rule_tiles(x, w1))

    def call(tiles: Mapping[str, Tiles], x, w1, v1, w2):
        return module.decode_experts(x, *_chosen(x, places), w1, v1, w2, "silu", tiles=tiles[slot.name])

    return Case([slot], (x, w1, w1, w2), call)


def _gpu_decode_case(rows: int, places: int, w1: Any, w2: Any) -> Case:
    from dbrx_jax.kernels.gpu import decode_experts as module
    from dbrx_jax.kernels.gpu.packed_weights import pack

    x, tokens = _rows(rows, w1.shape[2]), rows + -rows % module.MIN_TOKENS
    up, down = (jax.eval_shape(partial(pack, contracted=c), w) for w, c in ((w1, 1), (w2, 0)))
    slots = []
    for weights in ((up, up), (down,)):
        candidates = module.candidate_tiles(weights, tokens, places)
        slots.append(Slot(module.tiles_name(weights, tokens, places), candidates, candidates[0]))

    def call(tiles: Mapping[str, Tiles], x, w1, v1, w2):
        both = tuple(tiles[slot.name] for slot in slots)
        return module.decode_experts(x, *_chosen(x, places), w1, v1, w2, "silu", tiles=both)

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


def _chosen(x: Any, places: int) -> tuple[Any, Any, Any]:
    """The most active experts that the rows can have, each with all rows."""
    return jnp.arange(places, dtype=jnp.int32), jnp.int32(places), jnp.ones((places, x.shape[0]), jnp.float32)


def _drawn(shapes: Any) -> Any:
    """Random arrays of these shapes, of quantised ones in their own types."""

    def leaf(shape: Any) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return (0.02 * jax.random.normal(jax.random.key(0), shape.shape, jnp.bfloat16)).astype(shape.dtype)
        return jax.random.bits(jax.random.key(1), shape.shape, jnp.uint8).view(shape.dtype)

    return jax.tree.map(leaf, shapes)


def search(case: Case, seconds: Callable[[Mapping[str, Tiles]], float]) -> dict[str, Tiles]:
    """The fastest tiles of each of a call's slots, one slot after the other, the others as they are best so far."""
    best = {slot.name: slot.rule for slot in case.slots}
    for slot in case.slots:
        timed = [(seconds(best | {slot.name: tiles}), number) for number, tiles in enumerate(slot.candidates)]
        best[slot.name] = slot.candidates[min(timed)[1]]
    return best


def on_device(case: Case) -> Callable[[Mapping[str, Tiles]], float]:
    """Times a call on the accelerator, the best of several."""
    arguments = _drawn(case.arguments)

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
    parser.add_argument("--rules", action="store_true", help="note what the rules choose; needs no accelerator")
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
                found, by = {slot.name: slot.rule for slot in case.slots}, "rule, not timed"
            else:
                found, by = search(case, on_device(case)), device.device_kind
            for slot, tiles in found.items():
                if options.rules and "rule" not in entries.get(slot, {"by": "rule"})["by"]:
                    continue
                about = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
                entries[slot] = {"tiles": list(tiles), "by": by, **({} if options.rules else about)}
                print_status(f"{slot}: {list(tiles)}")
            lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
            TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    table.cache_clear()


if __name__ == "__main__":
    main()
