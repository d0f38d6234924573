"""Estimates of per-device memory, HBM traffic and communication of a model on a mesh.

They follow from the parameters' shapes, :mod:`dbrx_jax.sharding.partition` and published figures of the devices.
``dbrx-jax plan --compile`` prints the compiler's figures beside these.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, PartitionSpec

from dbrx_jax.backend import kernel_backend
from dbrx_jax.checkpoint.parameters import ArrayLayout, array_layouts
from dbrx_jax.config import DTYPES, DbrxConfig
from dbrx_jax.errors import MeshError, PlanError, QuantizationError
from dbrx_jax.model.cache import CACHE_BLOCK, cache_capacity, prefill_chunk_lengths, round_up_size
from dbrx_jax.planning.targets import Target
from dbrx_jax.quantization import Quantization
from dbrx_jax.sharding.partition import AXES, BATCH_AXES, CONTEXT_AXIS, VOCAB_AXES, Partition, axis_names_of, check_mesh

PRECISIONS = ("float32", "bfloat16", "int8", "int4")  # to suggest, most bytes first
BATCHES = (1, 4, 16, 64)  # of the roofline's table
SCALE_BYTES = 2  # per position and head of an int8 cache
# Activations that are alive at once.
_LIVE_HIDDEN, _LIVE_INNER = 8, 3


@dataclasses.dataclass(frozen=True)
class _PlannedPartition(Partition):
    """Partition over devices of a platform that need not be there."""

    planned_platform: str = "cpu"

    @property
    def platform(self) -> str:
        return self.planned_platform


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, accelerator, mesh, precision, batch and context to plan for."""

    config: DbrxConfig
    target: Target
    axes: Mapping[str, int]
    precision: str  # of the weights, one of DTYPES or a text as Quantization.parse takes it
    batch: int  # rows
    context: int  # positions of a row: prompt and new tokens
    cache_dtype: str | None = None  # "int8", or the activations'
    activations: str | None = None  # dtype of activations and scales; of float weights always theirs

    @functools.cached_property
    def partition(self) -> Partition:
        """Partition on an abstract mesh.

        Raises:
          MeshError: the mesh does not divide the model, or has no axis that can go between GPU hosts.
        """
        mesh = AbstractMesh(tuple(self.axes.get(axis, 1) for axis in AXES), AXES)
        check_mesh(self.config, mesh)
        if self.hosts > 1 and self.target.network is not None and self.axis_between_hosts is None:
            raise MeshError(f"mesh: data or fsdp must be a multiple of the {self.hosts} hosts, to go between them")
        return _PlannedPartition(mesh, planned_platform=self.target.platform)

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    @property
    def hosts(self) -> int:
        return -(-self.devices // self.target.devices_per_host)

    @property
    def axis_between_hosts(self) -> str | None:
        """The axis that goes between hosts of GPUs: as in make_mesh the first that their number divides."""
        if self.hosts == 1 or self.target.network is None:
            return None
        return next((axis for axis in BATCH_AXES if self.axes.get(axis, 1) % self.hosts == 0), None)

    @functools.cached_property
    def quantization(self) -> Quantization | None:
        return None if self.precision in DTYPES else Quantization.parse(self.precision)

    @property
    def dtype(self) -> str:
        """Dtype of activations, cache and scales: of float weights theirs, by default bfloat16 with quantised ones."""
        return self.precision if self.precision in DTYPES else self.activations or "bfloat16"

    @property
    def uses_kernels(self) -> bool:
        """True if this package's kernels run; then experts are stored in one array."""
        return self.target.kernels and kernel_backend(self.target.platform) is not None

    @property
    def arrays(self) -> Mapping[str, ArrayLayout]:
        """Arrays of the model on the mesh."""
        return array_layouts(self.config, self.partition.mesh, self.quantization, self.dtype)

    @property
    def width(self) -> int:
        """Bytes of an activation and of an element of the cache."""
        return 4 if self.dtype == "float32" else 2

    @property
    def rows(self) -> int:
        """Rows of one data-parallel group, padding included."""
        return round_up_size(-(-self.batch // self.partition.size(*BATCH_AXES)))

    @property
    def positions(self) -> int:
        """Positions of the cache, rounded up as generation rounds them."""
        return cache_capacity(self.context, self.partition)

    @property
    def chunk(self) -> int:
        """Tokens of the largest prefill chunk."""
        return prefill_chunk_lengths(self.partition)[-1]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes."""

    parameters: Mapping[str, int]  # by group
    cache: int
    state: int  # logits and tokens of a generation
    working: int  # activations of a decode step or a prefill chunk, the larger

    @property
    def total(self) -> int:
        return sum(self.parameters.values()) + self.cache + self.state + self.working


def memory(setting: Setting) -> Memory:
    """Returns the memory of each device."""
    config, partition = setting.config, setting.partition
    groups: dict[str, int] = {}
    for name, array in setting.arrays.items():
        group = _group(name)
        shards = (shard_bytes(leaf, spec, partition) for _, leaf, spec in array.leaves())
        groups[group] = groups.get(group, 0) + sum(shards)
    vocabulary = partition.pad_vocabulary(config.vocab_size) // partition.size(*VOCAB_AXES)
    state = setting.rows * (vocabulary + setting.positions) * 4  # logits and tokens
    working = max(_working(setting, setting.rows, 1), _working(setting, 1, setting.chunk))
    return Memory(groups, cache_bytes(setting), state, working)


def cache_bytes(setting: Setting) -> int:
    """Returns the bytes of the key-value cache on one device, with its spare block."""
    return live_cache_bytes(setting, setting.positions) + CACHE_BLOCK * _position_bytes(setting)


def live_cache_bytes(setting: Setting, positions: int) -> int:
    """Returns the bytes of so many positions of every row on one device."""
    return setting.rows * positions * _position_bytes(setting) // setting.partition.size(CONTEXT_AXIS)


def _position_bytes(setting: Setting) -> int:
    config = setting.config
    heads = config.kv_n_heads // setting.partition.size("tensor")
    bytes_per_head = config.head_dim + SCALE_BYTES if setting.cache_dtype == "int8" else config.head_dim * setting.width
    return config.n_layers * 2 * heads * bytes_per_head


def _working(setting: Setting, rows: int, tokens: int) -> int:
    """Returns the bytes of the activations at a layer's peak: hidden states, inner expert rows, float32 logits."""
    config, partition = setting.config, setting.partition
    num_tokens = rows * tokens
    inner = config.ffn_hidden_size // partition.size("tensor")
    sorted_rows = min(config.moe_top_k, config.moe_num_experts // partition.size("expert")) if tokens > 1 else 1
    heads = (config.n_heads + 2 * config.kv_n_heads) // partition.size("tensor")
    hidden = num_tokens * config.d_model * setting.width * (_LIVE_HIDDEN if tokens > 1 else 2)
    attention = num_tokens * heads * config.head_dim * 4 * 2
    live_inner = _LIVE_INNER * min(inner, 512 * inner // max(num_tokens, 1) or inner)
    experts = num_tokens * (sorted_rows * config.d_model + live_inner)
    vocabulary = partition.pad_vocabulary(config.vocab_size) // partition.size(*VOCAB_AXES)
    gathered = 0
    if partition.size("fsdp") > 1:
        layer = [array for name, array in setting.arrays.items() if name.startswith("blocks.0.moe.experts.")]
        gathered = sum(_gathered(leaf, spec, partition) for array in layer for _, leaf, spec in array.leaves())
        if not setting.uses_kernels:  # one expert at a time
            gathered //= config.moe_num_experts // partition.size("expert")
    return hidden + max(attention, experts * setting.width) + rows * vocabulary * 8 + gathered


def shard_bytes(array: Any, spec: PartitionSpec, partition: Partition) -> int:
    """Returns the bytes of one device's shard of an array."""
    shard_shape = (n // partition.size(*axis_names_of(entry)) for n, entry in zip(array.shape, spec, strict=True))
    return math.prod(shard_shape) * array.dtype.itemsize


def _gathered(array: Any, spec: PartitionSpec, partition: Partition) -> int:
    """Returns the bytes of an array on one device after its all-gather over `fsdp`."""
    is_sharded = any("fsdp" in axis_names_of(entry) for entry in spec)
    return shard_bytes(array, spec, partition) * (partition.size("fsdp") if is_sharded else 1)


def _group(name: str) -> str:
    if ".experts." in name:
        return "experts"
    if ".attention." in name:
        return "attention"
    if name in ("embedding", "lm_head"):
        return name
    return "routers and norms"


@dataclasses.dataclass(frozen=True)
class Message:
    """One collective of a group of devices."""

    kind: str
    what: str
    group: int  # devices
    size: int  # bytes of the whole array; for all-reduce and all-to-all those on one device
    between_hosts: bool = False

    @property
    def moved(self) -> float:
        """Bytes that each device sends in a ring algorithm."""
        return (2 if self.kind == "all-reduce" else 1) * (self.group - 1) / self.group * self.size


def messages(setting: Setting, tokens: int, split: bool) -> list[Message]:
    """Returns the collectives of a prefill chunk (`split`) or decode step of `tokens` tokens in a group of devices."""
    config, partition, b = setting.config, setting.partition, setting.width
    experts, tensor, fsdp = (partition.size(a) for a in ("expert", "tensor", "fsdp"))
    D, heads = config.d_model, config.n_heads // tensor
    qkv_size = (config.n_heads + 2 * config.kv_n_heads) // tensor * config.head_dim
    split = split and experts > 1
    hidden = tokens * D * b
    result: list[Message] = []

    def add(kind: str, what: str, group: int, size: int, times: int = config.n_layers, axis: str | None = None) -> None:
        if group > 1:
            is_between_hosts = axis is not None and axis == setting.axis_between_hosts
            result.extend([Message(kind, what, group, size, is_between_hosts)] * times)

    def add_scatter(what: str, size: int, times: int) -> None:
        """Adds the reduce-scatter of all tokens' partial sums over the axis expert."""
        # Over a whole slice of 16 or more the TPU compiler turns it into an all-reduce and a slice.
        is_all_reduce = setting.target.platform == "tpu" and experts == setting.devices >= 16
        add("all-reduce" if is_all_reduce else "reduce-scatter", what, experts, size, times)

    def add_reduction(what: str, times: int) -> None:
        """Adds the reduction of all tokens' partial sums over the axes expert and tensor."""
        if split:
            add_scatter(what, hidden, times)
            add("all-reduce", what, tensor, hidden // experts, times)
        else:
            add("all-reduce", what, experts * tensor, hidden, times)

    add_reduction("embedding", 1)
    if split:
        add("all-gather", "tokens into attention and experts", experts, hidden, 2 * config.n_layers)
        add("all-gather", "tokens into the head", experts, hidden, 1)
    add("all-reduce", "queries, keys and values", experts, tokens * qkv_size * b)
    add("all-reduce", "largest scores", experts, tokens * heads * 4)
    attention_size = tokens * heads * (config.head_dim + 1) * 4
    if split:
        add_scatter("attention", attention_size, config.n_layers)
        add("all-gather", "attention", experts, tokens * heads * config.head_dim * b)
    else:
        add("all-reduce", "attention", experts, attention_size)
    add("all-reduce", "attention's output over heads", tensor, hidden // experts)
    add("all-to-all" if split else "all-gather", "attention's output", experts, hidden // (experts if split else 1))
    add_reduction("experts' output", config.n_layers)
    if not split:
        add("all-reduce", "the chosen token", experts * tensor, tokens * 4, 5)
        add("all-reduce", "whether a row is left", partition.size(*BATCH_AXES), 4, 1, setting.axis_between_hosts)
    for name, array in setting.arrays.items() if fsdp > 1 else ():
        for _, leaf, spec in array.leaves():
            if any("fsdp" in axis_names_of(entry) for entry in spec):
                add("all-gather", f"weights ({_group(name)})", fsdp, _gathered(leaf, spec, partition), 1, "fsdp")
    return result


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds of the time of one step; None where the device's figure is not known."""

    tokens_per_second: float | None  # of all rows together
    tokens_per_second_of_row: float | None
    read: int  # bytes of weights and cache per device
    seconds_reading: float | None
    seconds_computing: float | None
    seconds_sending: float | None  # if nothing overlaps
    distinct_experts: float  # expected per layer under uniform routing


def distinct_experts(config: DbrxConfig, tokens: int) -> float:
    """Returns the expected number of distinct experts that tokens use under uniform routing."""
    return config.moe_num_experts * (1 - (1 - config.moe_top_k / config.moe_num_experts) ** tokens)


def decode_roofline(setting: Setting) -> Roofline:
    """Returns the roofline of a decode step of a full batch whose rows have `context` positions each."""
    config = setting.config
    distinct = distinct_experts(config, setting.batch)
    parameters = dict(memory(setting).parameters)
    experts = parameters.pop("experts")
    parameters.pop("embedding")  # few of its rows are read
    live = live_cache_bytes(setting, setting.context)
    read = round(experts * distinct / config.moe_num_experts) + sum(parameters.values()) + live
    flops = 2 * setting.batch * config.active_parameters / setting.devices
    return _roofline(setting, setting.batch, 1, read, flops, messages(setting, setting.rows, False), distinct)


def prefill_roofline(setting: Setting, tokens: int | None = None) -> Roofline:
    """Returns the roofline of the first chunk of a prompt in each group of devices, by default the largest chunk."""
    config, partition = setting.config, setting.partition
    tokens = setting.chunk if tokens is None else tokens
    groups = partition.size(*BATCH_AXES)
    read = sum(memory(setting).parameters.values())
    attention = 2 * tokens * tokens * config.n_layers * config.n_heads * config.head_dim  # half of the square
    flops = groups * (2 * tokens * config.active_parameters + attention) / setting.devices
    distinct = distinct_experts(config, tokens)
    return _roofline(setting, groups, tokens, read, flops, messages(setting, tokens, True), distinct)


def _roofline(
    setting: Setting, rows: int, tokens: int, read: int, flops: float, collectives: list[Message], distinct: float
) -> Roofline:
    """Returns the roofline of a step of `tokens` tokens in each row."""
    target = setting.target
    peak = target.bf16_flops and target.bf16_flops / (2 if setting.dtype == "float32" else 1)
    reading = target.hbm_bandwidth and read / target.hbm_bandwidth
    computing = peak and flops / peak
    rate = None
    if reading is not None and (computing is not None or tokens == 1):  # a prompt is seldom bound by reading
        rate = tokens / max(reading, computing or 0, _sending(target, collectives) or 0)
    return Roofline(
        tokens_per_second=rate and rows * rate,
        tokens_per_second_of_row=rate,
        read=read,
        seconds_reading=reading,
        seconds_computing=computing,
        seconds_sending=_sending(target, collectives),
        distinct_experts=distinct,
    )


def _sending(target: Target, collectives: list[Message]) -> float | None:
    """Returns the seconds of all messages; None if the rate of the devices' links is not known."""
    if not collectives:
        return 0.0
    if target.interconnect is None:
        return None
    between_hosts = sum(m.moved for m in collectives if m.between_hosts)
    within_hosts = sum(m.moved for m in collectives if not m.between_hosts)
    return within_hosts / target.interconnect + (between_hosts / target.network if target.network else 0)


def fits(setting: Setting) -> bool:
    """Returns whether a setting's memory fits on each device."""
    return memory(setting).total <= setting.target.usable_bytes


def suggest_axes(config: DbrxConfig, devices: int, hosts: int = 1) -> dict[str, int]:
    """Returns axes for devices: as large an expert axis as possible, then tensor, then data.

    Args:
      hosts: number of hosts that only `data` may go between.

    Raises:
      PlanError: the devices do not divide the model's sizes.
    """
    experts = math.gcd(devices // hosts, config.moe_num_experts)
    tensor = math.gcd(devices // hosts // experts, math.gcd(config.kv_n_heads, config.ffn_hidden_size))
    data = devices // experts // tensor
    if config.d_model % experts:
        raise PlanError(f"devices: {devices} do not divide this model's sizes; choose --mesh yourself")
    axes = {"data": data, "expert": experts, "tensor": tensor}
    return {axis: size for axis, size in axes.items() if size > 1} or {"expert": 1}


def suggest_axes_on(config: DbrxConfig, target: Target, devices: int) -> dict[str, int]:
    """Returns axes for devices of a kind, as :func:`suggest_axes`."""
    hosts = 1 if target.network is None else -(-devices // target.devices_per_host)
    return suggest_axes(config, devices, hosts)


def axes_text(axes: Mapping[str, int]) -> str:
    """Returns axes as --mesh takes them, such as "expert=16,tensor=4"."""
    return ",".join(f"{axis}={size}" for axis, size in axes.items())


def ways_to_fit(setting: Setting, sizes: Sequence[int]) -> list[str]:
    """Returns single changes that make a setting fit: lower precision, smaller cache, more devices.

    Args:
      sizes: numbers of devices, ascending.
    """
    return [*lower_precision(setting), *smaller_cache(setting), *larger_mesh(setting, sizes)]


def lower_precision(setting: Setting) -> list[str]:
    """Returns the highest precision of the weights that is lower and makes a setting fit; empty if there is none."""
    current = sum(memory(setting).parameters.values())
    for precision in PRECISIONS:
        with contextlib.suppress(MeshError, QuantizationError):  # this mesh would split a group
            smaller = dataclasses.replace(setting, precision=precision)
            if sum(memory(smaller).parameters.values()) < current and fits(smaller):
                return [f"{precision} weights"]
    return []


def smaller_cache(setting: Setting) -> list[str]:
    """Returns the changes of the cache's dtype, context or batch alone that make a setting fit."""
    ways = []
    if setting.cache_dtype is None and fits(dataclasses.replace(setting, cache_dtype="int8")):
        ways.append("an int8 cache")
    for name, unit in (("context", "positions"), ("batch", "rows")):
        value = getattr(setting, name) // 2
        while value and not fits(dataclasses.replace(setting, **{name: value})):
            value //= 2
        if value:
            ways.append(f"{value} {unit if value > 1 else unit[:-1]}")
    return ways


def larger_mesh(setting: Setting, sizes: Sequence[int]) -> list[str]:
    """Returns the first larger number of devices on which a setting fits; empty if there is none."""
    for devices in sizes:
        if devices > setting.devices:
            with contextlib.suppress(MeshError, PlanError, QuantizationError):
                axes = suggest_axes_on(setting.config, setting.target, devices)
                if fits(dataclasses.replace(setting, axes=axes)):
                    return [f"{devices} devices (mesh {axes_text(axes)})"]
    return []


def smallest(config: DbrxConfig, target: Target, precision: str, batch: int, context: int, sizes: Sequence[int]):
    """Returns the setting with the first of these numbers of devices on which the model fits, or None."""
    for devices in sizes:
        setting = Setting(config, target, suggest_axes_on(config, target, devices), precision, batch, context)
        if fits(setting):
            return setting
    return None
