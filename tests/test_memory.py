"""Tests of errors about memory that runs out."""

import errno
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax.errors import GenerationError, MemoryLimitError
from dbrx_jax.memory import explain_memory_error, is_memory_error, report_memory_errors

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
        r"testing: out of memory: [\d,.]+ GB more did not fit; without this work "
        r"[\d,.]+ GB of [\d,.]+ GB are free on this host; ask for less"
    )
    assert re.fullmatch(pattern, str(caught.value))


@pytest.mark.parametrize("message", MESSAGES)
def test_requested_bytes_are_read_from_the_message(message):
    error = jax.errors.JaxRuntimeError(message)
    assert is_memory_error(error)
    assert explain_memory_error(error).startswith(f"out of memory: {MESSAGES[message]} more did not fit; ")


def test_error_without_a_size_is_explained():
    assert explain_memory_error(MemoryError()).startswith("out of memory; without this work ")
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
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.00GiB.")
    line = "out of memory: 2.1 GB more did not fit; without this work 1.0 GB of 80.0 GB are free on gpu 1"
    assert explain_memory_error(error) == line
    assert explain_memory_error(MemoryError()).endswith("on this host")
