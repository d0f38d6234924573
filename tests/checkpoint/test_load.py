"""Tests of loading: progress in bytes, memory that runs out, and silence."""

import contextlib
import math
import subprocess
import sys

import jax
import pytest

from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.checkpoint import load
from dbrx_jax.errors import MemoryLimitError
from dbrx_jax.model.graph import split_model
from tests.conftest import GOLDEN


def local_bytes(array):
    """Returns the bytes of the different shards of an array on this process' devices."""
    shards = {str(shard.index): math.prod(shard.data.shape) for shard in array.addressable_shards}
    return sum(shards.values()) * array.dtype.itemsize


@pytest.mark.parametrize(
    ("mesh", "quantization"),
    [(None, None), (None, "int8"), ("expert=4,tensor=2", None), ("data=2,expert=4", "int4-32")],
)
def test_progress_adds_up_to_the_bytes_of_the_arrays(monkeypatch, mesh, quantization):
    calls, counts = [], []

    @contextlib.contextmanager
    def progress(*arguments):
        calls.append(arguments)
        yield counts.append

    monkeypatch.setattr(load, "progress", progress)
    model = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", mesh, quantization=quantization, progress=False)
    num_bytes = sum(map(local_bytes, jax.tree.leaves(split_model(model))))
    assert calls == [("Loading", num_bytes, False)]
    assert sum(counts) == num_bytes
    assert len(counts) > 20


def test_memory_that_runs_out_is_an_error_of_loading(monkeypatch):
    def rows(*arguments):
        raise MemoryError("Unable to allocate 1.00 GiB for an array")

    monkeypatch.setattr(load._ParameterReader, "rows", rows)
    with pytest.raises(MemoryLimitError) as caught:
        DbrxForCausalLM.from_pretrained(GOLDEN / "dense")
    what = f"loading {GOLDEN / 'dense'}, 0.000492 GB of float32 weights: out of memory: 1.1 GB more did not fit; "
    assert str(caught.value).startswith(what)


def test_script_that_loads_and_generates_prints_nothing(tmp_path):
    """Neither this library nor those that it uses, for either kind of folder."""
    to_orbax(GOLDEN / "dense", tmp_path / "orbax")
    code = """
import sys
from dbrx_jax import DbrxForCausalLM
for folder in sys.argv[1:]:
    DbrxForCausalLM.from_pretrained(folder).generate([[1, 2]], max_new_tokens=2)
"""
    arguments = [sys.executable, "-c", code, GOLDEN / "dense", tmp_path / "orbax"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
