"""Test of chunked prefill at DBRX's maximum length, 32,768 tokens, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.config import DbrxConfig
from dbrx_jax.generation.prefill import prefill
from dbrx_jax.model.cache import cache_capacity
from dbrx_jax.model.graph import split_model
from dbrx_jax.ops.attention import reference_attention
from dbrx_jax.ops.experts import reference_experts
from dbrx_jax.sharding.partition import ONE_DEVICE

TOKENS = 32768
QUERIES = 512  # per reference call: all scores at once would be 17 GB
CONFIG = DbrxConfig(
    d_model=48,
    n_heads=2,
    kv_n_heads=1,
    n_layers=2,
    max_seq_len=TOKENS,
    vocab_size=96,
    clip_qkv=8.0,
    rope_theta=5e5,
    ffn_hidden_size=40,
    moe_num_experts=6,
    moe_top_k=2,
    initializer_range=0.15,  # logits of about 1
)


@jax.jit
def attention_rows(query, key, value, first):
    mask = jnp.arange(key.shape[1]) <= first + jnp.arange(query.shape[1])[:, None]
    return reference_attention(query, key, value, mask[None])


@jax.jit
def experts(x, routing, weights):
    return reference_experts(x, routing.weights, routing.experts, weights, CONFIG.ffn_act_fn)


def reference_last_logits(model, ids):
    """Returns the last logits with reference attention, QUERIES at a time, and reference experts.

    The last block computes only the last QUERIES positions, because only the last logits are needed.
    """
    positions, partition = np.arange(ids.shape[1])[None], model.partition
    x = model.embed(ids, partition)
    for block in model.blocks:
        first = ids.shape[1] - QUERIES if block is model.blocks[-1] else 0
        q, k, v = block.attention._project_in(block.norm_1(x), positions, partition)
        rows = [attention_rows(q[:, i : i + QUERIES], k, v, i) for i in range(first, ids.shape[1], QUERIES)]
        x = x[:, first:] + block.attention._project_out(jnp.concatenate(rows, axis=1), partition)
        normed = block.norm_2(x)
        y = experts(normed[0], block.moe.route(normed, partition), block.moe._local_weights(partition))
        x = x + y[None]
    return model.logits(model.norm_f(x[:, -1]))


@pytest.mark.slow
def test_last_logits_of_32768_tokens_match_reference():
    model = DbrxForCausalLM(CONFIG, rngs=nnx.Rngs(0), dtype="float32")
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, TOKENS))
    want = np.asarray(reference_last_logits(model, ids))
    assert want.std() > 0.5
    positions = cache_capacity(TOKENS, ONE_DEVICE)
    _, logits = prefill(split_model(model), CONFIG, ONE_DEVICE, [ids[0]], positions, np.dtype("float32"))
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)
