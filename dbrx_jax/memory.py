"""Failed allocations, on the host or a device, as one line: what was asked, what is there and what would fit."""

import contextlib
import errno
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dbrx_jax.errors import DbrxError, MemoryLimitError
from dbrx_jax.host_memory import available_memory, total_memory

# In XLA's messages. Memory inside a core (vmem, smem) does not depend on sizes that a user chooses.
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED: (?!.*memory space [vs]mem)|CUDA_ERROR_OUT_OF_MEMORY|bad_alloc", re.S)
# "Out of memory allocating 393216000 bytes", "trying to allocate 12.50GiB", "Used 20.5G of 15.75G hbm"
REQUEST = re.compile(r"(?:allocat\w*|Used) (\d+(?:\.\d+)?) ?([KMGTP]?)")


class Memory(NamedTuple):
    """Memory of the host or of a device, in bytes."""

    free: int
    total: int
    place: str  # such as "this host"


@contextlib.contextmanager
def report_memory_errors(what: str, advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Reports memory that runs out in a `with` block, on the host or a device, as a MemoryLimitError.

    Args:
      what: the work of the block, such as "loading the weights".
      advice: called after a failure; returns what would fit or what to do.

    Raises:
      MemoryLimitError: the block ran out of memory. Other errors pass.
    """
    host, device = host_memory(), device_memory()
    try:
        yield
    except Exception as error:
        if not is_memory_error(error):
            raise
        end = "" if advice is None else f"; {advice()}"
        raise MemoryLimitError(f"{what}: {explain_memory_error(error, host, device)}{end}") from None


def is_memory_error(error: BaseException) -> bool:
    """Returns whether an allocation failed: in Python, numpy, the system, or XLA, whose errors have many classes."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_native = isinstance(error, RuntimeError | ValueError) and not isinstance(error, DbrxError)
    return is_native and OUT_OF_MEMORY.search(str(error)) is not None


def explain_memory_error(error: BaseException, host: Memory, device: Memory | None) -> str:
    """Returns such as "out of memory: 0.39 GB more did not fit; 5.9 GB of 6.1 GB were free on this host".

    Args:
      host, device: the memory before the work that failed.
    """
    requested = _requested_bytes(str(error))
    failed = "out of memory" if requested is None else f"out of memory: {_gigabytes(requested)} more did not fit"
    free, total, place = host if device is None or isinstance(error, MemoryError | OSError) else device
    return f"{failed}; {_gigabytes(free)} of {_gigabytes(total)} were free on {place}"


def host_memory() -> Memory:
    """Returns the memory of the host; all of it as free where the system does not report what is."""
    total, free = total_memory(), available_memory()
    return Memory(total if free is None else free, total, "this host")


def device_memory() -> Memory | None:
    """Returns the memory of the local device with the least free; None on a CPU, and before JAX is imported."""
    jax = sys.modules.get("jax")
    memories: list[Memory] = []
    for device in [] if jax is None else jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            limit = stats["bytes_limit"]
            memories.append(Memory(limit - stats["bytes_in_use"], limit, f"{device.platform} {device.id}"))
    return min(memories, default=None)


def _requested_bytes(message: str) -> int | None:
    match = REQUEST.search(message)
    return None if match is None else round(float(match[1]) * 1024 ** " KMGTP".index(match[2] or " "))


def _gigabytes(num_bytes: int) -> str:
    gigabytes = num_bytes / 1e9
    return f"{gigabytes:,.1f} GB" if gigabytes >= 1 else f"{gigabytes:.2g} GB"
