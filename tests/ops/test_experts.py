"""Tests of sorting tokens by expert and of combining the outputs of local experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax.ops.experts import group, group_aligned


def routed(tokens, num_experts, num_all, top_k, seed):
    """Returns distinct experts of each token, those from num_experts on as num_experts: of another device."""
    random = np.random.default_rng(seed)
    experts = np.stack([random.permutation(num_all)[:top_k] for _ in range(tokens)])
    return np.minimum(experts, num_experts).astype(np.int32)


@pytest.mark.parametrize("aligned", [False, True])
@given(
    st.integers(1, 40), st.sampled_from([(1, 16, 4), (2, 16, 4), (4, 4, 4), (3, 5, 2), (16, 16, 4)]), st.integers(0, 9)
)
@settings(max_examples=6)
def test_rows_of_local_experts_are_combined(aligned, tokens, sizes, seed):
    """Each row has its expert's number and its token in it; rows of no expert are NaN."""
    num_experts, _, top_k = sizes
    experts = routed(tokens, *sizes, seed)
    weights = np.random.default_rng(seed).uniform(0.1, 1, experts.shape).astype(np.float32)

    @jax.jit
    def run(experts, weights):
        if aligned:
            num_rows = (tokens * min(top_k, num_experts) + 7 * num_experts) // 8 * 8
            groups = group_aligned(experts, num_experts, 8, num_rows)
        else:
            groups = group(experts, num_experts, 0)
        row = jnp.arange(groups.order.size)
        rows = jnp.full((groups.order.size, 2), jnp.nan)
        for e in range(num_experts):
            is_own = (groups.starts[e] <= row) & (row < groups.ends[e])
            own = jnp.stack([jnp.full(row.shape, e + 1.0), groups.order // top_k], axis=1)
            rows = jnp.where(is_own[:, None], own, rows)
        return groups, groups.combine(rows, weights)

    groups, y = run(experts, weights)
    if aligned:
        assert not np.any(np.asarray(groups.starts) % 8)
    local_weights = np.where(experts < num_experts, weights, 0)
    np.testing.assert_allclose(y[:, 0], np.sum(local_weights * (experts + 1), axis=1), rtol=1e-5)
    np.testing.assert_allclose(y[:, 1], local_weights.sum(axis=1) * np.arange(tokens), rtol=1e-5)
