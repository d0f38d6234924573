"""Failed allocations, on the host or a device, as one line: what was asked, what is there and what would fit."""

import contextlib
import errno
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dbrx_jax.errors import DbrxError, MemoryLimitError

# In XLA's messages. Memory inside a core (vmem, smem) does not depend on sizes that a user chooses.
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED: (?!.*memory space [vs]mem)|CUDA_ERROR_OUT_OF_MEMORY|bad_alloc", re.S)
# "Out of memory allocating 393216000 bytes", "trying to allocate 12.50GiB", "Used 20.5G of 15.75G hbm"
REQUEST = re.compile(r"(?:allocat\w*|Used) (\d+(?:\.\d+)?) ?([KMGTP]?)")


@contextlib.contextmanager
def report_memory_errors(what: str, advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Reports memory that runs out in a `with` block, on the host or a device, as a MemoryLimitError.

    Args:
      what: the work of the block, such as "loading the weights".
      advice: called after a failure; returns what would fit or what to do.

    Raises:
      MemoryLimitError: the block ran out of memory. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not is_memory_error(error):
            raise
        end = "" if advice is None else f"; {advice()}"
        raise MemoryLimitError(f"{what}: {explain_memory_error(error)}{end}") from None


def is_memory_error(error: BaseException) -> bool:
    """Returns whether an allocation failed: in Python, numpy, the system, or XLA, whose errors have many classes."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_native = isinstance(error, RuntimeError | ValueError) and not isinstance(error, DbrxError)
    return is_native and OUT_OF_MEMORY.search(str(error)) is not None


def explain_memory_error(error: BaseException) -> str:
    """Returns "out of memory: 0.39 GB more did not fit; without this work 3.9 GB of 6.1 GB are free on this host".

    Call it after the failure, when what the failed work had allocated is free again.
    """
    requested = _requested_bytes(str(error))
    failed = "out of memory" if requested is None else f"out of memory: {_gigabytes(requested)} more did not fit"
    free, total, where = _device_memory(error) or (free_host_memory(), _total_host_memory(), "on this host")
    return f"{failed}; without this work {_gigabytes(free)} of {_gigabytes(total)} are free {where}"


def free_host_memory() -> int:
    """Returns the bytes that this process can still allocate on its host, within its control group and ulimit -v."""
    free = [_meminfo("MemAvailable")]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        free.append(limit - pages * resource.getpagesize())
    with contextlib.suppress(OSError, ValueError):  # the limit may be "max"
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free))


def _total_host_memory() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    total = _meminfo("MemTotal")
    return total if limit == resource.RLIM_INFINITY else min(limit, total)


def _meminfo(field: str) -> int:
    """Returns the bytes of a field of /proc/meminfo."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _device_memory(error: BaseException) -> tuple[int, int, str] | None:
    """Returns free and total bytes of the local device with the least free memory; None if the host's ran out."""
    if isinstance(error, MemoryError | OSError) or "jax" not in sys.modules:
        return None
    import jax

    devices: list[tuple[int, int, str]] = []
    for device in jax.local_devices():
        stats: dict[str, Any] = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats["bytes_in_use"]
            devices.append((free, stats["bytes_limit"], f"on {device.platform} {device.id}"))
    return min(devices, default=None)


def _requested_bytes(message: str) -> int | None:
    match = REQUEST.search(message)
    return None if match is None else round(float(match[1]) * 1024 ** " KMGTP".index(match[2] or " "))


def _gigabytes(num_bytes: int) -> str:
    gigabytes = num_bytes / 1e9
    return f"{gigabytes:,.1f} GB" if gigabytes >= 1 else f"{gigabytes:.2g} GB"
