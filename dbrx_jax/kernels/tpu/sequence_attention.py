"""Attention among a sequence's own tokens on a TPU: JAX's splash attention with a causal mask, and its gradients."""

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
BLOCK = 512  # queries and keys that are computed together


def supports(query: Array, key: Array, value: Array) -> bool:
    """Returns whether the kernel supports queries (B, T, H, K) and keys (B, S, G, K), arrays or shapes."""
    T, K, S = query.shape[1], query.shape[3], key.shape[1]
    one_dtype = query.dtype == key.dtype == value.dtype and query.dtype in (jnp.bfloat16, jnp.float32)
    # On several devices each has a part of the queries, in whole blocks.
    return one_dtype and K % LANES == 0 and (T == S or (T % LANES == 0 and S % T == 0))


def sequence_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    valid: Bool[Array, "B S"],
    first: Int[Array, ""],
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Attention of query t to the valid ones of keys 0 … first + t; some finite number where there are none.

    Args:
      first: the place of the first query, a multiple of T; 0 where T is S.
      interpret: run in Pallas' interpreter, on a CPU.
    """
    T, K = query.shape[1], query.shape[3]
    q = (query.astype(jnp.float32) / math.sqrt(K)).astype(query.dtype)
    q, k, v = (_padded(x, 1).swapaxes(1, 2) for x in (q, key, value))
    ids = _padded(valid, 1).astype(jnp.int32)
    kernel = _kernel(q.shape[1], k.shape[2], q.shape[2], interpret)
    if key.shape[1] > T:
        kernel = _own(kernel, lax.div(first, jnp.int32(T)), key.shape[1] // T)
    segments = splash.SegmentIds(q=jnp.ones(q.shape[2], jnp.int32), kv=ids)
    one = jax.vmap(kernel, in_axes=(0, 0, 0, splash.SegmentIds(q=None, kv=0)))  # type: ignore[arg-type]
    return one(q, k, v, segments).swapaxes(1, 2)[:, :T]


def _padded(x: Array, dimension: int) -> Array:
    """With zeros up to a multiple of LANES."""
    wide = [(0, 0)] * x.ndim
    wide[dimension] = (0, -x.shape[dimension] % LANES)
    return jnp.pad(x, wide)


@functools.lru_cache(maxsize=8)
def _kernel(heads: int, tokens: int, own: int, interpret: bool) -> Any:
    """Splash attention for devices that have `own` queries each. Laying out the mask of 32,768 tokens takes seconds."""
    mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens)) for _ in range(heads)])
    q, kv = math.gcd(own, BLOCK), math.gcd(tokens, BLOCK)
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
    )  # fmt: skip
    with jax.ensure_compile_time_eval():
        shards = tokens // own
        return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=shards, interpret=interpret)


def _own(kernel: Any, device: Array, devices: int) -> Any:
    """The kernel for one device's queries, of what it knows of those of all."""

    def part(info: Any) -> Any:
        dimensions = {"data_next": 1, "mask_next": 1, "block_mask": 1, "q_sequence": 0}
        mine = {}
        for name, dimension in dimensions.items():
            if (whole := getattr(info, name)) is not None:
                size = whole.shape[dimension] // devices
                mine[name] = lax.dynamic_slice_in_dim(whole, device * size, size, dimension)
        return info._replace(**mine)

    infos = (part(info) for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))
    return splash.SplashAttentionKernel(*infos, **kernel.kwargs)
