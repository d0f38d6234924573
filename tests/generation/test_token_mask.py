"""Tests of masks of allowed tokens, on one device and with the vocabulary split over a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dbrx_jax.generation.token_mask import apply_mask
from dbrx_jax.sharding.partition import ONE_DEVICE, VOCAB_AXES, Partition, make_mesh

ROWS, VOCABULARY = 3, 75  # the last of three words is partly used


def packed(is_allowed):
    """Returns masks (B, W) of booleans (B, V)."""
    bits = np.packbits(is_allowed, axis=1, bitorder="little")
    return np.pad(bits, ((0, 0), (0, -bits.shape[1] % 4))).view("<u4")


@pytest.mark.parametrize("axes", [{}, {"expert": 2}, {"tensor": 4}, {"expert": 2, "tensor": 4}])
def test_tokens_that_are_not_allowed_get_minus_infinity(axes):
    partition = Partition(make_mesh(axes, jax.devices()[: int(np.prod([*axes.values()]))])) if axes else ONE_DEVICE
    size = partition.pad_vocabulary(VOCABULARY)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(ROWS, size)).astype(np.float32)
    is_allowed = rng.random((ROWS, size)) < 0.4
    is_allowed[2] = True
    spec = partition.array_spec(None, VOCAB_AXES)
    run = partition.shard_map(lambda logits, mask: apply_mask(logits, mask, partition), (spec, PartitionSpec()), spec)
    got = jax.jit(run)(logits, packed(is_allowed))
    np.testing.assert_array_equal(got, np.where(is_allowed, logits, -np.inf))
