"""What a program that owns its process sets, and that what the user has set stays."""

import os

from dbrx_jax.xla_settings import own_process


def test_it_sets_what_is_missing_and_no_more(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")  # so that what is set here is undone
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    own_process()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    own_process()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
