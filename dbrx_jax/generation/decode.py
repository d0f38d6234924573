"""Device programs of generation: chunked prefill and the decode loop.

On a mesh each function is one program that every device runs on its rows, heads and vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.generation.filters import can_sample, log_softmax
from dbrx_jax.generation.processors import (
    LogitsFunction,
    Processors,
    Rows,
    apply_functions,
    local_ids,
    process_logits,
    processor_specs,
)
from dbrx_jax.generation.sampling import Sampling, argmax, sample_tokens, scale_and_filter
from dbrx_jax.model.cache import Cache, cache_specs, copy_positions, create_cache, prefill_chunk_lengths
from dbrx_jax.model.graph import ModelState
from dbrx_jax.ops.log_probability import log_probability
from dbrx_jax.ops.row_tiles import map_row_tiles, num_row_tiles
from dbrx_jax.ops.small_batch_matmul import CPU_OPTIONS
from dbrx_jax.sharding.partition import BATCH_AXES, VOCAB_AXES, Partition


class DecodeState(NamedTuple):
    """A batch of B rows between two decode steps; S is the cache's length. None where no option needs it."""

    cache: Cache
    token: Int[Array, "B"]  # the last token, not yet in the cache
    position: Int[Array, "B"]  # of that token
    done: Bool[Array, "B"]
    running: Bool[Array, ""]  # whether any row is not done
    step: Int[Array, ""]  # number of new tokens so far
    tokens: Int[Array, "B S"]  # of the prompt and new ones, by position
    logprobs: Float[Array, "B S"]  # of the new tokens, by step
    seen: Bool[Array, "B V"] | None  # tokens in the row
    counts: Int[Array, "B V"] | None  # number of each among the new tokens
    saved_logits: Float[Array, "N B V"] | None  # of the last call's steps, as the model gives them
    saved_scores: Float[Array, "N B V"] | None  # the same after all processing


class Settings(NamedTuple):
    """Settings of the decode loop, as arrays."""

    eos: Int[ArrayLike, "E"]  # end-of-sequence ids, -1 for padding
    processors: Processors = Processors()
    sampling: Sampling | None = None  # None: greedy
    renormalize: ArrayLike | None = None  # any number: saved scores are log-probabilities


class Options(NamedTuple):
    """Static options of the programs: another value compiles them anew."""

    batch_invariant: bool = False  # compute in row tiles, so that no bit of a row's result depends on the batch
    functions: tuple[LogitsFunction, ...] = ()  # the caller's logits processors
    saved_logits: int = 0  # steps of which logits are saved, at least those of one call
    saved_scores: int = 0


def changes_logits(settings: Settings, options: Options) -> bool:
    """Returns whether a processor is on, so that every token may be banned although the model's logits are finite."""
    return bool(options.functions) or any(p is not None for p in settings.processors)


class ProgramSpecs(NamedTuple):
    """Partition specs of the arguments of the device programs."""

    cache: Cache
    logits: jax.sharding.PartitionSpec
    state: DecodeState
    settings: Settings
    vector: jax.sharding.PartitionSpec  # (B,)
    matrix: jax.sharding.PartitionSpec  # (B, N), or a row for each group of rows
    replicated: jax.sharding.PartitionSpec


def program_specs(
    config, partition: Partition, int8: bool, settings: Settings | None = None, options: Options | None = None
) -> ProgramSpecs:
    """Returns the partition specs for an int8 or other cache; without settings, those of greedy decoding."""
    settings, options = settings or Settings(0), options or Options()
    cache, logits = cache_specs(config, partition, int8), partition.array_spec(BATCH_AXES, VOCAB_AXES)
    vector, matrix = partition.array_spec(BATCH_AXES), partition.array_spec(BATCH_AXES, None)
    replicated, saved = partition.array_spec(), partition.array_spec(None, BATCH_AXES, VOCAB_AXES)
    processors = settings.processors
    make_state: Any = DecodeState  # of partition specs rather than arrays
    state = make_state(
        cache=cache,
        token=vector,
        position=vector,
        done=vector,
        running=replicated,
        step=replicated,
        tokens=matrix,
        logprobs=matrix,
        seen=None if processors.repetition_penalty is None else logits,
        counts=None if processors.penalties is None else logits,
        saved_logits=saved if options.saved_logits else None,
        saved_scores=saved if options.saved_scores else None,
    )
    specs = jax.tree.map(lambda _: replicated, settings)
    specs = specs._replace(processors=processor_specs(processors, partition))
    if specs.sampling is not None:
        specs = specs._replace(sampling=specs.sampling._replace(keys=matrix))
    return ProgramSpecs(cache, logits, state, specs, vector, matrix, replicated)


def _is_int8(cache: Cache) -> bool:
    return cache[0].key_scale is not None


def _jit_variants(function: Callable[..., Any], **options: Any) -> dict[bool, Any]:
    """Compiles a function with the compiler options for CPUs, under True, and without them, under False."""
    function.__name__ = function.__name__.removeprefix("_run_")  # as profiles show it
    return {True: jax.jit(function, compiler_options=CPU_OPTIONS, **options), False: jax.jit(function, **options)}


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(config, partition, rows, positions, dtype):
    """Creates an empty cache."""
    specs = cache_specs(config, partition, dtype == jnp.int8)
    return partition.shard_map(lambda: create_cache(config, rows, positions, dtype, partition), (), specs)()


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty_logits(config, partition, rows):
    """Creates the array for the logits of each row's last prompt token, (B, V)."""
    vocabulary = partition.pad_vocabulary(config.vocab_size) // partition.size(*VOCAB_AXES)
    shape = (rows // partition.size(*BATCH_AXES), vocabulary)
    return partition.shard_map(
        lambda: jnp.zeros(shape, jnp.float32), (), partition.array_spec(BATCH_AXES, VOCAB_AXES)
    )()


def prefill_chunk(model_state, cache, tokens, spans):
    """Runs the model on one chunk of one prompt in each group of rows: tokens (groups, C).

    There are as many groups as devices along `data` and `fsdp`. Returns the cache, and the logits (groups, V) of the
    chunks' last tokens.

    Args:
      cache: of one row for each group.
      spans: (groups, 2), the chunk's first position and its number of tokens: 0 if the group has none.
    """
    return _prefill_chunk[model_state.platform == "cpu"](model_state, cache, tokens, spans)


def _run_prefill_chunk(model_state, cache, tokens, spans):
    model = model_state.merge()
    partition, specs = model.partition, program_specs(model.config, model.partition, _is_int8(cache))

    def run(model_state, cache, tokens, spans):
        model = model_state.merge()
        start, num_tokens = spans[0]
        offsets = jnp.arange(tokens.shape[1])[None]
        x, cache = model.forward_with_cache(tokens, offsets < num_tokens, start + offsets, cache)
        last = lax.dynamic_slice_in_dim(x, jnp.maximum(num_tokens - 1, 0), 1, axis=1)[:, 0]
        return cache, model.logits(model.norm_f(last))

    in_specs = (model_state.specs(), specs.cache, specs.matrix, specs.matrix)
    return partition.shard_map(run, in_specs, (specs.cache, specs.logits))(model_state, cache, tokens, spans)


_prefill_chunk = _jit_variants(_run_prefill_chunk, donate_argnums=1)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def insert_chunk(config, partition, length, cache, logits, row_cache, row_logits, targets):
    """Copies a prefilled chunk of `length` positions and its logits from the cache of one row to a row of the batch.

    A program of its own, because on a CPU XLA copies a cache that one program both reads and writes: in this one the
    cost does not depend on the number of rows.

    Args:
      targets: (groups, 3), the row in the batch's group, the chunk's first position, and 1, or 0 to copy nothing.
    """
    specs = program_specs(config, partition, _is_int8(cache))

    def run(cache, logits, row_cache, row_logits, targets):
        row, start, is_used = targets[0]
        cache = copy_positions(row_cache, cache, row, start, length, is_used > 0, partition)
        if partition.size(*BATCH_AXES) > 1:
            row_logits = jnp.where(is_used > 0, row_logits, lax.dynamic_slice(logits, (row, 0), row_logits.shape))
        return cache, lax.dynamic_update_slice(logits, row_logits, (row, 0))

    in_specs = (specs.cache, specs.logits, specs.cache, specs.logits, specs.matrix)
    arrays = (cache, logits, row_cache, row_logits, targets)
    return partition.shard_map(run, in_specs, (specs.cache, specs.logits))(*arrays)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def first_token(config, partition, options, settings, cache, logits, prompts, lengths, done):
    """Samples each row's first new token, after prompts (B, S) of `lengths` (B,) tokens with last logits (B, V).

    Rows that are `done` (B,) from the start are padding of the batch.
    """
    specs = program_specs(config, partition, _is_int8(cache), settings, options)

    def run(settings, cache, logits, prompts, lengths, done):
        rows, positions = prompts.shape

        def saved(steps: int) -> Array | None:
            return jnp.zeros((steps, *logits.shape), jnp.float32) if steps else None

        seen = counts = None
        if settings.processors.repetition_penalty is not None:
            in_prompt = jnp.arange(positions) < lengths[:, None]
            seen = _mark_seen(jnp.zeros(logits.shape, bool), prompts, in_prompt, partition)
        if settings.processors.penalties is not None:
            counts = jnp.zeros(logits.shape, jnp.int32)
        state = DecodeState(
            cache=cache,
            token=jnp.zeros(rows, jnp.int32),
            position=lengths - 1,
            done=done,
            running=jnp.array(True),
            step=jnp.int32(0),
            tokens=prompts,
            logprobs=jnp.zeros((rows, positions), jnp.float32),
            seen=seen,
            counts=counts,
            saved_logits=saved(options.saved_logits),
            saved_scores=saved(options.saved_scores),
        )
        return _append_token(logits, 0, options, settings, state, config.vocab_size, partition)

    in_specs = (specs.settings, specs.cache, specs.logits, specs.matrix, specs.vector, specs.vector)
    return partition.shard_map(run, in_specs, specs.state)(settings, cache, logits, prompts, lengths, done)


def decode(model_state, options, settings, state, steps):
    """Adds up to `steps` tokens to every row that is not done; other arguments as in :func:`first_token`."""
    return _decode[_may_reorder_sums(model_state, options)](model_state, options, settings, state, steps)


def _may_reorder_sums(model_state: ModelState, options: Options) -> bool:
    """Returns whether XLA may reorder sums; not in batch-invariant programs, which need one order."""
    return model_state.platform == "cpu" and not options.batch_invariant


def _run_decode(model_state, options, settings, state, steps):
    model = model_state.merge()
    partition = model.partition

    def run(model_state, settings, state, steps):
        model = model_state.merge()
        start, stop = state.step, state.step + steps

        def head(x: Array) -> Array:
            return model.logits(model.norm_f(x))

        def step(state: DecodeState) -> DecodeState:
            inputs = (state.token, ~state.done, state.position)
            if options.batch_invariant:
                x, cache = model.decode_in_row_tiles(*inputs, state.cache)
            else:
                x, cache = model.forward_with_cache(*(a[:, None] for a in inputs), state.cache)
                x = x[:, 0]
            state = state._replace(cache=cache)
            return _append_token(x, start, options, settings, state, model.config.vocab_size, partition, head)

        return lax.while_loop(lambda state: (state.step < stop) & state.running, step, state)

    specs = program_specs(model.config, partition, _is_int8(state.cache), settings, options)
    in_specs = (model_state.specs(), specs.settings, specs.state, specs.replicated)
    return partition.shard_map(run, in_specs, specs.state)(model_state, settings, state, steps)


_decode = _jit_variants(_run_decode, static_argnums=1, donate_argnums=3)


def lower(
    model_state: ModelState,
    settings: Settings,
    options: Options,
    rows: int,
    positions: int,
    cache_dtype: np.dtype,
    lengths: Sequence[int] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yields each program of a generation with its name, lowered for the devices of the model's mesh when it is needed.

    Programs that take longest to compile come first.

    Args:
      model_state, settings: arrays, or shapes without memory.
      rows, positions: size of the cache.
      lengths: of the prompts' chunks; by default the longest alone.
    """
    model = model_state.merge()
    config, partition = model.config, model.partition
    specs = program_specs(config, partition, cache_dtype == np.int8, settings, options)
    groups = partition.size(*BATCH_AXES)

    def int32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def abstract_cache(num_rows: int) -> tuple[Any, Any]:
        cache = jax.eval_shape(partial(empty_cache, config, partition, num_rows, positions, cache_dtype))
        logits = jax.eval_shape(partial(empty_logits, config, partition, num_rows))
        return partition.abstract(cache, specs.cache), partition.abstract(logits, specs.logits)

    model_state = partition.abstract(model_state, model_state.specs()) if partition.mesh else model_state
    cache, logits = abstract_cache(rows)
    row_cache, row_logits = abstract_cache(groups)
    prompts = (int32(rows, positions), int32(rows), jax.ShapeDtypeStruct((rows,), jnp.bool))
    state = jax.eval_shape(partial(first_token, config, partition, options), settings, cache, logits, *prompts)
    state = partition.abstract(state, specs.state)
    decode_program = _decode[_may_reorder_sums(model_state, options)]
    yield "decode", decode_program.lower(model_state, options, settings, state, int32())
    lengths = prefill_chunk_lengths(partition)[-1:] if lengths is None else lengths
    for length in lengths:
        chunk = int32(groups, length), int32(groups, 2)
        yield f"prefill {length}", _prefill_chunk[model_state.platform == "cpu"].lower(model_state, row_cache, *chunk)
    yield "first_token", first_token.lower(config, partition, options, settings, cache, logits, *prompts)
    for length in lengths:
        arrays = (cache, logits, row_cache, row_logits, int32(groups, 3))
        yield f"insert {length}", insert_chunk.lower(config, partition, length, *arrays)
    for num_rows in (rows, groups):
        yield "empty_cache", empty_cache.lower(config, partition, num_rows, positions, cache_dtype)
    yield "empty_logits", empty_logits.lower(config, partition, rows)


def _append_token(
    x: Float[Array, "B W"],
    first_step: Int[Array, ""] | int,
    options: Options,
    settings: Settings,
    state: DecodeState,
    vocab_size: int,
    partition: Partition,
    head: Callable[[Array], Array] = lambda x: x,
) -> DecodeState:
    """Samples each row's next token and appends it to the state; that of a row that is done is never read.

    A row whose logits are not finite, or of which every token is banned, is done: its log-probability, which is not
    finite either, tells the host.

    Args:
      x: logits (B, V), or hidden states (B, D) that `head` maps to logits.
      first_step: of this call, whose logits are saved from index 0 on.
    """

    def sample(rows: tuple) -> tuple:
        x, keys, row_state = rows
        logits = head(x)
        scores = process_logits(
            logits, settings.processors, row_state, jnp.asarray(settings.eos), state.step, partition
        )
        scores = apply_functions(scores, options.functions, row_state, vocab_size, partition)
        is_usable = can_sample(scores, partition) if changes_logits(settings, options) else None
        if settings.sampling is None:
            token = argmax(scores, partition)
        else:
            scores = scale_and_filter(scores, settings.sampling, partition)
            token = sample_tokens(scores, keys, row_state.lengths, partition)
        if options.saved_scores and settings.renormalize is not None:
            scores = log_softmax(scores, partition)
        saved = logits if options.saved_logits else None, scores if options.saved_scores else None
        logprob = log_probability(logits, token, partition)
        if is_usable is not None:
            logprob = jnp.where(is_usable, logprob, jnp.nan)
        return token, logprob, saved

    position = jnp.where(state.done, state.position, state.position + 1)
    keys = None if settings.sampling is None else settings.sampling.keys
    rows = (x, keys, Rows(state.tokens, position, state.seen, state.counts))
    if options.batch_invariant:
        num_tiles = num_row_tiles(x.shape[0], state.position)
        results, _ = map_row_tiles(lambda _, rows, carry: (sample(rows), carry), rows, None, num_tiles)
    else:
        results = sample(rows)
    token, logprob, saved = results

    def put(array: Array | None, new: Array | None) -> Array | None:
        if array is None or new is None:
            return None
        return lax.dynamic_update_slice(array, new[None], (state.step - first_step, 0, 0))

    done = state.done | jnp.any(token[:, None] == settings.eos, axis=1) | ~jnp.isfinite(logprob)
    at_position = jnp.where(state.done, state.tokens.shape[1], position)  # past the end, which is dropped
    return state._replace(
        token=token,
        position=position,
        done=done,
        running=partition.pmax(jnp.any(~done).astype(jnp.int32), *BATCH_AXES) > 0,
        step=state.step + 1,
        tokens=state.tokens.at[jnp.arange(len(token)), at_position].set(token, mode="drop"),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], (0, state.step)),
        seen=None if state.seen is None else _mark_seen(state.seen, token[:, None], True, partition),
        counts=None if state.counts is None else _count(state.counts, token, partition),
        saved_logits=put(state.saved_logits, saved[0]),
        saved_scores=put(state.saved_scores, saved[1]),
    )


def _mark_seen(
    seen: Bool[Array, "B V"], tokens: Int[Array, "B T"], valid: Bool[Array, "B T"] | bool, partition: Partition
) -> Bool[Array, "B V"]:
    """Marks the valid tokens in this device's shard of the vocabulary."""
    ids = local_ids(jnp.where(valid, tokens, -1), seen.shape[1], partition)
    return seen.at[jnp.arange(seen.shape[0])[:, None], ids].set(True, mode="drop")


def _count(counts: Int[Array, "B V"], token: Int[Array, "B"], partition: Partition) -> Int[Array, "B V"]:
    """Adds 1 to the count of each row's token."""
    return counts.at[jnp.arange(len(token)), local_ids(token, counts.shape[1], partition)].add(1, mode="drop")


@partial(jax.jit, static_argnums=0)
def replicate(partition, arrays):
    """Replicates arrays that are split over rows, so that every process can read them."""
    return lax.with_sharding_constraint(arrays, partition.sharding(partition.array_spec()))


def same_on_all_processes(partition: Partition, number: int) -> int:
    """Returns one process' number (32 bits) on all processes of the mesh."""
    return int(broadcast(partition, np.array(number)))


def broadcast(partition: Partition, numbers: np.ndarray) -> np.ndarray:
    """Returns one process' array of numbers (32 bits) on all processes of the mesh."""
    if partition.mesh is None or not partition.mesh.is_multi_process:
        return numbers
    sharding = jax.sharding.NamedSharding(partition.mesh, jax.sharding.PartitionSpec(partition.mesh.axis_names))
    shape = (partition.mesh.size, *numbers.shape)
    copies = jax.make_array_from_callback(shape, sharding, lambda _: numbers.astype(np.uint32)[None])
    return np.asarray(replicate(partition, copies))[0]


@partial(jax.jit, static_argnums=0)
def stop_rows(partition, done, stopped):
    """Returns the rows that are done once those `stopped` by the host are, and whether any other is left."""
    done = done | stopped
    if partition.mesh is not None:
        done = lax.with_sharding_constraint(done, partition.sharding(partition.array_spec(BATCH_AXES)))
    return done, ~done.all()
