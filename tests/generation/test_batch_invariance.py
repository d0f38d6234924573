"""Bit for bit the same tokens and log-probabilities alone and in company, at any row, however padded."""

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
NEW = 6
SLOW = pytest.mark.slow
KINDS = [
    ("float32", None, False, 7),  # the largest company
    *(
        pytest.param(*kind, 64, marks=SLOW)
        for kind in [
            ("float32", None, False),
            ("float32", None, True),
            ("bfloat16", None, False),
            ("bfloat16", None, True),
            ("bfloat16", "int8", False),
            ("bfloat16", "int8", True),
            ("float32", "int4-32", True),
        ]
    ),
]


@functools.cache
def make(dtype, quantization=None):
    return DbrxForCausalLM(CONFIG, rngs=nnx.Rngs(3), dtype=dtype, quantization=Quantization.parse(quantization))


def prompt(number):
    return np.random.default_rng(number).integers(0, CONFIG.vocab_size, LENGTHS[number % len(LENGTHS)])


def run(model, numbers, left=True, sampled=False, new=NEW, **options):
    """Tokens and log-probabilities (B, new) of these prompts together."""
    rows = [prompt(n) for n in numbers]
    ids = np.zeros((len(rows), max(map(len, rows))), int)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        at = slice(ids.shape[1] - len(tokens), None) if left else slice(0, len(tokens))
        ids[row, at], mask[row, at] = tokens, 1
    if sampled:
        options |= {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": [1000 + n for n in numbers]}
    out = model.generate(
        ids,
        mask,
        max_new_tokens=new,
        eos_token_id=None,
        batch_invariant=True,
        return_dict_in_generate=True,
        output_logprobs=True,
        **options,
    )
    return out.sequences[:, ids.shape[1] :], out.logprobs.view(np.uint32)


@pytest.mark.parametrize(("dtype", "quantization", "sampled", "largest"), KINDS)
def test_alone_and_in_company(dtype, quantization, sampled, largest):
    model = make(dtype, quantization)
    companies = [[1, 0], [6, 1, 4, 0, 5, 3, 2], [*range(60), 3, 1, 0, 3]]  # 2, 7 and 64 rows
    companies = [company for company in companies if len(company) <= largest]
    alone = {}
    for company in companies:
        tokens, logprobs = run(model, company, left=len(company) != 7, sampled=sampled)
        for number in (0, 1, 3):
            if number not in alone:
                alone[number] = run(model, [number], sampled=sampled)
            for row in (r for r, n in enumerate(company) if n == number):
                np.testing.assert_array_equal(tokens[row], alone[number][0][0], err_msg=f"{number} in {len(company)}")
                np.testing.assert_array_equal(logprobs[row], alone[number][1][0], err_msg=f"{number} in {len(company)}")


def test_more_new_tokens_and_a_longer_cache_change_nothing():
    model = make("float32")
    tokens, logprobs = run(model, [4])
    longer = run(model, [6, 4], new=NEW + 7, cache_length=1000)
    np.testing.assert_array_equal(longer[0][1, :NEW], tokens[0])
    np.testing.assert_array_equal(longer[1][1, :NEW], logprobs[0])


@SLOW
@settings(max_examples=6)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=ROW_TILE), st.booleans())
def test_any_company(numbers, left):
    """All of one compiled shape, so that many can be tried."""
    model = make("float32")
    tokens, logprobs = run(model, numbers, left)
    row = len(numbers) // 2
    alone = run(model, numbers[row : row + 1])
    np.testing.assert_array_equal(tokens[row], alone[0][0])
    np.testing.assert_array_equal(logprobs[row], alone[1][0])


def test_it_says_what_it_says_without():
    """The mode computes the same model: the same tokens as the other path, and nearly the same numbers."""
    model, options = make("float32"), {"max_new_tokens": NEW, "eos_token_id": None, "return_dict_in_generate": True}
    ids = np.stack([prompt(1)[:100], prompt(6)[:100]])
    ours = model.generate(ids, batch_invariant=True, output_logprobs=True, **options)
    theirs = model.generate(ids, output_logprobs=True, **options)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_over_tiles_gives_each_row_its_own():
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
