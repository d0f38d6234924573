"""Describes this installation: versions, devices and memory."""

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("dbrx-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "safetensors", "tiktoken", "numpy")


def collect() -> dict[str, Any]:
    """Returns facts for a bug report: texts, and lists of texts."""
    import jax

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "versions": [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES],
        "backend": f"{jax.default_backend()}, process {jax.process_index()} of {jax.process_count()}",
        "devices": [_device(device) for device in jax.local_devices()],
        "host": f"{os.cpu_count()} CPUs, {memory / 2**30:.1f} GiB of memory",
    }


def _device(device: Any) -> str:
    stats = device.memory_stats() or {}
    memory = ""
    if "bytes_limit" in stats:
        memory = f", {stats['bytes_in_use'] / 2**30:.1f} of {stats['bytes_limit'] / 2**30:.1f} GiB in use"
    return f"{device.id}: {device.device_kind}{memory}"
