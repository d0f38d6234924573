"""Tests of the selection of kernels by device and JAX version."""

import types

import jax
import pytest

from dbrx_jax import backend
from dbrx_jax.kernels import dispatch


@pytest.fixture(autouse=True)
def clear_backend_cache():
    for cached in (backend._only_hopper_gpus, backend._has_small_vmem):
        cached.cache_clear()
    yield
    for cached in (backend._only_hopper_gpus, backend._has_small_vmem):
        cached.cache_clear()


@pytest.mark.parametrize(("capability", "kind"), [("9.0", "gpu"), ("8.0", None), ("10.0", None), (None, None)])
def test_only_hopper_gpus_have_kernels(monkeypatch, capability, kind):
    card = types.SimpleNamespace(compute_capability=capability) if capability else types.SimpleNamespace()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert backend.kernel_backend("gpu") == kind


def test_gpu_kernels_are_used_when_compiling_without_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert backend.kernel_backend("gpu") == "gpu"


@pytest.mark.parametrize(("kind", "kernels"), [("TPU v4", None), ("TPU v5 lite", "tpu"), ("TPU v6 lite", "tpu")])
def test_tpus_with_small_vmem_have_no_kernels(monkeypatch, kind, kernels):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert backend.kernel_backend("tpu") == kernels


def test_older_jax_and_cpus_have_no_gpu_kernels(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    assert backend.kernel_backend("cuda") is None
    assert backend.kernel_backend("tpu") == "tpu"
    assert backend.kernel_backend("cpu") is None
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert backend.kernel_backend("cuda") == "gpu"


def test_dbrx_kernels_variable_disables_kernels(monkeypatch):
    monkeypatch.setenv("DBRX_KERNELS", "0")
    assert backend.kernel_backend("tpu") is None
    assert dispatch.expert_kernels("tpu") is None
