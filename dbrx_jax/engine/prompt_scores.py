"""Log-probabilities of a prompt's tokens, from the hidden states of its chunks."""

import math
from typing import Any

from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from dbrx_jax.generation.decode import jit_variants
from dbrx_jax.generation.top_logprobs import most_probable
from dbrx_jax.model.graph import ModelState
from dbrx_jax.ops.log_probability import log_probability
from dbrx_jax.sharding.partition import BATCH_AXES

TILE = 16  # most tokens whose logits are in memory at a time


def score_chunk(
    model_state: ModelState, number: int, x: Float[Array, "1 T D"], targets: Int[ArrayLike, "1 T"]
) -> tuple[Float[Array, "T"], Int[Array, "T n"], Float[Array, "T n"]]:
    """Computes log-probabilities, in nats, of the tokens that follow those of a prompt's chunk.

    Args:
      x: hidden states of the chunk's tokens, before norm_f.
      targets: the token after each.

    Returns:
      The log-probability of each target, and the ids and log-probabilities of the `number` most probable tokens there.
    """
    return score_program(model_state)(model_state, number, x, targets)


def score_program(model_state: ModelState) -> Any:
    """Returns the jitted function of :func:`score_chunk`."""
    return _score_chunk[model_state.platform == "cpu"]


def _run_score_chunk(model_state, number, x, targets):
    model = model_state.merge()
    partition = model.partition

    def run(model_state, x, targets):
        model = model_state.merge()

        def score(tile: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            logits = model.logits(model.norm_f(tile[0]))
            return log_probability(logits, tile[1], partition), *most_probable(logits, number, partition)

        tile = math.gcd(targets.shape[1], TILE)
        scores = lax.map(score, (x.reshape(-1, tile, x.shape[2]), targets.reshape(-1, tile)))
        return tuple(a.reshape(-1, *a.shape[2:]) for a in scores)

    matrix, replicated = partition.array_spec(BATCH_AXES, None), partition.array_spec()
    in_specs = (model_state.specs(), partition.array_spec(BATCH_AXES, None, None), matrix)
    return partition.shard_map(run, in_specs, (replicated,) * 3)(model_state, x, targets)


_score_chunk = jit_variants(_run_score_chunk, static_argnums=1)
