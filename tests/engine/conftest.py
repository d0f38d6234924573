"""Fixtures of the tests of the engine: a small model with a tokenizer, and an engine that compiles as it goes."""

import pytest

from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.engine.engine import Engine


@pytest.fixture(scope="package")
def model(models):
    return models("fused")


@pytest.fixture(scope="package")
def demo():
    """The demo in float32, and its tokenizer."""
    from dbrx_jax.demo import source_folder

    path = source_folder()
    return DbrxForCausalLM.from_pretrained(path, dtype="float32"), DbrxTokenizer.from_pretrained(path)


@pytest.fixture(scope="package")
def demo_engine(demo):
    with Engine(*demo, max_rows=6, cache_gb=0.2, prefill_budget=16, warm_up=False) as engine:
        yield engine


@pytest.fixture(scope="package")
def engine(model):
    with make_engine(model) as engine:
        yield engine


def make_engine(model, **options):
    """Makes an engine for 6 rows, with blocks for 2 full ones; all of them share compiled programs."""
    return Engine(model, max_rows=6, cache_gb=cache_gb(model, 8), prefill_budget=128, warm_up=False, **options)


def cache_gb(model, blocks):
    """Returns the size of a float32 cache of a number of blocks, and the spare one."""
    config = model.config
    return (blocks + 1.01) * 2 * config.n_layers * config.kv_n_heads * config.head_dim * 4 * 128 / 1e9
