"""Causal attention of whole sequences on TPUs with JAX's splash attention, with gradients."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Bool, Float, Int

LANES = 128
BLOCK = 512  # queries, and keys, of a tile of scores


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether the kernel supports queries (B, T, H, K) and keys (B, S, G, K), arrays or shapes."""
    T, K, S = query.shape[1], query.shape[3], key.shape[1]
    one_dtype = query.dtype == key.dtype == value.dtype and query.dtype in (jnp.bfloat16, jnp.float32)
    # With T < S, each device has a shard of the queries, in whole blocks of LANES.
    return one_dtype and K % LANES == 0 and (T == S or (T % LANES == 0 and S % T == 0))


def sequence_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    valid: Bool[Array, "B S"],
    first: Int[Array, ""],
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Computes attention of query t to the valid ones of keys 0 … first + t; finite but undefined if there are none.

    Args:
      first: position of the first query, a multiple of T; 0 if T is S.
      interpret: interprets the kernel on a CPU.
    """
    T, K = query.shape[1], query.shape[3]
    q = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
    q, k, v = (_pad_tokens(x).swapaxes(1, 2) for x in (q, key, value))
    key_segments = _pad_tokens(valid).astype(jnp.int32)  # queries are in segment 1, as valid keys are
    kernel = _kernel(q.shape[1], k.shape[2], q.shape[2], interpret)
    if key.shape[1] > T:
        kernel = _shard_kernel(kernel, lax.div(first, jnp.int32(T)), key.shape[1] // T)
    segments = splash.SegmentIds(q=jnp.ones(q.shape[2], jnp.int32), kv=key_segments)
    batched = jax.vmap(kernel, in_axes=(0, 0, 0, splash.SegmentIds(q=None, kv=0)))  # type: ignore[arg-type]
    return batched(q, k, v, segments).swapaxes(1, 2)[:, :T]


def _pad_tokens(x: Array) -> Array:
    """Pads dimension 1 with zeros to a multiple of LANES."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES)] + [(0, 0)] * (x.ndim - 2))


@functools.lru_cache(maxsize=8)  # building the mask of 32,768 tokens takes seconds
def _kernel(num_heads: int, num_keys: int, num_queries: int, interpret: bool) -> Any:
    """Returns splash attention for devices that have `num_queries` queries each, over all of them together."""
    mask = masks.MultiHeadMask([masks.CausalMask((num_keys, num_keys)) for _ in range(num_heads)])
    q, kv = math.gcd(num_queries, BLOCK), math.gcd(num_keys, BLOCK)
    sizes = splash.BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)
    with jax.ensure_compile_time_eval():
        shards = num_keys // num_queries
        return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=shards, interpret=interpret)


def _shard_kernel(kernel: Any, shard: Array, num_shards: int) -> Any:
    """Returns the kernel for one shard of the queries, with its part of the mask's arrays of all shards."""
    query_dimensions = {"data_next": 1, "mask_next": 1, "block_mask": 1, "q_sequence": 0}

    def shard_info(info: Any) -> Any:
        local = {}
        for name, dimension in query_dimensions.items():
            if (array := getattr(info, name)) is not None:
                size = array.shape[dimension] // num_shards
                local[name] = lax.dynamic_slice_in_dim(array, shard * size, size, dimension)
        return info._replace(**local)

    infos = (shard_info(info) for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))
    return splash.SplashAttentionKernel(*infos, **kernel.kwargs)
