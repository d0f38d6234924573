"""Tests of the accelerator table, slice topologies and errors, without the compilers."""

import importlib.util
import math
import os

import pytest

from dbrx_jax.errors import PlanError
from dbrx_jax.planning.targets import TARGETS, devices, target, topology_for

_TPUS = [name for name, kind in TARGETS.items() if kind.platform == "tpu"]
_GPUS = ["h100", "h200"]  # of which the compiler has a description


@pytest.mark.parametrize("kind", TARGETS)
def test_target_figures_are_plausible(kind):
    """Catches wrong units, such as bits for bytes."""
    figures = target(kind)
    assert figures.name == kind
    assert 15 < figures.hbm_bytes / 2**30 < 200
    assert 5e11 < figures.hbm_bandwidth < 1e13
    assert 1e14 < figures.bf16_flops < 3e15
    assert kind == "v4" or figures.int8_flops is None or 1.9 < figures.int8_flops / figures.bf16_flops < 2.1
    assert figures.hbm_bandwidth / 20 < figures.interconnect < figures.hbm_bandwidth


@pytest.mark.parametrize("kind", _TPUS)
@pytest.mark.parametrize("chips", [1, 4, 8, 16, 32, 64, 128, 256])
def test_slice_topology_has_the_requested_chips(kind, chips):
    assert math.prod(map(int, topology_for(kind, chips).split("x"))) == chips


def test_slice_topology_matches_known_shapes():
    assert topology_for("v5e", 64) == "8x8"
    assert topology_for("v5p", 16) == "2x2x4"
    assert topology_for("h100", 8) == "1x1x8"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: target("v9"), "v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200"),
        (lambda: topology_for("v9", 4), "no accelerator is called 'v9'"),
        (lambda: topology_for("v5e", 7), "1, 4, 8, 16, 32, 64, 128, 256"),
        (lambda: devices("h100", 9), "1, 2, 4, 8"),
        (lambda: devices("v5e", "3x3"), "8x8"),
        (lambda: devices("v5p", "4x4"), "2x2x1"),
        (lambda: devices("a100", 8), "cannot compile for a100, whose description is not known: choose of v4, v5e, "),
    ],
)
def test_unknown_target_is_rejected_with_the_choices(call, message):
    with pytest.raises(PlanError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kinds", "compiler"), [(_TPUS, "libtpu"), (_GPUS, "jax_cuda13_plugin")])
def test_missing_compiler_is_reported(kinds, compiler):
    if importlib.util.find_spec(compiler):
        pytest.skip(f"{compiler} is installed")
    for kind in kinds:
        with pytest.raises(PlanError, match=r"pip install '.\[compile\]' in a clone"):
            devices(kind, 4)
    assert "TPU_WORKER_HOSTNAMES" not in os.environ
