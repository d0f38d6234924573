"""Tests that batch-invariant generation gives bitwise equal results in any batch, row and padding."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.api import DbrxForCausalLM
from dbrx_jax.config import DbrxConfig
from dbrx_jax.ops.row_tiles import ROW_TILE, map_row_tiles, num_row_tiles
from dbrx_jax.quantization import Quantization

CONFIG = DbrxConfig(
    d_model=96,
    n_heads=6,
    n_layers=2,
    max_seq_len=1024,
    vocab_size=300,
    kv_n_heads=2,
    ffn_hidden_size=72,
    moe_num_experts=5,
    moe_top_k=2,
    clip_qkv=8.0,
    initializer_range=0.2,
)
LENGTHS = (5, 140, 17, 1, 60, 33, 129, 9, 2, 77)
NUM_NEW = 6
SLOW = pytest.mark.slow
CASES = [
    ("float32", None, False, 7),  # dtype, quantization, sampled, max_rows
    *(
        pytest.param(*kind, 64, marks=SLOW)
        for kind in [
            ("float32", None, True),
            ("bfloat16", None, True),
            ("bfloat16", "int8", True),
            ("float32", "int4-32", True),
        ]
    ),
]


@functools.cache
def make_model(dtype, quantization=None):
    return DbrxForCausalLM(CONFIG, rngs=nnx.Rngs(3), dtype=dtype, quantization=Quantization.parse(quantization))


def prompt(seed):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, LENGTHS[seed % len(LENGTHS)])


def generate(model, seeds, left=True, sampled=False, num_new=NUM_NEW, **options):
    """Returns tokens and log-probabilities (B, num_new) of a batch of prompts."""
    rows = [prompt(n) for n in seeds]
    ids = np.zeros((len(rows), max(map(len, rows))), int)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        span = slice(ids.shape[1] - len(tokens), None) if left else slice(0, len(tokens))
        ids[row, span], mask[row, span] = tokens, 1
    if sampled:
        options |= {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": [1000 + n for n in seeds]}
    out = model.generate(
        ids,
        mask,
        max_new_tokens=num_new,
        eos_token_id=None,
        batch_invariant=True,
        return_dict_in_generate=True,
        output_logprobs=True,
        **options,
    )
    return out.sequences[:, ids.shape[1] :], out.logprobs.view(np.uint32)


@pytest.mark.parametrize(("dtype", "quantization", "sampled", "max_rows"), CASES)
def test_results_do_not_depend_on_the_batch(dtype, quantization, sampled, max_rows):
    model = make_model(dtype, quantization)
    batches = [[1, 0], [6, 1, 4, 0, 5, 3, 2], [*range(60), 3, 1, 0, 3]]  # 2, 7 and 64 rows
    batches = [batch for batch in batches if len(batch) <= max_rows]
    single = {}
    for batch in batches:
        tokens, logprobs = generate(model, batch, left=len(batch) != 7, sampled=sampled)
        for seed in (0, 1, 3):
            if seed not in single:
                single[seed] = generate(model, [seed], sampled=sampled)
            for row in (r for r, n in enumerate(batch) if n == seed):
                np.testing.assert_array_equal(tokens[row], single[seed][0][0], err_msg=f"{seed} in {len(batch)}")
                np.testing.assert_array_equal(logprobs[row], single[seed][1][0], err_msg=f"{seed} in {len(batch)}")


def test_results_do_not_depend_on_cache_length():
    model = make_model("float32")
    tokens, logprobs = generate(model, [4])
    longer = generate(model, [6, 4], num_new=NUM_NEW + 7, cache_length=1000)
    np.testing.assert_array_equal(longer[0][1, :NUM_NEW], tokens[0])
    np.testing.assert_array_equal(longer[1][1, :NUM_NEW], logprobs[0])


@SLOW
@settings(max_examples=6)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=ROW_TILE), st.booleans())
def test_results_do_not_depend_on_random_batches(seeds, left):
    """All batches have one compiled shape, so that many can be tried."""
    model = make_model("float32")
    tokens, logprobs = generate(model, seeds, left)
    row = len(seeds) // 2
    single = generate(model, seeds[row : row + 1])
    np.testing.assert_array_equal(tokens[row], single[0][0])
    np.testing.assert_array_equal(logprobs[row], single[1][0])


def test_batch_invariant_mode_matches_default_mode():
    """Tokens are equal with and without batch_invariant, and log-probabilities nearly so."""
    model, ids = make_model("float32"), np.stack([prompt(1)[:100], prompt(6)[:100]])
    options = {"max_new_tokens": NUM_NEW, "eos_token_id": None, "return_dict_in_generate": True}
    ours = model.generate(ids, batch_invariant=True, output_logprobs=True, **options)
    theirs = model.generate(ids, output_logprobs=True, **options)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


@pytest.mark.slow
def test_options_keep_a_row_the_same_in_any_batch():
    options = {
        "no_repeat_ngram_size": 2, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "bad_words_ids": [[3, 4]],
        "typical_p": 0.9, "eta_cutoff": 1e-3, "top_p": 0.9, "batch_invariant": True, "do_sample": True,
        "max_new_tokens": NUM_NEW, "eos_token_id": None, "return_dict_in_generate": True, "output_logprobs": True,
    }  # fmt: skip
    model = make_model("float32")
    many = model.generate([prompt(seed) for seed in (6, 1, 4, 0, 5, 3, 2, 7, 8)], seed=list(range(9)), **options)
    for row, seed in ((1, 1), (3, 0)):
        one = model.generate([prompt(seed)], seed=[row], **options)
        np.testing.assert_array_equal(many.sequences[row, -NUM_NEW:], one.sequences[0, -NUM_NEW:])
        np.testing.assert_array_equal(many.logprobs[row], one.logprobs[0])


def test_map_row_tiles_computes_every_row():
    rows = jnp.arange(3 * ROW_TILE, dtype=jnp.float32)
    double, calls = map_row_tiles(
        lambda first, x, calls: (2 * x + first, calls + 1),
        rows,
        jnp.int32(0),
        num_row_tiles(3 * ROW_TILE, jnp.zeros(4, int)),
    )
    np.testing.assert_array_equal(
        double, 2 * np.arange(3 * ROW_TILE) + np.repeat([0, ROW_TILE, 2 * ROW_TILE], ROW_TILE)
    )
    assert calls == 3
