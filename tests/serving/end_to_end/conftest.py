"""Servers over the engine and the demo in float32, which OpenAI's client asks."""

import contextlib
import dataclasses
import threading

import openai
import pytest
import uvicorn

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.cli.load import Checkpoint
from dbrx_jax.cli.serve import _constraint_maker
from dbrx_jax.config import DbrxConfig
from dbrx_jax.demo import source_folder
from dbrx_jax.engine.engine import Engine
from dbrx_jax.serving.app import create_app
from dbrx_jax.serving.head_limit import HeadLimit
from dbrx_jax.serving.server import bind, url_of


@pytest.fixture(scope="package")
def model():
    return DbrxForCausalLM.from_pretrained(source_folder(), dtype="float32")


@pytest.fixture(scope="package")
def engine(model, tokenizer):
    """The engine, which compiles its programs as they are needed: a minute, together."""
    with Engine(model, tokenizer, max_rows=6, cache_gb=0.2, prefill_budget=16, warm_up=False) as engine:
        yield engine


@pytest.fixture(scope="package")
def start(engine, tokenizer, settings):
    """A function that starts a server over the engine and returns its URL; other arguments are those of Settings."""
    folder = source_folder()
    checkpoint = Checkpoint("demo", folder, DbrxConfig.from_file(folder), tokenizer, settings.defaults)
    make_constraint = _constraint_maker(checkpoint)
    with contextlib.ExitStack() as stack:

        def start(tokenizer=tokenizer, **changes):
            # A request may wait for a program to be compiled.
            changed = dataclasses.replace(settings, **{"timeout": 300.0} | changes)
            app = create_app(engine, tokenizer, changed, make_constraint)
            bound = stack.enter_context(contextlib.closing(bind("127.0.0.1", 0)))
            bound.listen()
            server = uvicorn.Server(uvicorn.Config(app, http=HeadLimit, ws="none", log_config=None))
            thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return url_of(bound)

        yield start


@pytest.fixture(scope="package")
def client(start):
    return openai.OpenAI(base_url=f"{start()}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="package")
def generated(model, tokenizer):
    """A function that returns the texts of generate for a prompt, without the end token."""

    def generated(prompt, max_new_tokens, **options):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        out = model.generate([ids], max_new_tokens=max_new_tokens, **options)
        return [tokenizer.decode(row[len(ids) :], skip_special_tokens=True) for row in out]

    return generated
