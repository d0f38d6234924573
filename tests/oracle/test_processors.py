"""Tests of the processed next-token distribution against transformers, in the Python named by DBRX_ORACLE_PYTHON."""

import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbrx_jax.generation.processors import Rows, process_logits
from dbrx_jax.generation.sampling import scale_and_filter
from dbrx_jax.generation.settings import make_settings
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.sharding.partition import ONE_DEVICE

pytestmark = pytest.mark.slow
# torch sorts more numbers than these in an order of its own where they are equal, and the order decides which of equal
# logits top-p keeps. So only the probabilities can be compared there, not whose they are.
STABLE_SORT = 16


def processed(config, ids, logits, width, max_new_tokens):
    """Returns the probabilities (B, V) of the next token of rows that all have the same length."""
    B, V = logits.shape
    settings = make_settings(config, V, width, max_new_tokens, np.zeros((B, 2), np.uint32), ONE_DEVICE)
    seen = np.zeros((B, V), bool)
    seen[np.arange(B)[:, None], ids] = True
    ids, logits, seen = map(jnp.asarray, (ids, logits, seen))
    slots, lengths, step = jnp.arange(B), jnp.full(B, ids.shape[1]), jnp.full(B, ids.shape[1] - width)
    rows = Rows(slots, lengths, step, jnp.pad(ids, ((0, 0), (0, 5))), seen, None)
    with jax.disable_jit():  # each case would compile a program of its own
        scores = process_logits(logits, settings.processors, rows, settings.eos, ONE_DEVICE)
        scores = scale_and_filter(scores, settings.sampling, slots)
    return np.asarray(jax.nn.softmax(scores, axis=-1))


def test_distribution_matches_transformers_for_each_option_and_each_pair(tmp_path):
    """200 rows of random logits, half of them with ties, and vocabularies from 2 tokens on."""
    python, script = os.environ["DBRX_ORACLE_PYTHON"], Path(__file__).parent / "process_logits.py"
    subprocess.run([python, script, tmp_path / "cases.npz"], check=True, timeout=600)
    arrays = np.load(tmp_path / "cases.npz")
    cases = json.loads(str(arrays["cases"]))
    assert len(cases) == 5 * 18 + 18 * 17 // 2
    for i, (vocabulary, options, width, _, max_length, eos) in enumerate(cases):
        config = GenerationConfig.from_dict({**options, "do_sample": True, "eos_token_id": eos})
        got = processed(config, arrays[f"ids{i}"], arrays[f"logits{i}"], width, max_length - width)
        want = arrays[f"probabilities{i}"]
        if "top_p" in options and vocabulary > STABLE_SORT:
            got, want = np.sort(got), np.sort(want)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6, err_msg=f"{cases[i]}")
