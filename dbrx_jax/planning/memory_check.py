"""Compares the memory that a model and its cache take with what the devices, or a CPU's host, have free."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import MemoryLimitError
from dbrx_jax.generation.stream import TokenStream
from dbrx_jax.host_memory import available_memory, total_memory
from dbrx_jax.memory import report_memory_errors
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.planning.plan import Setting, larger_mesh, lower_precision, memory, smaller_cache
from dbrx_jax.planning.targets import Target
from dbrx_jax.quantization import Quantization

# Share of the planned memory that is left to a smaller setting where the plan was too low.
SMALLER = 0.9


@dataclasses.dataclass(frozen=True)
class Request:
    """A model, and the cache of a batch, that are to fit the memory.

    Args:
      mesh: the devices; None is JAX's default device.
      dtype: of the weights, or of a quantised model's activations and scales; None is the configuration's.
      quantization: as DbrxForCausalLM.from_pretrained takes it.
      rows, positions: of the batch, and the most tokens of a row, prompt and new; 0 rows is the weights alone.
      cache_dtype: "int8", or None for the model's.
    """

    config: DbrxConfig
    mesh: Mesh | None
    dtype: DTypeLike | None = None
    quantization: Quantization | str | None = None
    rows: int = 0
    positions: int = 0
    cache_dtype: str | None = None

    @property
    def local_devices(self) -> list[Any]:
        if self.mesh is not None:
            return list(self.mesh.local_devices)
        config: Any = jax.config
        default = config.jax_default_device  # a device, the name of a platform, or None
        if default is None or isinstance(default, str):
            return jax.local_devices(backend=default)[:1]
        return [default]

    def setting(self, platform: str, device_bytes: int) -> Setting:
        """Returns the plan's setting, for devices that have `device_bytes` each."""
        target = Target(platform, platform, device_bytes, None, None, None, None, devices_per_host=1 << 20)
        quantization = Quantization.parse(self.quantization)
        dtype = self.config.dtype if self.dtype is None else str(np.dtype(self.dtype))
        axes = {"expert": 1} if self.mesh is None else dict(self.mesh.shape)
        return Setting(
            config=self.config,
            target=target,
            axes=axes,
            precision=dtype if quantization is None else str(quantization),
            batch=max(self.rows, 1),
            context=max(self.positions, 1),
            cache_dtype=self.cache_dtype,
            activations=dtype,
        )


def generation_request(model: CausalLM, stream: TokenStream) -> Request:
    """Returns what is in memory while a stream is run."""
    mesh = model.partition.mesh if isinstance(model.partition.mesh, Mesh) else None
    cache_dtype = "int8" if stream.cache_dtype == np.int8 else None
    return Request(model.config, mesh, model.dtype, model.quantization, *stream.cache_size, cache_dtype)


def report_generation_memory(request: Request) -> AbstractContextManager[None]:
    """Reports memory that runs out while this is generated, in a `with` block, with what would fit.

    Raises:
      MemoryLimitError: the block ran out of memory.
    """
    what = f"generating {request.rows} rows of up to {request.positions} tokens"
    return report_memory_errors(what, lambda: fit_advice(request, weights_loaded=True))


def check_memory(request: Request, weights_loaded: bool = False) -> None:
    """Refuses what certainly does not fit: more bytes of weights and cache than a device has free.

    Activations and what the runtime needs for itself are not counted.
    Where a device or system does not report what it has free, everything is accepted.

    Args:
      weights_loaded: the weights are on the devices already, so that only the cache is to be made.

    Raises:
      MemoryLimitError: it does not fit; the message says what would.
    """
    devices = request.local_devices
    known = [(free, device) for device in devices if (free := _free_bytes(device, len(devices))) is not None]
    if not known:
        return
    free, device = min(known, key=lambda pair: pair[0])
    plan = memory(request.setting(device.platform, free))
    weights = sum(plan.parameters.values())
    new_weights = 0 if weights_loaded else weights
    cache = plan.cache if request.rows else 0
    if new_weights + cache <= free:
        return
    need = _need(request, device, new_weights, cache)
    advice = _advice(request, free + weights - new_weights, weights_loaded)
    raise MemoryLimitError(f"memory: {need}, {_has(device, len(devices), free)} free; {advice}")


def fit_advice(request: Request, weights_loaded: bool = False) -> str:
    """Returns words for the error of a device or host whose memory ran out in spite of the check.

    They name what is asked for, what there is and what would fit, such as "each device needs 76.2 GB (weights …), and
    NVIDIA H100 80GB HBM3 0 has 81.0 GB; it would fit with 4 rows". If the plan says that the request fits, what is
    suggested takes at most SMALLER of it, besides loaded weights.
    """
    devices = request.local_devices
    plan = memory(request.setting(devices[0].platform, 0))
    weights = sum(plan.parameters.values())
    fixed = weights if weights_loaded else 0
    smaller = fixed + round(SMALLER * (plan.total - fixed))
    limit = _limit_bytes(devices[0], len(devices))
    need = _need(request, devices[0], weights, plan.cache if request.rows else 0)
    if limit is None:
        return f"{need}; {_advice(request, smaller, weights_loaded)}"
    advice = _advice(request, min(limit, smaller), weights_loaded)
    return f"{need}, {_has(devices[0], len(devices), limit)}; {advice}"


def _free_bytes(device: Any, num_devices: int) -> int | None:
    """Returns what a device has free, on a CPU its share of the host's memory; None if it does not report it."""
    if device.platform == "cpu":
        available = available_memory()
        return None if available is None else available // num_devices
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= stats.keys() else None


def _limit_bytes(device: Any, num_devices: int) -> int | None:
    """Returns the memory that JAX may use of a device, with what is in use; None if it does not report it."""
    if device.platform == "cpu":
        return total_memory() // num_devices
    return (device.memory_stats() or {}).get("bytes_limit")


def _advice(request: Request, device_bytes: int, weights_loaded: bool) -> str:
    """Returns what would fit devices that have `device_bytes` each for the request's weights and cache."""
    platform = request.local_devices[0].platform
    setting = request.setting(platform, device_bytes)
    ways = smaller_cache(setting) if request.rows else []
    if not weights_loaded:
        sizes = [] if platform == "cpu" else [jax.device_count()]  # all devices of a CPU share its memory
        ways = [*lower_precision(setting), *ways, *larger_mesh(setting, sizes)]
    if ways:
        return f"it would fit with {', or '.join(ways)}"
    return "nothing smaller would fit; dbrx-jax plan says which devices would do"


def _need(request: Request, device: Any, weights: int, cache: int) -> str:
    """Returns what is asked for, such as "each device needs 72.1 GB (weights 70.4 GB, …)"."""
    scale, subject = 1, "each device needs"
    if device.platform == "cpu":
        scale, subject = len(request.local_devices), "this process needs"
    parts = [f"weights {_gigabytes(scale * weights)}"] if weights else []
    if cache:
        rows = f"{request.rows} {'row' if request.rows == 1 else 'rows'} of {request.positions} positions"
        parts.append(f"cache {_gigabytes(scale * cache)} for {rows}")
    return f"{subject} {_gigabytes(scale * (weights + cache))} ({', '.join(parts)})"


def _has(device: Any, num_devices: int, size: int) -> str:
    """Returns what there is, such as "and NVIDIA H100 80GB HBM3 0 has 81.0 GB"."""
    if device.platform == "cpu":
        return f"and this machine has {_gigabytes(num_devices * size)}"
    return f"and {device.device_kind} {device.id} has {_gigabytes(size)}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
