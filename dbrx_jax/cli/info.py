"""Describes this installation: versions, devices and memory."""

import importlib.metadata
import os
import platform
from typing import Any

from dbrx_jax.host_memory import available_memory, total_memory

PACKAGES = ("dbrx-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "safetensors", "tiktoken", "numpy")


def collect() -> dict[str, Any]:
    """Returns facts for a bug report: texts, and lists of texts."""
    import jax

    available = available_memory()
    memory = f"{total_memory() / 2**30:.1f} GiB of memory"
    if available is not None:
        memory += f", {available / 2**30:.1f} GiB free"
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "versions": [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES],
        "backend": f"{jax.default_backend()}, process {jax.process_index()} of {jax.process_count()}",
        "devices": [_device(device) for device in jax.local_devices()],
        "host": f"{os.cpu_count()} CPUs, {memory}",
    }


def _device(device: Any) -> str:
    stats = device.memory_stats() or {}
    memory = ""
    if "bytes_limit" in stats:
        memory = f", {stats['bytes_in_use'] / 2**30:.1f} of {stats['bytes_limit'] / 2**30:.1f} GiB in use"
    return f"{device.id}: {device.device_kind}{memory}"
