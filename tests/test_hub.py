"""Checkpoints by name on the hub, with the hub's client standing in for itself."""

import builtins
import sys
import types

import pytest

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.errors import CheckpointError
from tests.conftest import GOLDEN


@pytest.fixture
def hub(monkeypatch):
    """A huggingface_hub whose snapshot_download does what its `answer` does."""
    client, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (OSError,), {})
    errors.HFValidationError = type("HFValidationError", (ValueError,), {})
    errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (FileNotFoundError,), {})
    client.asked = []

    def snapshot_download(name, allow_patterns):
        client.asked.append((name, allow_patterns))
        return client.answer()

    client.snapshot_download, client.errors = snapshot_download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return client


def test_a_repository_is_downloaded_without_pickles(hub):
    hub.answer = lambda: str(GOLDEN / "dense")
    assert DbrxForCausalLM.from_pretrained("hf://someone/dbrx-instruct").config.moe_num_experts == 1
    ((name, patterns),) = hub.asked
    assert name == "someone/dbrx-instruct"
    assert "*.safetensors" in patterns
    assert not any("bin" in p or p == "*" for p in patterns)


def test_what_the_hub_refuses_is_said_in_a_line(hub):
    def refuse():
        raise hub.errors.HfHubHTTPError("401 Client Error.\n\nRepository Not Found")

    hub.answer = refuse
    with pytest.raises(CheckpointError, match=r"^hf://someone/x: the hub does not give it \(401 .*\)$"):
        DbrxForCausalLM.from_pretrained("hf://someone/x")


@pytest.mark.parametrize("path", ["/no/where", "owner/name", "../x", "name", "x" * 300])
def test_paths_never_reach_the_hub(hub, path):
    with pytest.raises(CheckpointError, match=r"there is no such folder$|cannot be read"):
        DbrxForCausalLM.from_pretrained(path)
    assert hub.asked == []


def test_without_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(CheckpointError, match=r"pip install 'dbrx-jax\[hub\]'"):
        DbrxForCausalLM.from_pretrained("hf://someone/x")
