"""On which devices kernels run."""

import types

import jax
import pytest

from dbrx_jax import backend
from dbrx_jax.kernels import dispatch


@pytest.fixture(autouse=True)
def asked_anew():
    backend._only_hopper_gpus.cache_clear()
    yield
    backend._only_hopper_gpus.cache_clear()


@pytest.mark.parametrize(("capability", "kind"), [("9.0", "gpu"), ("8.0", None), ("10.0", None), (None, None)])
def test_only_hopper_gpus_have_kernels(monkeypatch, capability, kind):
    card = types.SimpleNamespace(compute_capability=capability) if capability else types.SimpleNamespace()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert backend.kernel_backend("gpu") == kind


def test_cards_that_are_compiled_for_are_hopper(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert backend.kernel_backend("gpu") == "gpu"


def test_older_jax_and_cpus_have_none(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    assert backend.kernel_backend("cuda") is None
    assert backend.kernel_backend("tpu") == "tpu"
    assert backend.kernel_backend("cpu") is None
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert backend.kernel_backend("cuda") == "gpu"


def test_the_switch_turns_them_off(monkeypatch):
    monkeypatch.setenv("DBRX_KERNELS", "0")
    assert backend.kernel_backend("tpu") is None
    assert dispatch.expert_kernels("tpu") is None
