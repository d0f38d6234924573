"""Tests of the command serve: its options, and what it makes the server of. tests/serving/ tests the server."""

import socket
import subprocess
import sys
import types

import pytest

pytest.importorskip("fastapi")

import dbrx_jax.engine.engine
from dbrx_jax.cli.serve import read_api_keys
from dbrx_jax.serving import server
from tests.commands import in_process
from tests.serving.fake_engine import FakeEngine


class Constraints:
    """A stand-in that makes texts."""

    def __init__(self, tokenizer, vocab_size, eos_token_ids):
        assert eos_token_ids
        self.vocab_size = vocab_size

    def json_object(self):
        return f"object of {self.vocab_size}"

    def regex(self, pattern):
        return f"regex {pattern}"


@pytest.fixture
def served(monkeypatch):
    """The engines' arguments and the servers' arguments of the commands that are run."""
    served = types.SimpleNamespace(engines=[], servers=[], status=0)

    def engine(model, tokenizer, **options):
        served.engines.append((model, options))
        return FakeEngine(tokenizer, max_seq_len=model.config.max_seq_len)

    def run_server(app, bound, drain_seconds):
        served.servers.append((app.state.server, bound.getsockname(), drain_seconds))
        return served.status

    constraints = types.SimpleNamespace(Constraints=Constraints)
    monkeypatch.setattr(dbrx_jax.engine.engine, "Engine", engine)
    monkeypatch.setitem(sys.modules, "dbrx_jax.engine.constraints", constraints)
    monkeypatch.setattr(server, "run_server", run_server)
    monkeypatch.delenv("DBRX_API_KEYS", raising=False)
    return served


def test_demo(served):
    done = in_process("dbrx-jax", "serve", "--port", 0)
    assert (done.returncode, done.stdout) == (0, "")
    loaded, serving = done.stderr.splitlines()
    assert loaded.startswith("Loaded the demo (")
    state, (host, port), drain_seconds = served.servers[0]
    assert serving == (
        f"Serving dbrx-demo at http://127.0.0.1:{port}/v1 on one device: a cache of 40 blocks of 128 tokens, 8 rows, "
        "16 requests may wait, up to 1,024 tokens and 600 s a request, no API keys"
    )
    assert (host, drain_seconds) == ("127.0.0.1", 30.0)
    assert served.engines[0][1] == {"batch_invariant": False, "warm_up": True}
    settings = state.settings
    assert (settings.model_name, settings.max_model_len, settings.vocab_size) == ("dbrx-demo", 1024, 2560)
    assert (settings.cache_blocks, settings.cache_block, settings.max_n) == (40, 128, 8)
    assert settings.defaults.eos_token_id == (2550, 2553)
    assert set(settings.hosts) == {"localhost", "127.0.0.1", "::1"}
    assert (settings.api_keys, settings.allow_origins, settings.timeout) == ((), (), 600.0)
    assert state.make_constraint("json_object", None) == "object of 2560"
    assert state.make_constraint("regex", "a") == "regex a"


def test_options(served, source, tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    monkeypatch.setenv("DBRX_API_KEYS", "three, one")
    done = in_process(
        "dbrx-jax", "serve", source, "--port", 0, "--host", "0.0.0.0", "--api-key-file", keys, "--model-name", "org/m",
        "--max-rows", 3, "--cache-gb", 0.5, "--max-waiting", 7, "--timeout", 9, "--drain-seconds", 0,
        "--batch-invariant", "--prefill-budget", 99, "--no-warmup", "--cache-dtype", "int8",
        "--allow-origin", "https://a.example, https://b.example",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    state, (host, _), drain_seconds = served.servers[0]
    assert (host, drain_seconds) == ("0.0.0.0", 0)
    assert served.engines[0][1] == {
        "batch_invariant": True, "warm_up": False, "prefill_budget": 99, "max_rows": 3, "cache_gb": 0.5,
        "max_waiting": 7, "cache_dtype": "int8",
    }  # fmt: skip
    settings = state.settings
    assert (settings.model_name, settings.max_model_len, settings.timeout) == ("org/m", 128, 9)
    assert settings.api_keys == ("three", "one", "two")
    assert settings.allow_origins == ("https://a.example", "https://b.example")
    assert settings.hosts == ()
    assert done.stderr.splitlines()[-1].endswith(", 3 API keys")
    monkeypatch.setenv("DBRX_API_KEYS", "one")
    assert in_process("dbrx-jax", "serve", source, "--port", 0).stderr.splitlines()[-1].endswith(", 1 API key")


def test_speculation(served):
    assert in_process("dbrx-jax", "serve", "--port", 0, "--speculation", 5).returncode == 0
    assert served.engines[0][1] == {"batch_invariant": False, "warm_up": True, "speculation": 5}


def test_warning_of_an_open_server_and_the_models_name(served, source):
    done = in_process("dbrx-jax", "serve", f"{source}/", "--port", 0, "--host", "0.0.0.0")
    assert "Anyone who reaches 0.0.0.0 may use this server; --api-key-file asks for keys" in done.stderr.splitlines()
    assert served.servers[0][0].settings.model_name == source.name


def test_status_of_a_failed_engine(served):
    served.status = 1
    assert in_process("dbrx-jax", "serve", "--port", 0).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--port", 65536], "--port: expected a number from 0 to 65535, got 65536"),
        (["--port", "x"], "--port: expected a whole number, got 'x'"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: is no address"),
        (["--api-key-file", "/no/such/file"], "--api-key-file /no/such/file: cannot be read (No such file"),
        (["--max-rows", 0], "--max-rows: expected a number above 0, got 0"),
        (["--timeout", "nan"], "--timeout: expected a number above 0, got nan"),
        (["--drain-seconds", -1], "--drain-seconds: expected a number of at least 0, got -1"),
        (["--speculation", 15], "speculation: expected a number from 0 to 14, got 15"),
        (["--speculation", 3, "--batch-invariant"], "speculation: its steps of several tokens have other bits"),
        (["--mesh", "x=1"], "x"),
        (["--distributed"], "--distributed needs --mesh"),
        (["--processes", 2], "--coordinator, --processes and --process-id go with --distributed"),
        (["--quantization", "int3"], "int3"),
        (["/no/such/folder"], "/no/such/folder"),
        (["--prompt", "x"], "--prompt: there is no such option"),
    ],
)
def test_mistakes_are_told_in_a_line(served, arguments, fragment):
    port = [] if "--port" in arguments else ["--port", 0]
    done = in_process("dbrx-jax", "serve", *arguments, *port)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert fragment in done.stderr
    assert served.servers == []


def test_port_in_use(served):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = in_process("dbrx-jax", "serve", "--port", port)
    assert done.returncode == 2
    assert (
        done.stderr == f"dbrx-jax: --port {port}: cannot be used on 127.0.0.1 (Address already in use); give another\n"
    )


def test_missing_packages(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = in_process("dbrx-jax", "serve")
    assert done.returncode == 2
    assert "serve: needs the package uvicorn; pip install '.[serve]'" in done.stderr


def test_api_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\r\ntwo words\n\n")
    assert read_api_keys(file, {"DBRX_API_KEYS": "a,b\nc"}) == ("a", "b", "c", "one", "two words")
    assert read_api_keys(None, {}) == ()
    for content in (b"\n \n", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(file)):
            read_api_keys(file, {})


def test_the_servers_packages_are_imported_by_serve_alone():
    code = "import sys, dbrx_jax, dbrx_jax.cli.commands; print({'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
