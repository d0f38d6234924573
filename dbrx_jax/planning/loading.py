"""Estimates what loading a checkpoint takes of a host: bytes read, time, and memory."""

import dataclasses
import math
import re

from jax.sharding import PartitionSpec

from dbrx_jax.checkpoint.load import READERS
from dbrx_jax.checkpoint.parameters import parameter_specs
from dbrx_jax.planning.plan import Setting, shard_bytes
from dbrx_jax.sharding.partition import axis_names_of


@dataclasses.dataclass(frozen=True)
class Loading:
    """Bytes that one host reads and holds while it loads its devices' shards."""

    devices: int  # of the host
    read: int  # of a checkpoint in the planned precision
    read_float: int | None  # of one that is quantised while it is loaded; None without quantisation
    memory: int  # of the host at most, besides what its devices keep


def loading(setting: Setting) -> Loading:
    """Returns the estimate for a host.

    A reader holds one array's shards for all devices of the host, and a parameter as it comes from the file. If it
    quantises, its blocks are also kept until all shards have theirs.
    """
    copies = 1 if setting.quantization is None else 2
    sizes = _host_bytes_by_array(setting)
    in_flight = sorted(copies * size + _parameter_bytes(setting, name) for name, size in sizes.items())
    read_float = None
    if setting.quantization is not None:
        read_float = sum(_host_bytes_by_array(dataclasses.replace(setting, precision=setting.dtype)).values())
    return Loading(
        devices=min(setting.devices, setting.target.devices_per_host),
        read=sum(sizes.values()),
        read_float=read_float,
        memory=sum(in_flight[-READERS:]),
    )


def _host_bytes_by_array(setting: Setting) -> dict[str, int]:
    """Returns the bytes of each array's different shards on the devices of a host.

    Where there are kernels, one array has all experts of a layer.
    """
    sizes: dict[str, int] = {}
    for name, array in setting.arrays.items():
        if setting.uses_kernels:
            name = re.sub(r"(?<=\.experts\.)[0-9]+", "0", name)
        size = sum(
            _distinct_shards(setting, spec) * shard_bytes(leaf, spec, setting.partition)
            for _, leaf, spec in array.leaves()
        )
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def _distinct_shards(setting: Setting, spec: PartitionSpec) -> int:
    axes = [axis for entry in spec for axis in axis_names_of(entry)]
    return min(setting.devices, setting.target.devices_per_host, math.prod(map(setting.partition.size, axes)))


def _parameter_bytes(setting: Setting, name: str) -> int:
    """Returns the bytes of an array's parameter, or of one of those that it stacks, before it is quantised."""
    return parameter_specs(setting.config)[name].size * setting.width
