"""Log-probabilities of a prompt's tokens, computed with its chunks."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from dbrx_jax.generation.decode import jit_variants
from dbrx_jax.generation.prefill import is_int8
from dbrx_jax.generation.top_logprobs import most_probable
from dbrx_jax.model.cache import Cache, cache_specs
from dbrx_jax.model.graph import ModelState
from dbrx_jax.ops.log_probability import log_probability
from dbrx_jax.sharding.partition import BATCH_AXES

TILE = 16  # most tokens whose logits are in memory at a time


def score_chunk(
    model_state: ModelState,
    number: int,
    cache: Cache,
    table: Int[ArrayLike, "1 W"],
    tokens: Int[ArrayLike, "1 T"],
    targets: Int[ArrayLike, "1 T"],
    spans: Int[ArrayLike, "1 2"],
) -> tuple[Cache, Float[Array, "1 D"], Float[Array, "T"], Int[Array, "T n"], Float[Array, "T n"]]:
    """Runs a chunk of one prompt like prefill_chunk; also returns log-probabilities, in nats, of what follows a token.

    Returns:
      The cache, the hidden state of the last token, the log-probability of each token's target, and the ids and
      log-probabilities of the `number` most probable tokens after each.
    """
    return score_program(model_state)(model_state, number, cache, table, tokens, targets, spans)


def score_program(model_state: ModelState) -> Any:
    """Returns the jitted function of :func:`score_chunk`."""
    return _score_chunk[model_state.platform == "cpu"]


def _run_score_chunk(model_state, number, cache, table, tokens, targets, spans):
    model = model_state.merge()
    partition = model.partition

    def run(model_state, cache, table, tokens, targets, spans):
        model = model_state.merge()
        start, num_tokens = spans[0]
        offsets = jnp.arange(tokens.shape[1])[None]
        x, cache = model.forward_with_cache(tokens, offsets < num_tokens, start + offsets, cache, table)
        last = lax.dynamic_index_in_dim(x[0], jnp.maximum(num_tokens - 1, 0), keepdims=True)

        def score(tile: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            logits = model.logits(model.norm_f(tile[0]))
            return log_probability(logits, tile[1], partition), *most_probable(logits, number, partition)

        tile = math.gcd(tokens.shape[1], TILE)
        scores = lax.map(score, (x.reshape(-1, tile, x.shape[2]), targets.reshape(-1, tile)))
        return cache, last, *(a.reshape(-1, *a.shape[2:]) for a in scores)

    cache_spec = cache_specs(model.config, partition, is_int8(cache))
    matrix, replicated = partition.array_spec(BATCH_AXES, None), partition.array_spec()
    in_specs = (model_state.specs(), cache_spec, *[matrix] * 4)
    run = partition.shard_map(run, in_specs, (cache_spec, matrix, *[replicated] * 3))
    return run(model_state, cache, table, tokens, targets, spans)


_score_chunk = jit_variants(_run_score_chunk, static_argnums=1, donate_argnums=2)
