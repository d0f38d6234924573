"""Compiles the engine's decode program with the real compilers: memory, and HBM traffic of rows without options.

    python -m benchmarks.compiled_engine CASE

Needs the extra [compile] and no accelerator. A case is devices, weights, rows and positions, such as
h200-1,int4,64,8192. The model is 132B with LAYERS layers: those are alike, and what the engine adds comes after them.
Prints JSON; bytes are of one device.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dbrx_jax.config import DbrxConfig
from dbrx_jax.engine.engine import STEPS
from dbrx_jax.engine.slots import empty_slots
from dbrx_jax.generation.decode import decode_program
from dbrx_jax.generation.prefill import empty_cache
from dbrx_jax.generation.state import Options, state_specs
from dbrx_jax.model.cache import block_positions, cache_specs
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import split_model
from dbrx_jax.planning import hlo, targets
from dbrx_jax.planning.compile import CUDA_OPTIONS
from dbrx_jax.planning.plan import Setting, live_cache_bytes, memory, suggest_axes_on
from dbrx_jax.planning.sizes import parse_devices
from dbrx_jax.sharding.partition import make_mesh

LAYERS = 2
TOP_LOGPROBS = 20  # the engine's default


def lower(setting: Setting) -> Any:
    """Lowers the decode program of an engine with as many slots as rows, all of whose blocks are in the cache."""
    chips = setting.devices // setting.target.devices_per_chip
    mesh = make_mesh(setting.axes, targets.devices(setting.target.name, chips))
    model = CausalLM(setting.config, rngs=None, dtype=setting.dtype, mesh=mesh, quantization=setting.quantization)
    config, partition, rows, options = model.config, model.partition, setting.rows, Options(STEPS, False)
    options = options._replace(top_logprobs=TOP_LOGPROBS)
    width = setting.positions // block_positions(partition)
    dtype = jnp.dtype(setting.dtype)
    cache = jax.eval_shape(partial(empty_cache, config, partition, rows * width + 1, dtype))
    cache = partition.abstract(cache, cache_specs(config, partition))
    settings, state = jax.eval_shape(partial(empty_slots, config, partition, options, rows, setting.positions))
    specs = state_specs(settings, options, partition)
    settings, state = partition.abstract(settings, specs.settings), partition.abstract(state, specs.state)
    slots, table, steps = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows,), (rows, width), ()))
    model_state = split_model(model)
    model_state = partition.abstract(model_state, model_state.specs())
    arguments = model_state, options, settings, cache, state, slots, table, steps
    return decode_program(model_state, options).lower(*arguments)


def compiled(case: str) -> dict[str, Any]:
    """Compiles a case; returns what the compiler reports of it."""
    devices, precision, rows, positions = case.split(",")
    target, number = parse_devices(devices)
    config = dataclasses.replace(DbrxConfig.from_name("132b-instruct"), n_layers=LAYERS)
    axes = suggest_axes_on(config, target, number)
    setting = Setting(config, target, axes, precision, int(rows), int(positions))
    lowered, begin = lower(setting), time.perf_counter()
    program = lowered.compile(CUDA_OPTIONS if target.platform == "cuda" else None)
    seconds = time.perf_counter() - begin
    sizes, text, plan = program.memory_analysis(), program.as_text(), memory(setting)
    extra = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    without_options, with_all = (hlo.hbm_traffic(text, branch=branch) for branch in (min, max))
    return {
        "case": case,
        "compile_seconds": round(seconds, 1),
        "temporaries": sizes.temp_size_in_bytes,
        "total": sizes.argument_size_in_bytes + extra,
        "planned": plan.total,
        "pool": plan.cache // (2 * LAYERS),
        "traffic": without_options.read + without_options.written,
        "traffic_with_all_options": with_all.read + with_all.written,
        "least_traffic": sum(plan.parameters.values()) + live_cache_bytes(setting, setting.positions),
        "temporary_bytes": [t.bytes for t in hlo.largest_temporaries(text, 10)],
        "largest_temporaries": [f"{t.shape} {t.opcode} {t.op_name}" for t in hlo.largest_temporaries(text, 10)],
    }


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # else plugins warn of missing devices
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_engine")
    parser.add_argument("case", metavar="CASE", help="such as h200-1,int4,64,8192")
    print(json.dumps(compiled(parser.parse_args().case), indent=2))


if __name__ == "__main__":
    main()
