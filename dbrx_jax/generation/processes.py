"""Values that all processes of a run agree on."""

from functools import partial

import jax
import numpy as np
from jax import lax

from dbrx_jax.sharding.partition import Partition


@partial(jax.jit, static_argnums=0)
def replicate(partition, arrays):
    """Replicates arrays that are split over rows, so that every process can read them."""
    return lax.with_sharding_constraint(arrays, partition.sharding(partition.array_spec()))


def same_on_all_processes(partition: Partition, number: int) -> int:
    """Returns process 0's number (32 bits) on all processes of the mesh."""
    return int(broadcast(partition, np.array(number)))


def least_on_all_processes(partition: Partition, number: int) -> int:
    """Returns the least number (32 bits) of all processes."""
    if partition.mesh is None or not partition.mesh.is_multi_process:
        return number
    from jax.experimental.multihost_utils import process_allgather

    return int(process_allgather(np.array(number, np.int32)).min())


def broadcast(partition: Partition, numbers: np.ndarray) -> np.ndarray:
    """Returns process 0's array of numbers (32 bits) on all processes of the mesh."""
    if partition.mesh is None or not partition.mesh.is_multi_process:
        return numbers
    sharding = jax.sharding.NamedSharding(partition.mesh, jax.sharding.PartitionSpec(partition.mesh.axis_names))
    shape = (partition.mesh.size, *numbers.shape)
    copies = jax.make_array_from_callback(shape, sharding, lambda _: numbers.astype(np.uint32)[None])
    # A mesh on a TPU may begin with another process' device.
    first = next(i for i, device in enumerate(partition.mesh.devices.flat) if device.process_index == 0)
    return np.asarray(replicate(partition, copies))[first]
