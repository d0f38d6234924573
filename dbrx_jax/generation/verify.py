"""Device program that adds several tokens to rows at once: proposed ones, as far as they are what decoding gives.

The model runs once on each row's last token and its proposals. Then tokens are sampled one after another, as in decode:
a row goes on to the next one while the token that was sampled is the one that was proposed. Random numbers depend on
seed and position alone, so the tokens are those of decoding, greedy or sampled. Keys and values of refused proposals
stay behind the row's end, where nothing reads them before later tokens replace them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Int

from dbrx_jax.generation.decode import (
    any_row,
    append_tokens_of_logits,
    empty_outputs,
    is_running,
    jit_variants,
    may_reorder_sums,
)
from dbrx_jax.generation.rows import take_rows
from dbrx_jax.generation.state import Options, Outputs, RowState, Settings, state_specs
from dbrx_jax.model.cache import MIN_CHUNK, Cache, cache_specs
from dbrx_jax.model.graph import ModelState
from dbrx_jax.sharding.partition import BATCH_AXES

MAX_PROPOSED = MIN_CHUNK - 2  # with the row's last token fewer than a chunk, so that they may be at any position


class VerifyCarry(NamedTuple):
    """Carry of the loop over the tokens of each row."""

    state: RowState
    outputs: Outputs
    active: Array  # (R,), rows that get another token
    counts: Array  # (R,), new tokens so far


def verify(
    model_state: ModelState,
    options: Options,
    settings: Settings,
    cache: Cache,
    state: RowState,
    slots: Int[ArrayLike, "R"],
    table: Int[ArrayLike, "R W"],
    proposed: Int[ArrayLike, "R k"],
    num_proposed: Int[ArrayLike, "R"],
) -> tuple[Cache, RowState, Outputs, Int[Array, "R"]]:
    """Adds a token to each row that is not done, and one more after each proposal that equals the token before it.

    Args:
      options: not batch-invariant; their number of steps is not used, it is k + 1.
      slots: of the rows among the M of the state; M for padding.
      table: the blocks of each row, for all positions that its proposals may reach.
      proposed: tokens that may follow each row's last; padded behind num_proposed. k is at most MAX_PROPOSED.

    Returns:
      Cache, state, outputs, and the number of new tokens of each row.
    """
    arguments = model_state, options, settings, cache, state, slots, table, proposed, num_proposed
    return verify_program(model_state, options)(*arguments)


def verify_program(model_state: ModelState, options: Options) -> Any:
    """Returns the jitted function of :func:`verify`."""
    return _verify[may_reorder_sums(model_state, options)]


def _run_verify(model_state, options, settings, cache, state, slots, table, proposed, num_proposed):
    model = model_state.merge()
    options = options._replace(steps=proposed.shape[1] + 1)
    partition, specs = model.partition, state_specs(settings, options, model.partition)

    def run(model_state, settings, cache, state, slots, table, proposed, num_proposed):
        model = model_state.merge()
        active, offsets = is_running(state, slots), jnp.arange(options.steps)
        tokens = jnp.concatenate([take_rows(state.token, slots)[:, None], proposed], axis=1)
        valid = active[:, None] & (offsets <= num_proposed[:, None])
        positions = take_rows(state.position, slots)[:, None] + offsets
        x, cache = model.forward_with_cache(tokens, valid, positions, cache, table)
        logits = model.logits(model.norm_f(x))

        def step(carry: VerifyCarry) -> VerifyCarry:
            state, outputs, active, counts = carry
            i = outputs.num_steps
            rows = jnp.where(active, slots, state.token.shape[0])
            state, outputs = append_tokens_of_logits(model, logits[:, i], options, settings, state, rows, outputs)
            # Behind the last token the index is clipped, and no row has a proposal.
            is_proposed = (outputs.tokens[:, i] == tokens[:, i + 1]) & (i < num_proposed)
            return VerifyCarry(state, outputs, is_running(state, rows) & is_proposed, counts + active)

        carry = VerifyCarry(state, empty_outputs(model, settings, options, slots), active, jnp.zeros_like(slots))
        carry = lax.while_loop(lambda carry: any_row(carry.active, partition), step, carry)
        return cache, carry.state, carry.outputs, carry.counts

    cache_spec = cache_specs(model.config, partition, cache[0].key_scale is not None)
    vector, matrix = partition.array_spec(BATCH_AXES), partition.array_spec(BATCH_AXES, None)
    in_specs = (model_state.specs(), specs.settings, cache_spec, specs.state, vector, matrix, matrix, vector)
    run = partition.shard_map(run, in_specs, (cache_spec, specs.state, specs.outputs, vector))
    return run(model_state, settings, cache, state, slots, table, proposed, num_proposed)


_verify = jit_variants(_run_verify, static_argnums=1, donate_argnums=(3, 4))
