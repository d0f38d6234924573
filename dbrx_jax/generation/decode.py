"""Device programs that add tokens to rows: the first after a prompt, and the decode loop.

On a mesh each function is one program that every device runs on its rows, heads and vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.generation.filters import can_sample, log_softmax
from dbrx_jax.generation.processors import Rows, apply_functions, local_ids, process_logits
from dbrx_jax.generation.rows import put_rows, take_rows
from dbrx_jax.generation.sampling import argmax, sample_tokens, scale_and_filter
from dbrx_jax.generation.state import Options, Outputs, RowState, Settings, changes_logits, output_shapes, state_specs
from dbrx_jax.generation.top_logprobs import top_logprobs
from dbrx_jax.model.cache import Cache, cache_specs
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import ModelState
from dbrx_jax.ops.log_probability import log_probability
from dbrx_jax.ops.row_tiles import map_row_tiles, num_row_tiles
from dbrx_jax.ops.small_batch_matmul import CPU_OPTIONS
from dbrx_jax.sharding.partition import BATCH_AXES, Partition


def jit_variants(function: Callable[..., Any], **options: Any) -> dict[bool, Any]:
    """Compiles a function with the compiler options for CPUs, under True, and without them, under False."""
    function.__name__ = function.__name__.removeprefix("_run_")  # as profiles show it
    return {True: jax.jit(function, compiler_options=CPU_OPTIONS, **options), False: jax.jit(function, **options)}


def may_reorder_sums(model_state: ModelState, options: Options) -> bool:
    """Returns whether XLA may reorder sums; not in batch-invariant programs, which need one order."""
    return model_state.platform == "cpu" and not options.batch_invariant


def sample_first(
    model_state: ModelState,
    options: Options,
    settings: Settings,
    state: RowState,
    slots: Int[ArrayLike, "R"],
    x: Float[Array, "N D"],
    index: Int[ArrayLike, "R"],
) -> tuple[RowState, Outputs]:
    """Samples the first new token of rows, after prompts whose last tokens have the hidden states x[index].

    Args:
      slots: of the rows among the M of the state; M for padding.
    """
    return sample_program(model_state, options)(model_state, options, settings, state, slots, x, index)


def sample_program(model_state: ModelState, options: Options) -> Any:
    """Returns the jitted function of :func:`sample_first`."""
    return _sample_first[may_reorder_sums(model_state, options)]


def _run_sample_first(model_state, options, settings, state, slots, x, index):
    model = model_state.merge()
    partition, specs = model.partition, state_specs(settings, options, model.partition)

    def run(model_state, settings, state, slots, x, index):
        model = model_state.merge()
        outputs = empty_outputs(model, settings, options, slots)
        return append_tokens(model, x[index], options, settings, state, slots, outputs)

    vector, matrix = partition.array_spec(BATCH_AXES), partition.array_spec(BATCH_AXES, None)
    in_specs = (model_state.specs(), specs.settings, specs.state, vector, matrix, vector)
    run = partition.shard_map(run, in_specs, (specs.state, specs.outputs))
    return run(model_state, settings, state, slots, x, index)


_sample_first = jit_variants(_run_sample_first, static_argnums=1, donate_argnums=3)


class DecodeCarry(NamedTuple):
    """Carry of the decode loop."""

    cache: Cache
    state: RowState
    outputs: Outputs
    running: Array  # whether any row is not done


def decode(
    model_state: ModelState,
    options: Options,
    settings: Settings,
    cache: Cache,
    state: RowState,
    slots: Int[ArrayLike, "R"],
    table: Int[ArrayLike, "R W"],
    steps: Int[ArrayLike, ""],
) -> tuple[Cache, RowState, Outputs]:
    """Adds up to `steps` tokens, at most options.steps, to each of R rows that is not done.

    Args:
      slots: of the rows among the M of the state; M for padding.
      table: the blocks of each row, for all positions that it may reach.
    """
    return decode_program(model_state, options)(model_state, options, settings, cache, state, slots, table, steps)


def decode_program(model_state: ModelState, options: Options) -> Any:
    """Returns the jitted function of :func:`decode`."""
    return _decode[may_reorder_sums(model_state, options)]


def _run_decode(model_state, options, settings, cache, state, slots, table, steps):
    model = model_state.merge()
    partition, specs = model.partition, state_specs(settings, options, model.partition)

    def run(model_state, settings, cache, state, slots, table, steps):
        model = model_state.merge()

        def step(carry: DecodeCarry) -> DecodeCarry:
            cache, state, outputs, _ = carry
            token, position = take_rows(state.token, slots), take_rows(state.position, slots)
            valid = is_running(state, slots)
            if options.batch_invariant:
                x, cache = model.decode_in_row_tiles(token, valid, position, cache, table)
            else:
                inputs = (a[:, None] for a in (token, valid, position))
                x, cache = model.forward_with_cache(*inputs, cache, table)
                x = x[:, 0]
            state, outputs = append_tokens(model, x, options, settings, state, slots, outputs)
            return DecodeCarry(cache, state, outputs, any_row(is_running(state, slots), partition))

        outputs = empty_outputs(model, settings, options, slots)
        carry = DecodeCarry(cache, state, outputs, any_row(is_running(state, slots), partition))
        carry = lax.while_loop(lambda carry: (carry.outputs.num_steps < steps) & carry.running, step, carry)
        return carry.cache, carry.state, carry.outputs

    cache_spec = cache_specs(model.config, partition, cache[0].key_scale is not None)
    vector, matrix = partition.array_spec(BATCH_AXES), partition.array_spec(BATCH_AXES, None)
    in_specs = (
        model_state.specs(), specs.settings, cache_spec, specs.state, vector, matrix, partition.array_spec()
    )  # fmt: skip
    run = partition.shard_map(run, in_specs, (cache_spec, specs.state, specs.outputs))
    return run(model_state, settings, cache, state, slots, table, steps)


_decode = jit_variants(_run_decode, static_argnums=1, donate_argnums=(3, 4))


def is_running(state: RowState, slots: Int[Array, "R"]) -> Bool[Array, "R"]:
    """Returns which of the rows are neither done nor padding."""
    return ~take_rows(state.done, slots) & (slots < state.token.shape[0])


def any_row(is_true: Bool[Array, "R"], partition: Partition) -> Bool[Array, ""]:
    """Returns whether something holds for a row of any group."""
    return partition.pmax(jnp.any(is_true).astype(jnp.int32), *BATCH_AXES) > 0


def empty_outputs(model: CausalLM, settings: Settings, options: Options, slots: Array) -> Outputs:
    """Returns the outputs of a program for these rows, as zeros."""
    return output_shapes(settings, options, slots.shape[0], model.lm_head.get_value().shape[0])


def append_tokens(
    model: CausalLM,
    x: Float[Array, "R D"],
    options: Options,
    settings: Settings,
    state: RowState,
    slots: Int[Array, "R"],
    outputs: Outputs,
) -> tuple[RowState, Outputs]:
    """Samples each row's next token and appends it to the state and the outputs; not to rows that are done.

    A row whose logits are not finite, or of which every token is banned, is done: its log-probability, which is not
    finite either, tells the host.

    Args:
      x: hidden states of the rows' last tokens, before norm_f.
    """

    def sample(rows: tuple[Array, Array]) -> tuple:
        x, slots = rows
        return _sample(model, model.logits(model.norm_f(x)), options, settings, state, slots)

    if options.batch_invariant:
        num_tiles = num_row_tiles(x.shape[0], jnp.abs(slots))
        results, _ = map_row_tiles(lambda _, rows, carry: (sample(rows), carry), (x, slots), None, num_tiles)
    else:
        results = sample((x, slots))
    return _append(state, slots, outputs, results, settings, model.partition)


def append_tokens_of_logits(
    model: CausalLM,
    logits: Float[Array, "R V"],
    options: Options,
    settings: Settings,
    state: RowState,
    slots: Int[Array, "R"],
    outputs: Outputs,
) -> tuple[RowState, Outputs]:
    """Does what :func:`append_tokens` does, from the logits of the rows' last tokens."""
    results = _sample(model, logits, options, settings, state, slots)
    return _append(state, slots, outputs, results, settings, model.partition)


def _sample(
    model: CausalLM, logits: Array, options: Options, settings: Settings, state: RowState, slots: Array
) -> tuple[Array, Array, Any, tuple[Any, Any]]:
    """Returns each row's next token and its log-probability, the most probable tokens, and what is saved."""
    partition = model.partition
    position = take_rows(state.position, slots) + 1
    row_state = Rows(slots, position, take_rows(state.step, slots), state.tokens, state.seen, state.counts)
    scores = process_logits(logits, settings.processors, row_state, jnp.asarray(settings.eos), partition)
    scores = apply_functions(scores, options.functions, row_state, model.config.vocab_size, partition)
    is_usable = can_sample(scores, partition) if changes_logits(settings, options) else None
    token, scores = _next_token(scores, settings, row_state, partition)
    if options.save_scores and options.renormalize:
        scores = log_softmax(scores, partition)
    logprob = log_probability(logits, token, partition)
    if is_usable is not None:
        logprob = jnp.where(is_usable, logprob, jnp.nan)
    top = None
    if settings.wants_top is not None:
        top = top_logprobs(logits, settings.wants_top, slots, options.top_logprobs, partition)
    saved = logits if options.save_logits else None, scores if options.save_scores else None
    return token, logprob, top, saved


def _append(
    state: RowState, slots: Array, outputs: Outputs, results: tuple, settings: Settings, partition: Partition
) -> tuple[RowState, Outputs]:
    token, logprob, *_ = results
    return _updated_state(state, slots, token, logprob, settings, partition), _put_outputs(outputs, *results)


def _next_token(
    scores: Float[Array, "R V"], settings: Settings, rows: Rows, partition: Partition
) -> tuple[Int[Array, "R"], Float[Array, "R V"]]:
    """Returns the next token of each row, and the scores that it was sampled from."""
    sampling = settings.sampling
    if sampling is None:
        return argmax(scores, partition), scores

    def sample(scores: Array) -> tuple[Array, Array]:
        filtered = scale_and_filter(scores, sampling, rows.slots, partition)
        return sample_tokens(filtered, take_rows(sampling.keys, rows.slots), rows.lengths, partition), filtered

    if sampling.do_sample is None:
        return sample(scores)
    do_sample = take_rows(sampling.do_sample, rows.slots)

    def sample_some(scores: Array) -> Array:
        return jnp.where(do_sample, sample(scores)[0], argmax(scores, partition))

    return lax.cond(jnp.any(do_sample), sample_some, lambda scores: argmax(scores, partition), scores), scores


def _updated_state(
    state: RowState, slots: Array, token: Array, logprob: Array, settings: Settings, partition: Partition
) -> RowState:
    """Returns the state with a new token in each row that is not done; the others' are dropped."""
    rows, num_slots = slots.shape[0], state.token.shape[0]
    active = jnp.where(
        is_running(state, slots), slots, num_slots + jnp.arange(rows)
    )  # past the end, where writes are dropped
    position, step = take_rows(state.position, slots) + 1, take_rows(state.step, slots) + 1
    is_eos = jnp.any(token[:, None] == take_rows(settings.eos, slots), axis=1)
    done = is_eos | ~jnp.isfinite(logprob) | (step >= take_rows(state.limit, slots))
    seen, counts = state.seen, state.counts
    if seen is not None:
        seen = seen.at[active, local_ids(token, seen.shape[1], partition)].set(True, mode="drop")
    if counts is not None:
        counts = counts.at[active, local_ids(token, counts.shape[1], partition)].add(1, mode="drop")
    return state._replace(
        token=put_rows(state.token, active, token),
        position=put_rows(state.position, active, position),
        done=put_rows(state.done, active, done),
        step=put_rows(state.step, active, step),
        tokens=state.tokens.at[active, position].set(token, mode="drop"),
        seen=seen,
        counts=counts,
    )


def _put_outputs(outputs: Outputs, token: Array, logprob: Array, top: Any, saved: tuple[Any, Any]) -> Outputs:
    """Writes one step's results at the index outputs.num_steps."""
    step = outputs.num_steps

    def put(array: Any, new: Any, axis: int) -> Any:
        return None if array is None else lax.dynamic_update_index_in_dim(array, new, step, axis)

    top_ids, top_values = (None, None) if top is None else top
    return Outputs(
        num_steps=step + 1,
        tokens=put(outputs.tokens, token, 1),
        logprobs=put(outputs.logprobs, logprob, 1),
        top_ids=put(outputs.top_ids, top_ids, 1),
        top_logprobs=put(outputs.top_logprobs, top_values, 1),
        logits=put(outputs.logits, saved[0], 0),
        scores=put(outputs.scores, saved[1], 0),
    )
