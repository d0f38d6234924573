"""Tests of the most probable tokens."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dbrx_jax.generation.top_logprobs import most_probable
from dbrx_jax.sharding.partition import VOCAB_AXES, Partition, make_mesh


@pytest.mark.parametrize("number", [0, 2, 5, 14])
def test_most_probable_tokens_of_a_vocabulary_that_is_split(number):
    """None, fewer than a device has, more than it has, and more than there are, which are padded."""
    partition = Partition(make_mesh({"expert": 2, "tensor": 2}, jax.devices()[:4]))
    logits = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
    replicated = PartitionSpec()
    run = partition.shard_map(
        lambda x: most_probable(x, number, partition), PartitionSpec(None, VOCAB_AXES), (replicated, replicated)
    )
    ids, logprobs = jax.jit(run)(logits)
    assert ids.shape == logprobs.shape == (3, number)
    want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-want, axis=1)[:, :number]
    np.testing.assert_array_equal(ids[:, :12], order)
    np.testing.assert_allclose(logprobs[:, :12], np.take_along_axis(want, order, axis=1), rtol=0, atol=1e-6)
    assert np.isneginf(logprobs[:, 12:]).all()
