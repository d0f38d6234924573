"""Estimates of per-device memory, HBM traffic and communication of a model on a mesh.

They follow from the parameters' shapes, :mod:`dbrx_jax.sharding.partition` and published figures of the devices.
``dbrx-jax plan --compile`` prints the compiler's figures beside these.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, PartitionSpec

from dbrx_jax.backend import kernel_backend
from dbrx_jax.checkpoint.parameters import ArrayLayout, array_layouts
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import MeshError, PlanError, QuantizationError
from dbrx_jax.planning.targets import Target
from dbrx_jax.quantization import Quantization
from dbrx_jax.sharding.partition import AXES, BATCH_AXES, CONTEXT_AXIS, VOCAB_AXES, Partition, axis_names_of, check_mesh

FLOATS = ("float32", "bfloat16")
PRECISIONS = (*FLOATS, "int8", "int4")  # to suggest, most bytes first
BATCHES = (1, 4, 16, 64)  # of the roofline's table
PREFILL = 2048  # tokens per chunk
SCALE_BYTES = 2  # per position and head of an int8 cache
# Activations that are alive at once.
_LIVE_HIDDEN, _LIVE_INNER = 8, 3


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model, accelerator, mesh, precision, batch and context to plan for."""

    config: DbrxConfig
    target: Target
    axes: Mapping[str, int]
    precision: str  # of the weights, one of FLOATS or a text as Quantization.parse takes it
    batch: int  # rows
    context: int  # positions of the cache
    cache_dtype: str | None = None  # "int8", or the activations'

    @functools.cached_property
    def partition(self) -> Partition:
        """Partition on an abstract mesh."""
        mesh = AbstractMesh(tuple(self.axes.get(axis, 1) for axis in AXES), AXES)
        check_mesh(self.config, mesh)
        return Partition(mesh)

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    @functools.cached_property
    def quantization(self) -> Quantization | None:
        return None if self.precision in FLOATS else Quantization.parse(self.precision)

    @property
    def dtype(self) -> str:
        """Dtype of activations, cache and scales: bfloat16, or float32 with float32 weights."""
        return "float32" if self.precision == "float32" else "bfloat16"

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
        return -(-self.batch // self.partition.size(*BATCH_AXES))

    @property
    def positions(self) -> int:
        """Positions of the cache, padded to a multiple of its blocks on all devices."""
        context_size = 128 * self.partition.size(CONTEXT_AXIS)
        return -(-self.context // context_size) * context_size


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes."""

    parameters: Mapping[str, int]  # by group
    cache: int
    state: int  # logits, tokens and log-probabilities of a generation
    working: int  # activations of a decode step or a prefill chunk, the larger

    @property
    def total(self) -> int:
        return sum(self.parameters.values()) + self.cache + self.state + self.working


def memory(setting: Setting, chunk: int = PREFILL) -> Memory:
    """Returns the memory of each device."""
    config, partition = setting.config, setting.partition
    groups: dict[str, int] = {}
    for name, array in setting.arrays.items():
        group = _group(name)
        groups[group] = groups.get(group, 0) + sum(_bytes(leaf, spec, partition) for _, leaf, spec in array.leaves())
    vocabulary = partition.pad_vocabulary(config.vocab_size) // partition.size(*VOCAB_AXES)
    state = setting.rows * (vocabulary * 5 + setting.positions * 8)  # logits and seen; tokens and log-probabilities
    working = max(_working(setting, setting.rows, 1), _working(setting, 1, chunk))
    return Memory(groups, cache_bytes(setting), state, working)


def cache_bytes(setting: Setting) -> int:
    """Returns the bytes of the key-value cache on one device."""
    config, partition = setting.config, setting.partition
    heads, positions = config.kv_n_heads // partition.size("tensor"), setting.positions // partition.size(CONTEXT_AXIS)
    bytes_per_head = config.head_dim + SCALE_BYTES if setting.cache_dtype == "int8" else config.head_dim * setting.width
    return config.n_layers * 2 * setting.rows * heads * positions * bytes_per_head


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
        weights = [array for name, array in setting.arrays.items() if ".experts." in name][:3]  # of one expert
        gathered = sum(_gathered(leaf, spec, partition) for w in weights for _, leaf, spec in w.leaves())
        if kernel_backend(setting.target.platform):  # stacked: one array has several experts
            gathered *= partition.expert_arrays(config.moe_num_experts)
    return hidden + max(attention, experts * setting.width) + rows * vocabulary * 8 + gathered


def _bytes(array: Any, spec: PartitionSpec, partition: Partition) -> int:
    """Returns the bytes of one device's shard of an array."""
    shard_shape = (n // partition.size(*axis_names_of(entry)) for n, entry in zip(array.shape, spec, strict=True))
    return math.prod(shard_shape) * array.dtype.itemsize


def _gathered(array: Any, spec: PartitionSpec, partition: Partition) -> int:
    """Returns the bytes of an array on one device after its all-gather over `fsdp`."""
    is_sharded = any("fsdp" in axis_names_of(entry) for entry in spec)
    return _bytes(array, spec, partition) * (partition.size("fsdp") if is_sharded else 1)


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

    def add(kind: str, what: str, group: int, size: int, times: int = config.n_layers) -> None:
        if group > 1:
            result.extend([Message(kind, what, group, size)] * times)

    def add_reduction(what: str, times: int) -> None:
        """Adds the reduction of all tokens' partial sums over the axes expert and tensor."""
        if split:
            # Over a whole slice of 16 or more the TPU compiler turns it into an all-reduce and a slice.
            is_all_reduce = setting.target.platform == "tpu" and experts == setting.devices >= 16
            add("all-reduce" if is_all_reduce else "reduce-scatter", what, experts, hidden, times)
            add("all-reduce", what, tensor, hidden // experts, times)
        else:
            add("all-reduce", what, experts * tensor, hidden, times)

    add_reduction("embedding", 1)
    if split:
        add("all-gather", "tokens into attention and experts", experts, hidden, 2 * config.n_layers)
        add("all-gather", "tokens into the head", experts, hidden, 1)
    add("all-reduce", "queries, keys and values", experts, tokens * qkv_size * b)
    add("all-reduce", "largest scores", experts, tokens * heads * 4)
    add("all-reduce", "attention", experts, tokens * heads * (config.head_dim + 1) * 4)
    add("all-reduce", "attention's output over heads", tensor, hidden // experts)
    add("all-to-all" if split else "all-gather", "attention's output", experts, hidden // (experts if split else 1))
    add_reduction("experts' output", config.n_layers)
    if not split:
        add("all-reduce", "the chosen token", experts * tensor, tokens * 4, 5)
        add("all-reduce", "whether a row is left", partition.size(*BATCH_AXES), 4, 1)
    for name, array in setting.arrays.items() if fsdp > 1 else ():
        for _, leaf, spec in array.leaves():
            if any("fsdp" in axis_names_of(entry) for entry in spec):
                add("all-gather", f"weights ({_group(name)})", fsdp, _gathered(leaf, spec, partition), 1)
    return result


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds of the time of one step."""

    tokens_per_second: float
    read: int  # bytes of weights and cache per device
    seconds_reading: float
    seconds_computing: float
    seconds_sending: float  # if nothing overlaps
    distinct_experts: float  # expected per layer under uniform routing


def distinct_experts(config: DbrxConfig, tokens: int) -> float:
    """Returns the expected number of distinct experts that tokens use under uniform routing."""
    return config.moe_num_experts * (1 - (1 - config.moe_top_k / config.moe_num_experts) ** tokens)


def decode_roofline(setting: Setting) -> Roofline:
    """Returns the roofline of a decode step of a full batch whose rows have `context` positions each."""
    config, target = setting.config, setting.target
    distinct = distinct_experts(config, setting.batch)
    parameters = dict(memory(setting).parameters)
    experts = parameters.pop("experts")
    parameters.pop("embedding")  # few of its rows are read
    live = cache_bytes(setting) * setting.context // setting.positions
    read = round(experts * distinct / config.moe_num_experts) + sum(parameters.values()) + live
    flops = 2 * setting.batch * config.active_parameters / setting.devices
    return _roofline(setting, setting.batch, read, flops, messages(setting, setting.rows, False), distinct, target)


def prefill_roofline(setting: Setting, tokens: int = PREFILL) -> Roofline:
    """Returns the roofline of the first chunk of a prompt in each group of devices."""
    config, partition = setting.config, setting.partition
    groups = partition.size(*BATCH_AXES)
    read = sum(memory(setting).parameters.values())
    attention = 2 * tokens * tokens * config.n_layers * config.n_heads * config.head_dim  # half of the square
    flops = groups * (2 * tokens * config.active_parameters + attention) / setting.devices
    distinct = distinct_experts(config, tokens)
    return _roofline(setting, groups * tokens, read, flops, messages(setting, tokens, True), distinct, setting.target)


def _roofline(
    setting: Setting, tokens: int, read: int, flops: float, collectives: list[Message], distinct: float, target: Target
) -> Roofline:
    peak = target.bf16_flops / (2 if setting.precision == "float32" else 1)
    reading, computing = read / target.hbm_bandwidth, flops / peak
    sending = sum(m.moved for m in collectives) / target.interconnect
    return Roofline(tokens / max(reading, computing, sending), read, reading, computing, sending, distinct)


def usable(target: Target) -> int:
    """Returns the bytes of a device that a program can use: a TPU's as the compiler allows, 95 percent of a GPU's."""
    return target.hbm_bytes if target.platform == "tpu" else round(0.95 * target.hbm_bytes)


def fits(setting: Setting) -> bool:
    """Returns whether a setting's memory fits on each device."""
    return memory(setting).total <= usable(setting.target)


def suggest_axes(config: DbrxConfig, devices: int) -> dict[str, int]:
    """Returns axes for a number of devices: as large an expert axis as possible, then tensor, then data.

    Raises:
      PlanError: the devices do not divide the model's sizes.
    """
    experts = math.gcd(devices, config.moe_num_experts)
    tensor = math.gcd(devices // experts, math.gcd(config.kv_n_heads, config.ffn_hidden_size))
    data = devices // experts // tensor
    if config.d_model % experts:
        raise PlanError(f"devices: {devices} do not divide this model's sizes; choose --mesh yourself")
    axes = {"data": data, "expert": experts, "tensor": tensor}
    return {axis: size for axis, size in axes.items() if size > 1} or {"expert": 1}


def ways_to_fit(setting: Setting, sizes: tuple[int, ...]) -> list[str]:
    """Returns single changes that make a setting fit: lower precision, shorter context, fewer rows, more devices."""
    ways = []
    current = sum(memory(setting).parameters.values())
    for precision in PRECISIONS:
        try:
            smaller = dataclasses.replace(setting, precision=precision)
            if sum(memory(smaller).parameters.values()) < current and fits(smaller):
                ways.append(f"{precision} weights")
                break
        except (MeshError, QuantizationError):  # this mesh would split a group
            continue
    for name, unit in (("context", "positions"), ("batch", "rows")):
        value = getattr(setting, name) // 2
        while value and not fits(dataclasses.replace(setting, **{name: value})):
            value //= 2
        if value:
            ways.append(f"{value} {unit}")
    for devices in sizes:
        if devices > setting.devices:
            larger = dataclasses.replace(setting, axes=suggest_axes(setting.config, devices))
            if fits(larger):
                ways.append(f"{devices} devices")
                break
    return ways


def smallest(config: DbrxConfig, target: Target, precision: str, batch: int, context: int, sizes: tuple[int, ...]):
    """Returns the setting with the first of these numbers of devices on which the model fits, or None."""
    for devices in sizes:
        setting = Setting(config, target, suggest_axes(config, devices), precision, batch, context)
        if fits(setting):
            return setting
    return None
