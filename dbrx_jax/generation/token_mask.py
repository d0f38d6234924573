"""Masks of the tokens that may come next, a bit for each."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, UInt32

from dbrx_jax.sharding.partition import VOCAB_AXES, Partition


def apply_mask(
    logits: Float[Array, "B V"], mask: UInt32[ArrayLike, "B W"], partition: Partition
) -> Float[Array, "B V"]:
    """Gives -inf to the tokens whose bit is 0: bit i % 32 of word i // 32 is that of token i.

    Args:
      logits: float32; on a mesh, this device's shard of the vocabulary.
      mask: ceil(V / 32) words; on a mesh, those of the whole padded vocabulary, of which each shard has whole words.
    """
    words = partition.local_shard(jnp.asarray(mask), 1, *VOCAB_AXES)
    bits = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    is_allowed = bits.reshape(len(bits), -1)[:, : logits.shape[1]] == 1
    return jnp.where(is_allowed, logits, -jnp.inf)
