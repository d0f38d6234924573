"""Tests of loading checkpoints from the Hugging Face hub, with a fake hub client."""

import builtins
import sys
import types

import pytest

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.errors import CheckpointError
from tests.conftest import GOLDEN


@pytest.fixture
def hub(monkeypatch):
    """A fake huggingface_hub whose snapshot_download calls its `answer`."""
    client, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (OSError,), {})
    errors.HFValidationError = type("HFValidationError", (ValueError,), {})
    errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (FileNotFoundError,), {})
    client.requests = []

    def snapshot_download(name, allow_patterns):
        client.requests.append((name, allow_patterns))
        return client.answer()

    client.snapshot_download, client.errors = snapshot_download, errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return client


def test_repository_is_downloaded_without_pickles(hub):
    hub.answer = lambda: str(GOLDEN / "dense")
    assert DbrxForCausalLM.from_pretrained("hf://someone/dbrx-instruct").config.moe_num_experts == 1
    ((name, patterns),) = hub.requests
    assert name == "someone/dbrx-instruct"
    assert "*.safetensors" in patterns
    assert not any("bin" in p or p == "*" for p in patterns)


def test_hub_error_is_reported_in_one_line(hub):
    def refuse():
        raise hub.errors.HfHubHTTPError("401 Client Error.\n\nRepository Not Found")

    hub.answer = refuse
    with pytest.raises(CheckpointError, match=r"^hf://someone/x: the hub does not give it \(401 .*\)$"):
        DbrxForCausalLM.from_pretrained("hf://someone/x")


@pytest.mark.parametrize("path", ["/no/where", "owner/name", "../x", "name", "x" * 300])
def test_paths_are_not_requested_from_the_hub(hub, path):
    with pytest.raises(CheckpointError, match=r"there is no such folder$|cannot be read"):
        DbrxForCausalLM.from_pretrained(path)
    assert hub.requests == []


def test_missing_hub_package_is_reported(monkeypatch):
    original_import = builtins.__import__

    def import_without_hub(name, *arguments, **options):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return original_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", import_without_hub)
    with pytest.raises(CheckpointError, match=r"pip install 'dbrx-jax\[hub\]'"):
        DbrxForCausalLM.from_pretrained("hf://someone/x")
