"""Tests of loading checkpoints from the Hugging Face hub, with a fake hub client."""

import builtins
import re
import sys
import tomllib
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest

import dbrx_jax.hub
from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.demo import source_folder
from dbrx_jax.errors import PACKAGES, CheckpointError
from dbrx_jax.hub import checkpoint_folder
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
    client.utils = utils = types.ModuleType("huggingface_hub.utils")
    client.bars = True
    utils.are_progress_bars_disabled = lambda: not client.bars
    utils.disable_progress_bars = lambda: setattr(client, "bars", False)
    utils.enable_progress_bars = lambda: setattr(client, "bars", True)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
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


def test_orbax_repository_is_downloaded_whole(hub, tmp_path):
    to_orbax(source_folder(), tmp_path / "orbax")
    (tmp_path / "orbax" / "additional_chat_templates").mkdir()
    (tmp_path / "orbax" / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    hub.answer = lambda: str(tmp_path / "orbax")
    DbrxForCausalLM.from_pretrained("hf://someone/orbax")
    ((_, patterns),) = hub.requests
    files = [path.relative_to(tmp_path / "orbax").as_posix() for path in (tmp_path / "orbax").rglob("*.*")]
    assert "params/state/lm_head/0.0" in files
    assert [name for name in files if not any(fnmatch(name, pattern) for pattern in patterns)] == []


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
    advice = r"pip install '\.\[hub\]' in a clone of dbrx_jax, or pip install huggingface_hub$"
    with pytest.raises(CheckpointError, match=advice):
        DbrxForCausalLM.from_pretrained("hf://someone/x")


def test_advice_names_the_packages_of_each_extra():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for extra, packages in PACKAGES.items():
        names = [re.split("[>=]", requirement)[0] for requirement in extras[extra]]
        assert packages.replace("'", "").split() == names


@pytest.mark.parametrize(("progress", "can_redraw"), [(True, True), (True, False), (False, True)])
def test_bars_of_the_hub_are_drawn_where_ours_are(hub, monkeypatch, progress, can_redraw):
    seen = []
    hub.answer = lambda: seen.append(hub.bars) or str(GOLDEN / "dense")
    monkeypatch.setattr(dbrx_jax.hub, "can_redraw", lambda: can_redraw)
    checkpoint_folder("hf://someone/x", progress)
    assert seen == [progress and can_redraw]
    assert hub.bars
