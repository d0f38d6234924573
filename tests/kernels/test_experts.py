"""Tests of expert dispatch against the reference, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dbrx_jax.kernels.experts import apply_experts
from dbrx_jax.ops.experts import ACTIVATIONS, ExpertWeights, reference_experts
from dbrx_jax.ops.row_tiles import ROW_TILE
from dbrx_jax.quantization import Format, quantize

D, F = 24, 48


def random_case(tokens, num_experts, top_k, skew, seed, dtype=np.float32):
    """Returns random rows, weights and routing; expert e is exp(-skew * e) times as likely as expert 0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, D)).astype(dtype)
    noise = rng.gumbel(size=(tokens, num_experts)) - skew * np.arange(num_experts)
    chosen = np.argsort(-noise, axis=1)[:, :top_k].astype(np.int32)
    weights = rng.uniform(0.05, 1, size=(tokens, top_k)).astype(dtype)
    arrays = [tuple(jnp.asarray(rng.normal(0, 0.2, size=(F, D)), dtype) for _ in range(num_experts)) for _ in range(3)]
    return x, weights, chosen, ExpertWeights(*arrays)


apply = jax.jit(apply_experts, static_argnums=4)
reference = jax.jit(reference_experts, static_argnums=4)
batch_invariant = jax.jit(apply_experts, static_argnums=4, static_argnames="row_tile")


@st.composite
def random_cases(draw):
    num_experts = draw(st.integers(2, 7))
    top_k = draw(st.integers(1, num_experts))
    tokens = draw(st.sampled_from([1, 2, 7, 16, 17, 63, 64, 65, 200]))
    return random_case(tokens, num_experts, top_k, draw(st.sampled_from([0.0, 1.0, 50.0])), draw(st.integers(0, 99)))


@settings(max_examples=10)
@given(random_cases(), st.sampled_from(sorted(ACTIVATIONS)))
@example(random_case(200, 5, 1, 50.0, 0), "silu")  # all tokens to one expert, the others empty
@example(random_case(64, 4, 2, 0.0, 0), "silu")
def test_apply_experts_matches_reference(case, activation):
    np.testing.assert_allclose(apply(*case, activation), reference(*case, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 150])
def test_bfloat16_is_close_to_reference(tokens):
    case = random_case(tokens, 6, 3, 0.5, 1, dtype=jnp.bfloat16)
    out, want = apply(*case, "silu"), reference(*case, "silu")
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.float32(out) - np.float32(want)).max() / np.abs(np.float32(want)).max()
    assert error < 1e-2


@settings(max_examples=2)
@given(random_cases())
@example(random_case(200, 5, 1, 50.0, 0))
@example(random_case(150, 6, 3, 0.5, 4))
def test_gradients_match_reference(case):
    x, weights, chosen, expert_weights = case
    target = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)

    def loss(f):
        return jax.jit(jax.grad(lambda x, w, e: jnp.sum(f(x, w, chosen, e, "silu") * target), argnums=(0, 1, 2)))

    ours = jax.tree.leaves(loss(apply_experts)(x, weights, expert_weights))
    theirs = jax.tree.leaves(loss(reference_experts)(x, weights, expert_weights))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_stacked_weight_gradients_match_separate_weights():
    *arrays, expert_weights = random_case(100, 4, 2, 0.5, 2)
    x, weights, chosen = map(jnp.asarray, arrays)
    stacked = ExpertWeights(*(jnp.stack(w) for w in expert_weights))
    target = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32)
    grad = jax.grad(lambda e: jnp.sum(apply_experts(x, weights, chosen, e, "silu") * target))
    for a, b in zip(grad(stacked), grad(expert_weights), strict=True):
        np.testing.assert_array_equal(a, jnp.stack(b))


@pytest.mark.parametrize("tokens", [9, 130])
def test_padding_rows_are_zero_and_change_no_other_row(tokens):
    x, weights, chosen, expert_weights = random_case(tokens, 5, 2, 0.0, 3)
    valid = np.arange(tokens) % 3 != 1
    poisoned = np.where(valid[:, None], x, np.nan).astype(np.float32)
    out = apply(poisoned, weights, chosen, expert_weights, "silu", valid)
    np.testing.assert_array_equal(out[~valid], 0)
    np.testing.assert_array_equal(out[valid], apply(x, weights, chosen, expert_weights, "silu")[valid])


@pytest.mark.parametrize("tokens", [9, 130])
def test_overflowing_row_does_not_change_other_rows(tokens):
    x, weights, chosen, expert_weights = random_case(tokens, 5, 2, 0.0, 3)
    large = x.copy()
    large[4] = 3e38
    others = np.arange(tokens) != 4
    out = apply(large, weights, chosen, expert_weights, "silu")
    np.testing.assert_array_equal(out[others], apply(x, weights, chosen, expert_weights, "silu")[others])


@settings(max_examples=20)
@given(st.sampled_from([11, 90]), st.integers(0, 99), st.floats(0, 5))
def test_row_bits_do_not_depend_on_other_rows(tokens, seed, skew):
    x, weights, chosen, expert_weights = random_case(tokens, 6, 3, 0.0, 7)
    other_x, other_weights, other_chosen, _ = random_case(tokens, 6, 3, skew, seed)
    row = seed % tokens
    other_x[row], other_weights[row], other_chosen[row] = x[row], weights[row], chosen[row]
    out = apply(x, weights, chosen, expert_weights, "silu")
    other = apply(other_x, other_weights, other_chosen, expert_weights, "silu")
    np.testing.assert_array_equal(out[row], other[row])


@pytest.mark.parametrize("tokens", [1, 3])
def test_small_batches_do_not_read_inactive_experts(tokens):
    x, weights, chosen, expert_weights = random_case(tokens, 6, 2, 0.0, 5)
    chosen[:] = [1, 4]
    poison = ExpertWeights(
        *(tuple(w if e in (1, 4) else w * np.nan for e, w in enumerate(ws)) for ws in expert_weights)
    )
    np.testing.assert_array_equal(
        apply(x, weights, chosen, poison, "silu"), apply(x, weights, chosen, expert_weights, "silu")
    )


@settings(max_examples=4)
@given(random_cases(), st.sampled_from(["int8", "int4", "fp8"]))
def test_quantised_weights_match_reference(case, kind):
    x, weights, chosen, plain = case
    contracted = {"w1": (-1,), "v1": (-1,), "w2": (-2,)}
    quantised = ExpertWeights(
        *(
            tuple(quantize(w, Format.parse(kind), contracted[name], jnp.float32) for w in ws)
            for name, ws in zip(ExpertWeights._fields, plain, strict=True)
        )
    )
    want = reference(x, weights, chosen, quantised, "silu")
    np.testing.assert_allclose(apply(x, weights, chosen, quantised, "silu"), want, rtol=1e-4, atol=1e-4)


@settings(max_examples=8)
@given(st.integers(0, 99), st.sampled_from([3, 8, 29]), st.floats(0, 3))
def test_batch_invariant_row_bits_do_not_depend_on_number_of_rows(seed, tokens, skew):
    x, weights, chosen, expert_weights = random_case(ROW_TILE, 6, 3, 0.0, 7)
    more, more_weights, more_chosen, _ = random_case(ROW_TILE * tokens, 6, 3, skew, seed)
    row = seed % (ROW_TILE * tokens)
    more[row], more_weights[row], more_chosen[row] = x[2], weights[2], chosen[2]
    few = batch_invariant(x, weights, chosen, expert_weights, "silu", row_tile=ROW_TILE)
    many = batch_invariant(more, more_weights, more_chosen, expert_weights, "silu", row_tile=ROW_TILE)
    np.testing.assert_array_equal(few[2], many[row])
