"""Tests of errors about memory that runs out."""

import errno
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax.errors import GenerationError, MemoryLimitError
from dbrx_jax.memory import (
    Memory,
    device_memory,
    explain_memory_error,
    host_memory,
    is_memory_error,
    report_memory_errors,
)

HOST = Memory(5_900_000_000, 6_100_000_000, "this host")
GPU = Memory(10**9, 80 * 10**9, "gpu 1")

# As XLA writes them: CPU, GPU, TPU while it runs, TPU while it compiles.
MESSAGES = {
    "RESOURCE_EXHAUSTED: Out of memory allocating 393216000 bytes.": "0.39 GB",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB.": "13.4 GB",
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 3.00G. That was not "
    "possible. There are 2.00G free.; (0x0x0_HBM0)": "3.2 GB",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.5G of "
    "15.75G hbm. Exceeded hbm capacity by 4.75G.": "22.0 GB",
}


@pytest.mark.parametrize(
    "allocate", [lambda: np.empty(1 << 50), lambda: jnp.zeros(1 << 47, jnp.float32)], ids=["numpy", "xla"]
)
def test_real_failures_are_reported_in_one_line(allocate):
    advice = "ask for less"
    with pytest.raises(MemoryLimitError) as caught, report_memory_errors("testing", lambda: advice):
        allocate()
    pattern = (
        r"testing: out of memory: [\d,.]+ GB more did not fit; "
        r"[\d,.]+ GB of [\d,.]+ GB were free on this host; ask for less"
    )
    assert re.fullmatch(pattern, str(caught.value))


@pytest.mark.parametrize("message", MESSAGES)
def test_requested_bytes_are_read_from_the_message(message):
    error = jax.errors.JaxRuntimeError(message)
    assert is_memory_error(error)
    line = f"out of memory: {MESSAGES[message]} more did not fit; 1.0 GB of 80.0 GB were free on gpu 1"
    assert explain_memory_error(error, HOST, GPU) == line


def test_error_without_a_size_is_explained():
    line = "out of memory; 5.9 GB of 6.1 GB were free on this host"
    assert explain_memory_error(MemoryError(), HOST, GPU) == line
    assert is_memory_error(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_memory_error(ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."))  # read by numpy


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes do not match"),
        OSError(errno.ENOSPC, "No space left on device"),
        GenerationError("RESOURCE_EXHAUSTED: is a word of the prompt"),
        RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem."),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, report_memory_errors("testing"):
        raise error
    assert caught.value is error


def test_fullest_device_is_named(monkeypatch):
    """A mesh fails on the device with the least memory left."""

    def device(number, used):
        return SimpleNamespace(
            platform="gpu", id=number, memory_stats=lambda: {"bytes_limit": 80 * 10**9, "bytes_in_use": used * 10**9}
        )

    monkeypatch.setattr(jax, "local_devices", lambda: [device(0, 10), device(1, 79), device(2, 30)])
    assert device_memory() == GPU


def test_limit_of_the_process_counts_as_its_memory():
    """The figures are those before the work, however much of it is still allocated."""
    limit = 4 << 30
    code = f"""
import resource
from dbrx_jax.memory import report_memory_errors
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
blocks = []
try:
    with report_memory_errors("filling"):
        while True:
            blocks.append(bytes(1 << 29))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    match = re.fullmatch(r"filling: out of memory; (\S+) GB of 4.3 GB were free on this host\n", done.stdout)
    assert match, done
    assert 1 < float(match[1]) <= 4.3


def test_all_memory_counts_as_free_where_the_system_does_not_say(monkeypatch):
    """As on macOS, which has no /proc."""
    monkeypatch.setattr("dbrx_jax.memory.available_memory", lambda: None)
    memory = host_memory()
    assert memory.free == memory.total > 1 << 30
    assert memory.place == "this host"
