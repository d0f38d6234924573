"""Deviceless compilation: memory, HBM traffic and collectives of a model, from XLA. Needs the extra [compile]."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dbrx_jax.errors import MemoryLimitError
from dbrx_jax.generation.lowering import lower
from dbrx_jax.generation.settings import padded_ids
from dbrx_jax.generation.state import Options, Settings
from dbrx_jax.model.cache import CACHE_BLOCK
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import split_model
from dbrx_jax.planning import hlo, targets
from dbrx_jax.planning.plan import Setting, live_cache_bytes, memory, messages
from dbrx_jax.sharding.partition import CONTEXT_AXIS, make_mesh

# Without a GPU XLA cannot autotune split-K. It then splits small matmuls often, and their partial sums count as
# HBM traffic here although a GPU would keep them in its cache.
CUDA_OPTIONS = {"xla_gpu_experimental_force_split_k": "1"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Analysis of one compiled program's optimised HLO; bytes are of one device."""

    program: str  # "decode" or "prefill"
    compile_seconds: float
    arguments: int
    temporaries: int
    total: int  # arguments, temporaries, and outputs that do not alias arguments
    planned: int  # estimate of `total` by :func:`dbrx_jax.planning.plan.memory`
    traffic: int  # bytes read from and written to HBM, with every position of the cache live
    least_traffic: int  # lower bound: all weights and the live cache read once
    collectives: dict[str, int]  # number of each kind
    moved: int  # bytes that the device sends in them, in ring algorithms
    planned_moved: int
    weights_moved: list[str]  # parameters that are operands of collectives
    largest_temporary: str
    expert_copies: list[str]  # shapes of temporaries with a whole dequantised or copied expert weight


def compile_programs(setting: Setting) -> list[Compiled]:
    """Compiles a decode step of the whole batch, and one prefill chunk of one row in each data-parallel group.

    Raises:
      PlanError: the compiler is not installed.
      MemoryLimitError: a program does not fit.
    """
    lowered = dict(_lower(setting))
    prefill = next(program for name, program in lowered.items() if name.startswith("prefill"))
    return [_compile(setting, "decode", lowered["decode"]), _compile(setting, "prefill", prefill)]


def compile_decode(setting: Setting) -> Any:
    """Compiles a decode step of the whole batch; returns JAX's compiled program."""
    _, lowered = next(_lower(setting))
    return lowered.compile(_compiler_options(setting))


def _compiler_options(setting: Setting) -> dict[str, Any] | None:
    return CUDA_OPTIONS if setting.target.platform == "cuda" else None


def _lower(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Lowers the programs of a generation for the setting's devices: first "decode", then "prefill" and others."""
    chips = setting.devices // setting.target.devices_per_chip
    mesh = make_mesh(setting.axes, targets.devices(setting.target.name, chips))
    model_state = split_model(
        CausalLM(setting.config, rngs=None, dtype=setting.dtype, mesh=mesh, quantization=setting.quantization)
    )
    rows = setting.rows * setting.partition.size("data", "fsdp")
    cache_dtype = jnp.dtype(setting.cache_dtype or setting.dtype)
    return lower(model_state, Settings(padded_ids(())[None]), Options(), rows, setting.positions, cache_dtype)


def _compile(setting: Setting, name: str, lowered: Any) -> Compiled:
    begin = time.perf_counter()
    try:
        program = lowered.compile(_compiler_options(setting))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise MemoryLimitError(f"{name}: the compiler says that it does not fit: {reason}") from None
    seconds = time.perf_counter() - begin
    sizes, text = program.memory_analysis(), program.as_text()
    arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    total = arguments + temporaries + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    local_positions = setting.positions // setting.partition.size(CONTEXT_AXIS)
    trips = {"cache_blocks": math.ceil(local_positions / CACHE_BLOCK)}
    traffic = hlo.hbm_traffic(text, trips)
    collectives = hlo.collectives(text, trips)
    runs_by_kind: dict[str, int] = {}
    for collective in collectives:
        runs_by_kind[collective.kind] = runs_by_kind.get(collective.kind, 0) + collective.runs
    tokens, split_tokens = (setting.rows, False) if name == "decode" else (setting.chunk, True)
    buffers = hlo.largest_temporaries(text)
    return Compiled(
        program=name,
        compile_seconds=round(seconds, 1),
        arguments=arguments,
        temporaries=temporaries,
        total=total,
        planned=memory(setting).total,
        traffic=traffic.read + traffic.written,
        least_traffic=sum(memory(setting).parameters.values()) + live_cache_bytes(setting, setting.positions),
        collectives=runs_by_kind,
        moved=round(sum(hlo.bytes_moved(c) * c.runs for c in collectives)),
        planned_moved=round(sum(m.moved for m in messages(setting, tokens, split_tokens))),
        weights_moved=sorted({p for c in collectives for p in c.parameters if p.startswith("model_state")}),
        largest_temporary=f"{buffers[0].shape} ({buffers[0].bytes / 1e6:.1f} MB)" if buffers else "",
        expert_copies=sorted({t.shape for t in buffers if _holds_expert(t.shape, setting)}),
    )


def _holds_expert(shape: str, setting: Setting) -> bool:
    """Returns whether a shape such as bf16[2,10752,6144] has the sizes of a device's shard of an expert weight."""
    dtype, _, dims = shape.rstrip("]").partition("[")
    inner = setting.config.ffn_hidden_size // setting.partition.size("tensor")
    return dtype in ("bf16", "f32") and {str(inner), str(setting.config.d_model)} <= set(dims.split(","))
