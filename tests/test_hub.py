"""Tests of loading checkpoints from the Hugging Face hub, with a fake hub client."""

import builtins
import json
import re
import shutil
import sys
import tomllib
import types
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dbrx_jax.hub
from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.demo import source_folder
from dbrx_jax.errors import PACKAGES, CheckpointError, DbrxError
from dbrx_jax.hub import checkpoint_folder
from tests.commands import in_process

WEIGHTS = ["params/*", "*.safetensors"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake huggingface_hub with one repository, the demo and a pickle. Someone commits to it before each request.

    Attributes:
      repository: the folder that it copies from.
      requests: revisions and patterns of the calls of snapshot_download.
      answer: called by each; may raise.
    """
    client, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (OSError,), {})
    errors.HFValidationError = type("HFValidationError", (ValueError,), {})
    errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (FileNotFoundError,), {})
    client.requests, client.answer = [], lambda: None
    client.repository = tmp_path / "repository"
    shutil.copytree(source_folder(), client.repository)
    (client.repository / "pytorch_model.bin").write_bytes(b"pickle")

    def snapshot_download(name, allow_patterns, revision=None):
        assert name == "someone/dbrx"
        client.requests.append((revision, allow_patterns))
        client.answer()
        snapshot = tmp_path / "snapshots" / (revision or f"commit{len(client.requests)}")
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in client.repository.rglob("*"):
            name = file.relative_to(client.repository).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot / name)
        return str(snapshot)

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


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_no_weights(hub):
    """Asserts that no weights have been requested."""
    assert not any(fnmatch("model.safetensors", pattern) for _, patterns in hub.requests for pattern in patterns)


def test_weights_are_downloaded_last_and_of_the_same_commit(hub):
    model = DbrxForCausalLM.from_pretrained("hf://someone/dbrx")
    assert model.generation_config.eos_token_id == (2550, 2553)
    (newest, small_files), second = hub.requests
    assert newest is None
    assert "*.json" in small_files
    assert second == ("commit1", WEIGHTS)
    names = {file.name for file in model.checkpoint_path.iterdir()}
    assert names == {file.name for file in source_folder().iterdir()} - {"README.md"}


def test_tokenizer_is_loaded_without_weights(hub):
    assert len(DbrxTokenizer.from_pretrained("hf://someone/dbrx")) == len(
        DbrxTokenizer.from_pretrained(source_folder())
    )
    assert_no_weights(hub)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"dtype": "fp16"}, "dtype: expected one of float32, bfloat16, float16, got fp16"),
        ({"mesh": 5}, "mesh: expected a jax Mesh, a recipe or axes such as"),
        ({"quantization": "int3"}, "quantization: expected"),
        ({"quantization": "int8", "dtype": "float16"}, "quantization: its weights are used in"),
        ({"mesh": "nowhere"}, "mesh: expected"),
        ({"mesh": "tensor=8"}, "tensor"),
        ({"attention_implementation": "fast"}, "attention_implementation: expected"),
        ({"verify": True}, "safetensors have no digests to verify"),
    ],
)
def test_options_are_checked_before_weights_are_downloaded(hub, options, message):
    with pytest.raises(DbrxError, match=message):
        DbrxForCausalLM.from_pretrained("hf://someone/dbrx", **options)
    assert_no_weights(hub)


@pytest.mark.parametrize(
    ("file", "changes"), [("config.json", {"n_heads": 5}), ("generation_config.json", {"top_k": "many"})]
)
def test_small_files_are_checked_before_weights_are_downloaded(hub, file, changes):
    edit(hub.repository / file, **changes)
    with pytest.raises(DbrxError, match=next(iter(changes))):
        DbrxForCausalLM.from_pretrained("hf://someone/dbrx")
    assert_no_weights(hub)


class TestCommands:
    """`dbrx-jax generate` and `chat` report mistakes before weights are downloaded."""

    def fails(self, hub, message, *options, command="generate"):
        done = in_process("dbrx-jax", command, "hf://someone/dbrx", *options)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert message in done.stderr.splitlines()[-1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--prompt", ""), "the prompt is empty"),
            (("--prompt", "a", "--max-new-tokens", 5000), "--max-new-tokens: 5000"),
            (("--prompt", "a", "--top-p", 0.5), "--top-p draws at random"),
            (("--prompt", "a", "--mesh", "tensor=8"), "tensor"),
            (("--prompt", "a", "--verify"), "safetensors have no digests to verify"),
            (("--file", "/no/where.jsonl"), "where.jsonl: cannot be read"),
        ],
    )
    def test_options_and_prompts(self, hub, options, message):
        self.fails(hub, message, *options)
        assert_no_weights(hub)

    def test_template(self, hub):
        (hub.repository / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
        self.fails(hub, "the chat template failed: no users", "--prompt", "a", "--chat")
        self.fails(hub, "the chat template failed: no users", command="chat")
        assert_no_weights(hub)

    def test_tokenizer(self, hub):
        (hub.repository / "tokenizer.json").write_text("{")
        self.fails(hub, "tokenizer.json: not valid JSON", "--prompt", "a")
        assert_no_weights(hub)

    def test_memory_is_checked_by_the_dtype_of_the_configuration(self, hub, monkeypatch):
        monkeypatch.setattr("dbrx_jax.planning.memory_check.available_memory", lambda: 20_000_000)
        edit(hub.repository / "config.json", torch_dtype="float32")
        self.fails(hub, "(weights 29.", "--prompt", "a", "--max-new-tokens", 1)
        assert_no_weights(hub)

    def test_memory_is_checked_by_the_dtype_of_the_weights_once_they_are_here(self, hub, monkeypatch):
        monkeypatch.setattr("dbrx_jax.planning.memory_check.available_memory", lambda: 20_000_000)
        file = hub.repository / "model.safetensors"
        save_file({name: array.astype(np.float32) for name, array in load_file(file).items()}, file)
        self.fails(hub, "(weights 29.", "--prompt", "a", "--max-new-tokens", 1)
        assert hub.requests[-1] == ("commit1", WEIGHTS)

    @pytest.mark.slow
    def test_text(self, hub):
        done = in_process("dbrx-jax", "generate", "hf://someone/dbrx", "--prompt", "a", "--max-new-tokens", 1)
        assert done.returncode == 0, done.stderr
        assert "Loaded hf://someone/dbrx (7.3M parameters, bfloat16)" in done.stderr
        assert [patterns == WEIGHTS for _, patterns in hub.requests] == [False, True]


def test_orbax_repository_is_downloaded_whole(hub, monkeypatch):
    shutil.rmtree(hub.repository)
    to_orbax(source_folder(), hub.repository, quantization="int8")
    (hub.repository / "additional_chat_templates").mkdir()
    (hub.repository / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    with pytest.raises(DbrxError, match="mesh: expected"):
        DbrxForCausalLM.from_pretrained("hf://someone/dbrx", "nowhere", verify=True)
    with monkeypatch.context() as patch:
        patch.setattr("dbrx_jax.planning.memory_check.available_memory", lambda: 5_000_000)
        done = in_process("dbrx-jax", "generate", "hf://someone/dbrx", "--prompt", "a")
    assert "(weights 7.5 MB" in done.stderr  # as the manifest says, not of bfloat16
    assert not any("params/*" in patterns for _, patterns in hub.requests)
    model = DbrxForCausalLM.from_pretrained("hf://someone/dbrx", verify=True)
    names = [{f.relative_to(folder) for f in folder.rglob("*.*")} for folder in (model.checkpoint_path, hub.repository)]
    assert names[0] == names[1]


def test_hub_error_is_reported_in_one_line(hub):
    def refuse():
        raise hub.errors.HfHubHTTPError("401 Client Error.\n\nRepository Not Found")

    hub.answer = refuse
    with pytest.raises(CheckpointError, match=r"^hf://someone/dbrx: the hub does not give it \(401 .*\)$"):
        DbrxForCausalLM.from_pretrained("hf://someone/dbrx")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/where", "there is no such folder$"),
        ("../x", "there is no such folder$"),
        ("name", "there is no such folder$"),
        ("x" * 300, "cannot be read"),
        ("owner/name", "there is no such folder; on the hub it would be hf://owner/name$"),
        ("https://huggingface.co/owner/name", "is a page of the hub; write hf://owner/name$"),
        (5, "^expected a folder's path or URL, got 5$"),
        (None, "^expected a folder's path or URL, got None$"),
    ],
)
def test_paths_are_not_requested_from_the_hub(hub, path, message):
    with pytest.raises(CheckpointError, match=message):
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
    hub.answer = lambda: seen.append(hub.bars)
    monkeypatch.setattr(dbrx_jax.hub, "can_redraw", lambda: can_redraw)
    checkpoint_folder("hf://someone/dbrx", progress)
    assert seen == [progress and can_redraw]
    assert hub.bars
