"""Servers over the stand-in for the engine."""

import contextlib
import dataclasses
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import uvicorn
from starlette.testclient import TestClient

from dbrx_jax.demo import source_folder
from dbrx_jax.generation.checkpoint_config import read_generation_config
from dbrx_jax.serving.app import create_app
from dbrx_jax.serving.server import bind, url_of
from dbrx_jax.serving.settings import Settings
from dbrx_jax.text.tokenizer import DbrxTokenizer
from tests.serving.fake_engine import FakeEngine

MODEL = "dbrx-demo"


@pytest.fixture(scope="session")
def tokenizer():
    return DbrxTokenizer.from_pretrained(source_folder())


@pytest.fixture(scope="session")
def settings():
    defaults = read_generation_config(source_folder())
    return Settings(
        model_name=MODEL, max_model_len=1024, vocab_size=2560, cache_blocks=64, defaults=defaults, timeout=20.0
    )


@pytest.fixture
def engine(tokenizer):
    engine = FakeEngine(tokenizer)
    yield engine
    engine.close()


@pytest.fixture
def make_client(tokenizer, engine, settings):
    """A function that makes a client of an application; arguments are those of create_app and Settings."""
    with contextlib.ExitStack() as stack:

        def make(make_constraint=None, write_log=None, tokenizer=tokenizer, **changes):
            app = create_app(engine, tokenizer, dataclasses.replace(settings, **changes), make_constraint, write_log)
            stack.callback(app.state.server.workers.close)
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            client.state = app.state.server
            return client

        yield make


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def start_server(tokenizer, engine, settings):
    """A function that starts a server in a thread, and returns its URL and its state."""
    with contextlib.ExitStack() as stack:

        def start(write_log=None, engine=engine, **changes):
            app = create_app(engine, tokenizer, dataclasses.replace(settings, **changes), None, write_log)
            bound = bind("127.0.0.1", 0)
            bound.listen()
            server = uvicorn.Server(uvicorn.Config(app, ws="none", log_config=None, timeout_graceful_shutdown=2))
            thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
            thread.start()

            def stop():
                server.should_exit = True
                thread.join()
                app.state.server.workers.close()

            stack.callback(stop)
            return url_of(bound), app.state.server

        yield start
