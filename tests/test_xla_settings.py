"""What a program that owns its process sets, and that what the user has set stays."""

import os

from dbrx_jax.xla_settings import own_process


def test_it_adds_what_is_missing(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    own_process()
    own_process()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_dot_merger_threshold_mb=0"
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"


def test_the_users_own_choice_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_dot_merger_threshold_mb=7 --xla_dump_to=x")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    own_process()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_dot_merger_threshold_mb=7 --xla_dump_to=x"
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
