"""Sizes of the GPU benchmark, figures of this GPU, and models with random weights."""

import dataclasses
import math
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.record import BenchmarkError
from dbrx_jax.api import DbrxForCausalLM
from dbrx_jax.checkpoint.parameters import array_layouts, model_from_arrays
from dbrx_jax.config import DbrxConfig
from dbrx_jax.planning.plan import Setting, fits
from dbrx_jax.planning.targets import TARGETS, Target
from dbrx_jax.quantization import Quantization, QuantizedArray


@dataclasses.dataclass(frozen=True)
class Size:
    """The lengths and batches of one run.

    Args:
      config: the model; has fewer layers where it does not fit the GPU's memory.
      decode: (batch, positions) of the timed decode steps, by precision.
      steps: decode steps per timing.
      prompt: tokens of the timed prefill.
      tokens: numbers of tokens at which the experts are checked.
      lengths: of the prompts on which whole models are compared.
      users, together: number of users, and the most that are served at once in batches.
      served, rows: likewise in the engine.
    """

    config: DbrxConfig
    decode: dict[str, tuple[tuple[int, int], ...]]
    steps: int
    prompt: int
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    users: int
    together: int
    served: int
    rows: int


FULL = Size(
    DbrxConfig.from_name("132b-instruct"),
    {
        "int4": ((1, 1024), (16, 1024), (64, 1024), (1, 8192), (1, 32768)),
        "int8": ((1, 1024), (8, 1024), (64, 1024), (1, 32768)),
        "bfloat16": ((1, 1024), (8, 1024)),
    },
    steps=64,
    prompt=2048,
    tokens=(1, 7, 64, 600),
    lengths=(300, 77, 41),
    users=8,
    together=2,
    served=96,
    rows=64,
)
_TOY_CONFIG = dataclasses.replace(
    DbrxConfig.from_name("demo"), d_model=64, n_heads=4, kv_n_heads=2, n_layers=1, ffn_hidden_size=96
)
TOY = Size(
    _TOY_CONFIG,
    {"int4": ((1, 128),), "int8": ((1, 128), (3, 128)), "bfloat16": ((2, 128),)},
    steps=4,
    prompt=64,
    tokens=(1, 90),
    lengths=(16, 8, 3),
    users=2,
    together=2,
    served=6,
    rows=2,
)
# Number of layers of a model that does not fit with all of them.
FEWER_LAYERS = {"bfloat16": 4, "int8": 8, "int4": 8}


def card() -> Target:
    """Returns the published figures of this GPU; on a CPU, in tests, those of an H200.

    Raises:
      BenchmarkError: the GPU is neither an H100 nor an H200.
    """
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        return TARGETS["h200"]
    for name in ("H100", "H200"):
        if name in kind:
            return TARGETS[name.lower()]
    raise BenchmarkError(f"this is a {kind}, and the kernels are made for an H100 or H200; --toy runs anywhere")


def config_that_fits(size: Size, precision: str) -> DbrxConfig:
    """Returns the model's configuration, with the layers of FEWER_LAYERS if all do not fit the GPU."""
    if fits(Setting(size.config, card(), {"expert": 1}, precision, batch=1, context=1024)):
        return size.config
    return dataclasses.replace(size.config, n_layers=min(FEWER_LAYERS[precision], size.config.n_layers))


def random_model(config: DbrxConfig, precision: str, dtype: Any = jnp.bfloat16) -> DbrxForCausalLM:
    """Returns a model whose random weights are drawn on the device, in their storage format.

    A parameter's values depend on its name alone, not on how parameters are stacked. Takes the memory of the model
    and one more parameter.
    """
    quantization = None if precision == "bfloat16" else Quantization.parse(precision)
    arrays: dict[str, Any] = {}
    for name, layout in array_layouts(config, None, quantization, dtype).items():
        seeds = np.array([zlib.crc32(parameter.encode()) for parameter in layout.parameters], np.uint32)
        if not isinstance(layout.value, QuantizedArray):
            is_norm = len(layout.shape) == 1
            weights = jnp.ones(layout.shape, jnp.bfloat16) if is_norm else normal(seeds, layout.shape)
            arrays[name] = weights.astype(dtype)
            continue
        values, scale = layout.value.values, layout.value.scale
        # Standard deviation of uniform integers from -128 to 127, or of two in a byte from -8 to 7.
        deviation = 73.9 if values.dtype == jnp.int8 else 4.6
        arrays[name] = dataclasses.replace(
            layout.value,
            values=_bytes(seeds, values.shape, values.dtype),
            scale=jnp.full(scale.shape, config.initializer_range / deviation, jnp.bfloat16).astype(dtype),
        )
    return model_from_arrays(DbrxForCausalLM, config, arrays, None, quantization=quantization)


@partial(jax.jit, static_argnums=1)
def normal(seeds: Array, shape: tuple[int, ...]) -> Array:
    """Draws bfloat16 weights of the published deviation; several seeds each draw one entry of the first dimension."""

    def draw(seed: Array, shape: tuple[int, ...]) -> Array:
        values = jax.random.normal(_key(seed), shape, jnp.float32)
        return (FULL.config.initializer_range * values).astype(jnp.bfloat16)

    return _map_seeds(draw, seeds, shape)


@partial(jax.jit, static_argnums=(1, 2))
def _bytes(seeds: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    def draw(seed: Array, shape: tuple[int, ...]) -> Array:
        count = math.prod(shape)
        bits = jax.random.bits(_key(seed), (-(-count // 4),), jnp.uint32)
        return lax.bitcast_convert_type(bits, jnp.uint8).reshape(-1)[:count].reshape(shape)

    return lax.bitcast_convert_type(_map_seeds(draw, seeds, shape), dtype)


def _map_seeds(draw: Any, seeds: Array, shape: tuple[int, ...]) -> Array:
    if seeds.shape[0] == 1:
        return draw(seeds[0], shape)
    return lax.map(lambda seed: draw(seed, shape[1:]), seeds)


def _key(seed: Array) -> Array:
    return jax.random.key(seed, impl="unsafe_rbg")  # many times faster than the default on a GPU
