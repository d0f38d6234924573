"""Fixtures of the tests of the engine: a small model with a tokenizer, and an engine that compiles as it goes."""

import dataclasses
from pathlib import Path

import pytest
import tiktoken_ext
from flax import nnx

from dbrx_jax import DbrxConfig, DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.demo import source_folder
from dbrx_jax.engine.constraints import Constraints
from dbrx_jax.engine.engine import Engine
from dbrx_jax.generation_config import GenerationConfig

CL100K = next(p for d in tiktoken_ext.__path__ if (p := Path(d) / "data" / "cl100k_base.tiktoken").exists())


@pytest.fixture(scope="package")
def demo_constraints():
    """The demo's tokenizer and constraints for its model, whose last ids have no text."""
    tokenizer = DbrxTokenizer.from_pretrained(source_folder())
    return tokenizer, Constraints(tokenizer, 2560, (2550, 2553))


@pytest.fixture(scope="package")
def cl100k(tmp_path_factory):
    """The tokenizer of DBRX, and constraints for 132B."""
    tokenizer = DbrxTokenizer.from_pretrained(tmp_path_factory.mktemp("empty"), ranks_file=CL100K)
    return tokenizer, Constraints(tokenizer, 100352, (tokenizer.eos_token_id, tokenizer.special_tokens["<|im_end|>"]))


@pytest.fixture(scope="package")
def model(models):
    return models("fused")


@pytest.fixture(scope="package")
def demo():
    """A small model, which compiles quickly, and the demo's tokenizer."""
    return small_model(), DbrxTokenizer.from_pretrained(source_folder())


@pytest.fixture(scope="package")
def demo_engine(demo):
    with Engine(*demo, max_rows=6, cache_gb=0.2, prefill_budget=16, warm_up=False) as engine:
        yield engine


@pytest.fixture(scope="package")
def engine(model):
    with make_engine(model) as engine:
        yield engine


def small_model(**sizes):
    """Makes a random model of one layer with the sizes of the demo, but for those that are given."""
    config = dataclasses.replace(DbrxConfig.from_file(source_folder()), n_layers=1, **sizes)
    model = DbrxForCausalLM(config, rngs=nnx.Rngs(5), dtype="float32")
    model.generation_config = GenerationConfig(eos_token_id=(2550, 2553))
    return model


def make_engine(model, **options):
    """Makes an engine for 6 rows, with blocks for 2 full ones; all of them share compiled programs."""
    return Engine(model, max_rows=6, cache_gb=cache_gb(model, 8), prefill_budget=128, warm_up=False, **options)


def cache_gb(model, blocks):
    """Returns the size of a float32 cache of a number of blocks, and the spare one."""
    config = model.config
    return (blocks + 1.01) * 2 * config.n_layers * config.kv_n_heads * config.head_dim * 4 * 128 / 1e9
