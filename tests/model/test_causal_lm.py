"""Tests of the model: initial weights, parameter names, padding, independent rows, and the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.checkpoint.parameters import parameter_specs, parameters_of
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.stream import TokenStream
from dbrx_jax.model.cache import CACHE_BLOCK, cache_capacity, create_cache, prefill_chunk_lengths, round_up_size
from dbrx_jax.model.moe import MoE
from dbrx_jax.ops.experts import reference_experts
from dbrx_jax.sharding.partition import ONE_DEVICE

CHUNK = prefill_chunk_lengths(ONE_DEVICE)[-2]
TINY = DbrxConfig(
    d_model=48,
    n_heads=6,
    n_layers=2,
    max_seq_len=512,
    vocab_size=101,
    kv_n_heads=2,
    clip_qkv=1.0,
    ffn_hidden_size=28,
    moe_num_experts=5,
    moe_top_k=2,
    initializer_range=0.15,
    dtype="float32",
)


def test_initial_weights_have_expected_shapes_and_spread():
    parameters = parameters_of(DbrxForCausalLM(TINY, rngs=nnx.Rngs(0)))
    specs = parameter_specs(TINY)
    assert {n: a.shape for n, a in parameters.items()} == {n: s.shape for n, s in specs.items()}
    for name, array in parameters.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(array, 1)
        else:
            assert 0.12 < np.std(array) < 0.18, name
            assert abs(np.mean(array)) < 4 * 0.15 / array.size**0.5, name
    assert not np.allclose(parameters["blocks.0.moe.experts.0.w1"], parameters["blocks.0.moe.experts.1.w1"])
    repeated = parameters_of(DbrxForCausalLM(TINY, rngs=nnx.Rngs(0)))
    assert all(np.array_equal(repeated[n], a) for n, a in parameters.items())


def test_parameter_specs_of_132b_match():
    specs = parameter_specs(DbrxConfig.from_name("132b-base"))
    assert sum(s.size for s in specs.values()) == 131_596_523_520
    assert specs["blocks.39.moe.experts.15.w2"].shape == (10752, 6144)
    assert specs["blocks.0.attention.key"].axes == ("kv_heads", "head_dim", "embed")
    assert all(len(s.axes) == len(s.shape) for s in specs.values())


@pytest.fixture(scope="module")
def tiny():
    return DbrxForCausalLM(TINY, rngs=nnx.Rngs(1))


def test_logits_do_not_depend_on_padding_side(tiny):
    ids = np.random.default_rng(0).integers(0, 101, 9)
    unpadded = tiny(ids[None])[0]
    left = tiny(np.r_[[5] * 4, ids][None], np.r_[[0] * 4, [1] * 9][None])[0, 4:]
    right = tiny(np.r_[ids, [5] * 4][None], np.r_[[1] * 9, [0] * 4][None])[0, :9]
    np.testing.assert_allclose(left, unpadded, atol=1e-5)
    np.testing.assert_allclose(right, unpadded, atol=1e-5)


def test_position_ids_change_rotary_distances(tiny):
    ids = np.random.default_rng(0).integers(0, 101, (1, 6))
    np.testing.assert_array_equal(tiny(ids, position_ids=np.arange(6)[None]), tiny(ids))
    # Rotary embeddings depend only on distances.
    np.testing.assert_allclose(tiny(ids, position_ids=np.arange(6)[None] + 50), tiny(ids), atol=1e-4)
    assert not np.allclose(tiny(ids, position_ids=np.arange(6)[None] * 3), tiny(ids), atol=1e-3)


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(0, 3))
def test_row_logits_do_not_depend_on_other_rows_bitwise(tiny_rows, seed, row):
    """The shape is fixed; the other rows vary, and their lengths too."""
    model, ids, mask, want = tiny_rows
    rng = np.random.default_rng(seed)
    other, other_mask = rng.integers(0, 101, ids.shape), (np.arange(24) >= rng.integers(0, 20, (4, 1))).astype(int)
    other[row], other_mask[row] = ids[row], mask[row]
    np.testing.assert_array_equal(model(other, other_mask)[row][mask[row] == 1], want[row][mask[row] == 1])


@pytest.fixture(scope="module")
def tiny_rows(tiny):
    rng = np.random.default_rng(5)
    ids, mask = rng.integers(0, 101, (4, 24)), (np.arange(24) >= np.array([[0], [3], [11], [20]])).astype(int)
    return tiny, ids, mask, np.asarray(tiny(ids, mask))


@pytest.mark.parametrize(
    "variant",
    [
        {},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in ({"kv_n_heads": 1}, {"moe_num_experts": 1, "moe_top_k": 1}, {"clip_qkv": None})
        ),
    ],
)
def test_incremental_decoding_matches_full_forward(variant):
    """Prefills a chunk to blocks 3 and 1 of a cache, then decodes tokens one by one past the end of a block."""
    model = DbrxForCausalLM(dataclasses.replace(TINY, **variant), rngs=nnx.Rngs(2))
    total, first = CHUNK + 6, CHUNK - 5
    ids = np.random.default_rng(0).integers(0, 101, total)
    want = np.asarray(model(ids[None]))[0]
    cache, table = create_cache(model.config, 5, jnp.float32, ONE_DEVICE), np.array([[3, 1]])
    forward = jax.jit(lambda *inputs: model.forward_with_cache(*inputs, table))
    head = jax.jit(lambda x: model.logits(model.norm_f(x)))
    chunk = np.pad(ids[:first], (0, 5))[None]  # the last five are padding
    valid, positions = np.arange(CHUNK)[None] < first, np.arange(CHUNK)[None]
    x, cache = forward(chunk, valid, positions, cache)
    np.testing.assert_allclose(head(x)[0, :first], want[:first], rtol=0, atol=1e-5)
    for position in range(first, total):
        x, cache = forward(ids[None, position : position + 1], np.ones((1, 1), bool), np.array([[position]]), cache)
        np.testing.assert_allclose(head(x)[0, 0], want[position], rtol=0, atol=1e-5, err_msg=f"position {position}")
    for array in (cache[0].key, cache[0].value):
        assert np.asarray(array).any(axis=(1, 2, 3)).tolist() == [False, True, False, True, False]


def test_cache_capacity_is_bounded_and_rounded():
    longest = prefill_chunk_lengths(ONE_DEVICE)[-1]
    assert CHUNK % CACHE_BLOCK == longest % CHUNK == 0
    for tokens in (1, 127, 128, 129, 1000, 4097, 20000, 32768):
        positions = cache_capacity(tokens, ONE_DEVICE)
        assert positions >= tokens
        assert positions % longest == 0
        assert positions <= max(tokens * 1.5, tokens + longest)
    assert len({cache_capacity(t, ONE_DEVICE) for t in range(1, 32769)}) == 12
    assert [round_up_size(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 24, 25, 33, 49)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 24, 24, 32, 48, 64
    ]  # fmt: skip


def test_bfloat16_model_computes_in_bfloat16():
    model = DbrxForCausalLM(TINY, rngs=nnx.Rngs(1), dtype="bfloat16")
    out = model(np.arange(12)[None], output_hidden_states=True, output_router_probs=True)
    assert {h.dtype for h in out.hidden_states} == {jnp.dtype("bfloat16")}
    assert out.logits.dtype == out.router_probs[0].dtype == jnp.float32


def test_jitter_changes_only_the_router_input():
    moe = DbrxForCausalLM(dataclasses.replace(TINY, moe_jitter_eps=0.3), rngs=nnx.Rngs(1)).blocks[0].moe
    x = jax.random.normal(jax.random.key(1), (2, 3, TINY.d_model))
    key = jax.random.key(2)
    out, jittered = moe(x, ONE_DEVICE, jitter_key=key)
    noise = jax.random.uniform(key, (6, TINY.d_model), minval=0.7, maxval=1.3).reshape(x.shape)
    np.testing.assert_allclose(jittered.probs, moe(x * noise, ONE_DEVICE)[1].probs, rtol=1e-5)
    assert not np.allclose(jittered.probs, moe(x, ONE_DEVICE)[1].probs)
    # The experts received x without noise.
    want = reference_experts(
        x.reshape(6, -1), jittered.weights, jittered.experts, moe._local_weights(ONE_DEVICE), "silu"
    )
    np.testing.assert_allclose(out.reshape(6, -1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2],), "input_ids: expected integers of shape (batch, tokens)"),
        (([[1.0, 2.0]],), "input_ids: expected integers"),
        ((np.zeros((2, 0), int),), "input_ids: expected integers"),
        (([[1, 101]],), "expected ids from 0 to 100 (the model's vocabulary), got 101"),
        (([[1, -1]],), "got -1"),
        (([[1, 2]], [[1]]), "attention_mask: expected the shape of input_ids (1, 2), got (1, 1)"),
        (([[1, 2]], None, [[1]]), "position_ids: expected the shape"),
    ],
)
def test_invalid_inputs_are_rejected(tiny, arguments, message):
    with pytest.raises(GenerationError) as error:
        tiny(*arguments)
    assert message in str(error.value)


def test_equal_blocks_are_traced_once(monkeypatch):
    """Counts traces of the full sequence, and of each program with the cache."""
    traced = []
    route = MoE.route
    monkeypatch.setattr(MoE, "route", lambda *a: (traced.append(1), route(*a))[1])
    model = DbrxForCausalLM(dataclasses.replace(TINY, n_layers=5, vocab_size=103), rngs=nnx.Rngs(0))
    model(np.arange(7)[None])
    assert len(traced) == 1
    model.generate(np.arange(7)[None], max_new_tokens=3, eos_token_id=None)
    assert len(traced) == 3  # one for the chunk and one for the step


def test_decode_step_copies_neither_embedding_nor_head():
    """Checks the temporary memory of the decode program in bfloat16 on a CPU."""
    model = DbrxForCausalLM(dataclasses.replace(TINY, vocab_size=30_000), rngs=nnx.Rngs(0), dtype="bfloat16")
    step = dict(TokenStream(model, np.arange(7)[None], max_new_tokens=20, eos_token_id=None).lowered())["decode"]
    assert step.compile().memory_analysis().temp_size_in_bytes < 30_000 * TINY.d_model * 2 / 2
