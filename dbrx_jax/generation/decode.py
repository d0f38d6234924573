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
from jaxtyping import Bool, Float, Int, UInt32

from dbrx_jax.generation.sampling import Sampling, sample_tokens
from dbrx_jax.model.cache import Cache, cache_specs, create_cache, prefill_chunk_lengths
from dbrx_jax.model.graph import ModelState
from dbrx_jax.ops.log_probability import log_probability
from dbrx_jax.ops.row_tiles import map_row_tiles, num_row_tiles
from dbrx_jax.ops.small_batch_matmul import CPU_OPTIONS
from dbrx_jax.sharding.partition import BATCH_AXES, VOCAB_AXES, Partition

MAX_EOS = 8  # limit of end-of-sequence ids, and the fixed size of their array


class DecodeState(NamedTuple):
    """A batch of B rows between two decode steps; S is the cache's length."""

    cache: Cache
    token: Int[Array, "B"]  # the last token, not yet in the cache
    position: Int[Array, "B"]  # of that token
    done: Bool[Array, "B"]
    running: Bool[Array, ""]  # whether any row is not done
    step: Int[Array, ""]  # number of new tokens so far
    tokens: Int[Array, "B S"]  # the new tokens
    logprobs: Float[Array, "B S"]
    seen: Bool[Array, "B V"]


class Settings(NamedTuple):
    """Settings of the decode loop, as arrays."""

    sampling: Sampling
    keys: UInt32[Array, "B 2"] | None  # None: greedy
    eos: Int[ArrayLike, "8"]


class ProgramSpecs(NamedTuple):
    """Partition specs of the arguments of the device programs."""

    cache: Cache
    logits: jax.sharding.PartitionSpec
    state: DecodeState
    settings: Settings
    vector: jax.sharding.PartitionSpec  # (B,)
    matrix: jax.sharding.PartitionSpec  # (B, N), or a row for each group of rows
    replicated: jax.sharding.PartitionSpec


def program_specs(config, partition: Partition, int8: bool, sampled: bool = False) -> ProgramSpecs:
    """Returns the partition specs for an int8 or other cache, and for sampling or greedy decoding."""
    cache, logits = cache_specs(config, partition, int8), partition.array_spec(BATCH_AXES, VOCAB_AXES)
    vector, matrix = partition.array_spec(BATCH_AXES), partition.array_spec(BATCH_AXES, None)
    replicated = partition.array_spec()
    state = DecodeState._make((cache, vector, vector, vector, replicated, replicated, matrix, matrix, logits))
    sampling = Sampling._make([replicated] * len(Sampling._fields))
    settings = Settings._make((sampling, matrix if sampled else None, replicated))
    return ProgramSpecs(cache, logits, state, settings, vector, matrix, replicated)


def _is_int8(cache: Cache) -> bool:
    return cache[0].key_scale is not None


def _jit_variants(function: Callable[..., Any], **options: Any) -> dict[bool, Any]:
    """Compiles a function with the compiler options for CPUs, under True, and without them, under False."""
    function.__name__ = function.__name__.removeprefix("_run_")  # as profiles show it
    return {True: jax.jit(function, compiler_options=CPU_OPTIONS, **options), False: jax.jit(function, **options)}


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(config, partition, rows, positions, dtype):
    """Creates an empty cache, and the array for the logits of each row's last prompt token."""
    specs = program_specs(config, partition, dtype == jnp.int8)

    def run():
        vocabulary = partition.pad_vocabulary(config.vocab_size) // partition.size(*VOCAB_AXES)
        logits = jnp.zeros((rows // partition.size(*BATCH_AXES), vocabulary), jnp.float32)
        return create_cache(config, rows, positions, dtype, partition), logits

    return partition.shard_map(run, (), (specs.cache, specs.logits))()


def prefill_chunk(model_state, cache, logits, tokens, spans):
    """Runs the model on one chunk of one row of each group of rows: tokens (groups, C).

    A row of `spans` (groups, 3) holds the row's index within its group, the chunk's first position and its number of
    tokens: 0 if the group has none. There are as many groups as devices along `data` and `fsdp`.
    """
    return _prefill_chunk[model_state.platform == "cpu"](model_state, cache, logits, tokens, spans)


def _run_prefill_chunk(model_state, cache, logits, tokens, spans):
    model = model_state.merge()
    partition, specs = model.partition, program_specs(model.config, model.partition, _is_int8(cache))

    def run(model_state, cache, logits, tokens, spans):
        model = model_state.merge()
        row, start, num_tokens = spans[0]
        offsets = jnp.arange(tokens.shape[1])[None]
        x, cache = model.forward_with_cache(tokens, offsets < num_tokens, start + offsets, cache, row)
        last = lax.dynamic_slice_in_dim(x, jnp.maximum(num_tokens - 1, 0), 1, axis=1)[:, 0]
        new = model.logits(model.norm_f(last))
        if partition.size(*BATCH_AXES) > 1:
            new = jnp.where(num_tokens > 0, new, lax.dynamic_slice(logits, (row, 0), new.shape))
        return cache, lax.dynamic_update_slice(logits, new, (row, 0))

    in_specs = (model_state.specs(), specs.cache, specs.logits, specs.matrix, specs.matrix)
    out_specs = (specs.cache, specs.logits)
    return partition.shard_map(run, in_specs, out_specs)(model_state, cache, logits, tokens, spans)


_prefill_chunk = _jit_variants(_run_prefill_chunk, donate_argnums=(1, 2))


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5,))
def first_token(config, partition, filtered, batch_invariant, settings, cache, logits, prompts, lengths, done):
    """Samples each row's first new token, after prompts (B, T) of `lengths` (B,) tokens with last logits (B, V).

    Rows that are `done` (B,) from the start are padding of the batch.

    Args:
      filtered: whether top-k, top-p or min-p is in use.
      batch_invariant: compute rows in row tiles, so that no bit of a row's result depends on the batch.
    """
    specs = program_specs(config, partition, _is_int8(cache), settings.keys is not None)

    def run(settings, cache, logits, prompts, lengths, done):
        rows, positions = prompts.shape
        in_prompt = jnp.arange(positions) < lengths[:, None]
        state = DecodeState(
            cache=cache,
            token=jnp.zeros(rows, jnp.int32),
            position=lengths - 1,
            done=done,
            running=jnp.array(True),
            step=jnp.int32(0),
            tokens=jnp.zeros((rows, positions), jnp.int32),
            logprobs=jnp.zeros((rows, positions), jnp.float32),
            seen=_mark_seen(jnp.zeros(logits.shape, bool), prompts, in_prompt, partition),
        )
        return _append_token(logits, filtered, batch_invariant, settings, state, partition)

    in_specs = (specs.settings, specs.cache, specs.logits, specs.matrix, specs.vector, specs.vector)
    return partition.shard_map(run, in_specs, specs.state)(settings, cache, logits, prompts, lengths, done)


def decode(model_state, filtered, batch_invariant, settings, state, steps):
    """Adds up to `steps` tokens to every row that is not done; other arguments as in :func:`first_token`."""
    return _decode[_may_reorder_sums(model_state, batch_invariant)](
        model_state, filtered, batch_invariant, settings, state, steps
    )


def _may_reorder_sums(model_state: ModelState, batch_invariant: bool) -> bool:
    """Returns whether XLA may reorder sums; not in batch-invariant programs, which need one order."""
    return model_state.platform == "cpu" and not batch_invariant


def _run_decode(model_state, filtered, batch_invariant, settings, state, steps):
    model = model_state.merge()
    partition = model.partition

    def run(model_state, settings, state, steps):
        model = model_state.merge()
        stop = state.step + steps

        def head(x: Array) -> Array:
            return model.logits(model.norm_f(x))

        def step(state: DecodeState) -> DecodeState:
            inputs = (state.token, ~state.done, state.position)
            if batch_invariant:
                x, cache = model.decode_in_row_tiles(*inputs, state.cache)
            else:
                x, cache = model.forward_with_cache(*(a[:, None] for a in inputs), state.cache)
                x = x[:, 0]
            state = state._replace(cache=cache)
            return _append_token(x, filtered, batch_invariant, settings, state, partition, head)

        return lax.while_loop(lambda state: (state.step < stop) & state.running, step, state)

    specs = program_specs(model.config, partition, _is_int8(state.cache), settings.keys is not None)
    in_specs = (model_state.specs(), specs.settings, specs.state, specs.replicated)
    return partition.shard_map(run, in_specs, specs.state)(model_state, settings, state, steps)


_decode = _jit_variants(_run_decode, static_argnums=(1, 2), donate_argnums=4)


def lower(
    model_state: ModelState,
    settings: Settings,
    filtered: bool,
    batch_invariant: bool,
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
    specs = program_specs(config, partition, cache_dtype == np.int8, settings.keys is not None)

    def int32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    model_state = partition.abstract(model_state, model_state.specs()) if partition.mesh else model_state
    cache, logits = jax.eval_shape(partial(empty_cache, config, partition, rows, positions, cache_dtype))
    cache, logits = partition.abstract(cache, specs.cache), partition.abstract(logits, specs.logits)
    prompts = (int32(rows, positions), int32(rows), jax.ShapeDtypeStruct((rows,), jnp.bool))
    state = jax.eval_shape(
        partial(first_token, config, partition, filtered, batch_invariant), settings, cache, logits, *prompts
    )
    state = partition.abstract(state, specs.state)
    decode_program = _decode[_may_reorder_sums(model_state, batch_invariant)]
    yield "decode", decode_program.lower(model_state, filtered, batch_invariant, settings, state, int32())
    prefill_program, groups = _prefill_chunk[model_state.platform == "cpu"], partition.size(*BATCH_AXES)
    for length in prefill_chunk_lengths(partition)[-1:] if lengths is None else lengths:
        chunk = int32(groups, length), int32(groups, 3)
        yield f"prefill {length}", prefill_program.lower(model_state, cache, logits, *chunk)
    yield (
        "first_token",
        first_token.lower(config, partition, filtered, batch_invariant, settings, cache, logits, *prompts),
    )
    yield "empty_cache", empty_cache.lower(config, partition, rows, positions, cache_dtype)


def _append_token(
    x: Float[Array, "B W"],
    filtered: bool,
    batch_invariant: bool,
    settings: Settings,
    state: DecodeState,
    partition: Partition,
    head: Callable[[Array], Array] = lambda x: x,
) -> DecodeState:
    """Samples each row's next token and appends it to the state; that of a row that is done is never read.

    Args:
      x: logits (B, V), or hidden states (B, D) that `head` maps to logits.
    """

    def sample(rows: tuple) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        x, seen, keys, position = rows
        logits = head(x)
        token = sample_tokens(logits, seen, keys, position, settings.sampling, filtered, partition)
        return token, log_probability(logits, token, partition)

    position = jnp.where(state.done, state.position, state.position + 1)
    rows = (x, state.seen, settings.keys, position)
    if batch_invariant:
        num_tiles = num_row_tiles(x.shape[0], state.position)
        (token, logprob), _ = map_row_tiles(lambda _, rows, carry: (sample(rows), carry), rows, None, num_tiles)
    else:
        token, logprob = sample(rows)
    done = state.done | jnp.any(token[:, None] == settings.eos, axis=1)
    return state._replace(
        token=token,
        position=position,
        done=done,
        running=partition.pmax(jnp.any(~done).astype(jnp.int32), *BATCH_AXES) > 0,
        step=state.step + 1,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], (0, state.step)),
        seen=_mark_seen(state.seen, token[:, None], True, partition),
    )


def _mark_seen(
    seen: Bool[Array, "B V"], tokens: Int[Array, "B T"], valid: Bool[Array, "B T"] | bool, partition: Partition
) -> Bool[Array, "B V"]:
    """Marks the valid tokens in this device's shard of the vocabulary."""
    shard_size = seen.shape[1]
    local_ids = tokens - partition.axis_index(*VOCAB_AXES) * shard_size
    local_ids = jnp.where(valid & (local_ids >= 0), local_ids, shard_size)  # ids past the end are dropped
    return seen.at[jnp.arange(seen.shape[0])[:, None], local_ids].set(True, mode="drop")


@partial(jax.jit, static_argnums=0)
def replicate(partition, arrays):
    """Replicates arrays that are split over rows, so that every process can read them."""
    return lax.with_sharding_constraint(arrays, partition.sharding(partition.array_spec()))


def same_on_all_processes(partition: Partition, number: int) -> int:
    """Broadcasts one process' number (32 bits) to all processes of the mesh."""
    if partition.mesh is None or not partition.mesh.is_multi_process:
        return number
    sharding = jax.sharding.NamedSharding(partition.mesh, jax.sharding.PartitionSpec(partition.mesh.axis_names))
    numbers = jax.make_array_from_callback((partition.mesh.size,), sharding, lambda _: np.array([number], np.uint32))
    return int(np.asarray(replicate(partition, numbers))[0])


@partial(jax.jit, static_argnums=0)
def stop_rows(partition, done, stopped):
    """Returns the rows that are done once those `stopped` by the host are, and whether any other is left."""
    done = done | stopped
    if partition.mesh is not None:
        done = lax.with_sharding_constraint(done, partition.sharding(partition.array_spec(BATCH_AXES)))
    return done, ~done.all()
