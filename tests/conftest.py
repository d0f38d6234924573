"""Shared fixtures; all tests run on the CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices for mesh tests; the others run on the first.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# Compiling takes most of the time. Workers, processes that tests start, and later runs share compiled programs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".pytest_cache", "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import json
import shutil
import signal
from pathlib import Path

import hypothesis
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
CASES = ("fused", "bf16", "unnormalised_mqa", "dense")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start jobs in the background; tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: compilation makes the first example slow.
hypothesis.settings.register_profile("dbrx", deadline=None, print_blob=True)
hypothesis.settings.load_profile("dbrx")


def pytest_configure(config):
    """Compiles for the quick tests with few optimisations, which takes a third less time; slow tests have all."""
    if config.option.markexpr == "not slow":  # the default, see pyproject.toml
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def write_byte_vocabulary(folder):
    """Writes a tokenizer to a folder, with a vocabulary of single bytes and DBRX's special tokens."""
    from dbrx_jax.text.vocabulary import _byte_characters

    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(_byte_characters())}))
    (folder / "merges.txt").write_text("")
    special = {260: "<|endoftext|>", 261: "<|im_start|>", 262: "<|im_end|>"}
    added = {str(i): {"content": text} for i, text in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Drops compiled programs when there are many: each takes about 90 memory mappings, and Linux allows 65,530."""
    yield
    with open("/proc/self/maps") as maps:
        count = sum(1 for _ in maps)
    if count > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture(autouse=True)
def keep_interrupts():
    """Restores the handler of Ctrl-C, which commands that are run in this process and interrupted turn off."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="session")
def expected():
    """The oracle's outputs by golden case."""
    return {case: dict(np.load(GOLDEN / case / "expected.npz")) for case in CASES}


@pytest.fixture(scope="session")
def models():
    """A function from a golden case to its model in float32, each loaded once."""
    from dbrx_jax import DbrxForCausalLM

    loaded = {}

    def load(case):
        if case not in loaded:
            loaded[case] = DbrxForCausalLM.from_pretrained(GOLDEN / case, dtype="float32")
        return loaded[case]

    return load


@pytest.fixture
def fused_copy(tmp_path):
    """A copy of golden/fused to damage."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "fused", folder)
    return folder
