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

MAX_EOS = 8  # ids that can end a row, at most; a fixed shape


class DecodeState(NamedTuple):
    """A batch of B rows between two steps; S is the cache's length."""

    cache: Cache
    token: Int[Array, "B"]  # chosen, and not yet through the model
    position: Int[Array, "B"]  # of that token
    done: Bool[Array, "B"]
    running: Bool[Array, ""]  # whether any row is not done
    step: Int[Array, ""]  # tokens chosen so far
    tokens: Int[Array, "B S"]  # the chosen tokens
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
    row: jax.sharding.PartitionSpec  # one number a row, or a group of rows
    same: jax.sharding.PartitionSpec  # the same on all devices


def program_specs(config, partition: Partition, int8: bool, sampled: bool = False) -> ProgramSpecs:
    """Partition specs for an int8 cache, which has scales, and for sampling, which has random keys."""
    cache = cache_specs(config, partition, int8)
    row, columns, same = (
        partition.array_spec(BATCH_AXES),
        partition.array_spec(BATCH_AXES, None),
        partition.array_spec(),
    )
    vocabulary = partition.array_spec(BATCH_AXES, VOCAB_AXES)
    kinds: Any = (DecodeState, Settings, Sampling)  # of partition specs rather than arrays
    state = kinds[0](cache, row, row, row, same, same, columns, columns, vocabulary)
    settings = kinds[1](kinds[2](*[same] * len(Sampling._fields)), columns if sampled else None, same)
    return ProgramSpecs(cache, vocabulary, state, settings, row, same)


def is_int8(cache: Cache) -> bool:
    return cache[0].key_scale is not None


def _jit_variants(options: dict[str, bool], function: Callable[..., Any], **of_jit: Any) -> dict[bool, Any]:
    """The function compiled with these options of the compiler, under True, and without."""
    function.__name__ = function.__name__.removeprefix("_run_")  # as profiles show it
    return {with_: jax.jit(function, compiler_options=options if with_ else None, **of_jit) for with_ in (True, False)}


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty(config, partition, rows, positions, dtype):
    """A cache, and the place of each row's logits."""
    specs = program_specs(config, partition, dtype == jnp.int8)

    def run():
        vocabulary = partition.pad_vocabulary(config.vocab_size) // partition.size(*VOCAB_AXES)
        logits = jnp.zeros((rows // partition.size(*BATCH_AXES), vocabulary), jnp.float32)
        return create_cache(config, rows, positions, dtype, partition), logits

    return partition.shard_map(run, (), (specs.cache, specs.logits))()


def prefill_chunk(model_state, cache, logits, tokens, at):
    """One chunk of one row of each group of rows, tokens (groups, C).

    `at` (groups, 3) has its row within the group, its first position and how many of its tokens count:
    0 where the group has no more. On one device, or along `expert` and `tensor` alone, there is one group.
    """
    return _prefill_chunk[model_state.platform == "cpu"](model_state, cache, logits, tokens, at)


def _run_prefill_chunk(model_state, cache, logits, tokens, at):
    model = model_state.merge()
    partition, config = model.partition, model.config

    def run(model_state, cache, logits, tokens, at):
        model = model_state.merge()
        row, start, count = at[0]
        place = jnp.arange(tokens.shape[1])[None]
        x, cache = model.forward_with_cache(tokens, place < count, start + place, cache, row)
        last = model.norm_f(lax.dynamic_slice_in_dim(x, jnp.maximum(count - 1, 0), 1, axis=1)[:, 0])
        new = model.logits(last)
        if partition.size(*BATCH_AXES) > 1:
            new = jnp.where(count > 0, new, lax.dynamic_slice(logits, (row, 0), new.shape))
        return cache, lax.dynamic_update_slice(logits, new, (row, 0))

    specs = program_specs(config, partition, is_int8(cache))
    columns = partition.array_spec(BATCH_AXES, None)
    inside = (model_state.specs(), specs.cache, specs.logits, columns, columns)
    return partition.shard_map(run, inside, (specs.cache, specs.logits))(model_state, cache, logits, tokens, at)


_prefill_chunk = _jit_variants(CPU_OPTIONS, _run_prefill_chunk, donate_argnums=(1, 2))


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5,))
def first_token(config, partition, filtered, tiled, settings, cache, logits, prompts, lengths, done):
    """Each row's first new token, after prompts (B, T) of `lengths` (B,) tokens that gave `logits` (B, V).

    Rows that are `done` (B,) from the start only fill the batch.

    Args:
      filtered: whether top-k, top-p or min-p does anything.
      tiled: whether rows are computed in tiles, for bits that do not depend on their number.
    """
    specs = program_specs(config, partition, is_int8(cache), settings.keys is not None)
    columns = partition.array_spec(BATCH_AXES, None)

    def run(settings, cache, logits, prompts, lengths, done):
        rows, positions = prompts.shape
        local = prompts - partition.axis_index(*VOCAB_AXES) * logits.shape[1]
        here = (jnp.arange(prompts.shape[1]) < lengths[:, None]) & (local >= 0)
        local = jnp.where(here, local, logits.shape[1])  # past the end: dropped
        state = DecodeState(
            cache=cache,
            token=jnp.zeros(rows, jnp.int32),
            position=lengths - 1,
            done=done,
            running=jnp.array(True),
            step=jnp.int32(0),
            tokens=jnp.zeros((rows, positions), jnp.int32),
            logprobs=jnp.zeros((rows, positions), jnp.float32),
            seen=jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], local].set(True, mode="drop"),
        )
        return _add_token(settings, state, _sample(logits, filtered, tiled, settings, state, partition), partition)

    inside = (specs.settings, specs.cache, specs.logits, columns, specs.row, specs.row)
    return partition.shard_map(run, inside, specs.state)(settings, cache, logits, prompts, lengths, done)


def decode(model_state, filtered, tiled, settings, state, steps):
    """Up to `steps` more tokens of every row that is not done; `tiled` as in :func:`first_token`."""
    return _decode[_may_reorder_sums(model_state, tiled)](model_state, filtered, tiled, settings, state, steps)


def _may_reorder_sums(model_state: ModelState, tiled: bool) -> bool:
    """Returns whether XLA may reorder sums; not in batch-invariant programs, which need one order."""
    return model_state.platform == "cpu" and not tiled


def _run_decode(model_state, filtered, tiled, settings, state, steps):
    model = model_state.merge()
    partition, config = model.partition, model.config

    def run(model_state, settings, state, steps):
        model = model_state.merge()
        end = state.step + steps

        def body(state: DecodeState) -> DecodeState:
            if tiled:
                x, cache = model.decode_in_row_tiles(state.token, ~state.done, state.position, state.cache)
            else:
                x, cache = model.forward_with_cache(
                    state.token[:, None], ~state.done[:, None], state.position[:, None], state.cache
                )
                x = x[:, 0]
            state = state._replace(cache=cache)
            sampled = _sample(x, filtered, tiled, settings, state, partition, lambda x: model.logits(model.norm_f(x)))
            return _add_token(settings, state, sampled, partition)

        return lax.while_loop(lambda s: (s.step < end) & s.running, body, state)

    specs = program_specs(config, partition, is_int8(state.cache), settings.keys is not None)
    inside = (model_state.specs(), specs.settings, specs.state, specs.same)
    return partition.shard_map(run, inside, specs.state)(model_state, settings, state, steps)


_decode = _jit_variants(CPU_OPTIONS, _run_decode, static_argnums=(1, 2), donate_argnums=4)


def lower(
    model_state: ModelState,
    settings: Settings,
    filtered: bool,
    tiled: bool,
    rows: int,
    positions: int,
    cache_dtype: np.dtype,
    lengths: Sequence[int] | None = None,
) -> Iterator[tuple[str, Any]]:
    """The programs of a generation by name, each lowered for the devices of the model's mesh when it is asked for.

    What takes longest to compile comes first.

    The parameters and settings may be shapes without memory behind them; `rows` and `positions` are
    those of the cache; `lengths` are of the prompts' chunks, the longest by default.
    """
    model = model_state.merge()
    config, partition = model.config, model.partition
    groups = partition.size(*BATCH_AXES)
    specs = program_specs(config, partition, cache_dtype == np.int8, settings.keys is not None)

    def int32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    model_state = partition.abstract(model_state, model_state.specs()) if partition.mesh else model_state
    cache, logits = jax.eval_shape(partial(empty, config, partition, rows, positions, cache_dtype))
    cache, logits = partition.abstract(cache, specs.cache), partition.abstract(logits, specs.logits)
    begin = (int32(rows, positions), int32(rows), jax.ShapeDtypeStruct((rows,), jnp.bool))
    state = jax.eval_shape(partial(first_token, config, partition, filtered, tiled), settings, cache, logits, *begin)
    state = partition.abstract(state, specs.state)
    decode_here = _decode[_may_reorder_sums(model_state, tiled)]
    yield "decode", decode_here.lower(model_state, filtered, tiled, settings, state, int32())
    for length in prefill_chunk_lengths(partition)[-1:] if lengths is None else lengths:
        chunk = int32(groups, length), int32(groups, 3)
        yield (
            f"prefill {length}",
            _prefill_chunk[model_state.platform == "cpu"].lower(model_state, cache, logits, *chunk),
        )
    yield "first_token", first_token.lower(config, partition, filtered, tiled, settings, cache, logits, *begin)
    yield "empty", empty.lower(config, partition, rows, positions, cache_dtype)


class SampledToken(NamedTuple):
    token: Int[Array, "B"]
    logprob: Float[Array, "B"]


def _sample(
    x: Float[Array, "B W"],
    filtered: bool,
    tiled: bool,
    settings: Settings,
    state: DecodeState,
    partition: Partition,
    logits_of: Callable[[Array], Array] = lambda x: x,
) -> SampledToken:
    """Each row's next token, from logits or from what gives them."""

    def pick(rows: tuple) -> SampledToken:
        x, seen, keys, position = rows
        logits = logits_of(x)
        token = sample_tokens(logits, seen, keys, position, settings.sampling, filtered, partition)
        return SampledToken(token, log_probability(logits, token, partition))

    rows = (x, state.seen, settings.keys, _next_position(state))
    if not tiled:
        return pick(rows)
    sampled, _ = map_row_tiles(
        lambda _, rows, carry: (pick(rows), carry), rows, None, num_row_tiles(x.shape[0], state.position)
    )
    return sampled


def _next_position(state: DecodeState) -> Int[Array, "B"]:
    return jnp.where(state.done, state.position, state.position + 1)  # an ended row looks no further


def _add_token(settings: Settings, state: DecodeState, sampled: SampledToken, partition: Partition) -> DecodeState:
    """Notes each row's next token. What it notes for rows that are done, nobody reads."""
    token = sampled.token
    size = state.seen.shape[1]
    local = token - partition.axis_index(*VOCAB_AXES) * size
    local = jnp.where(local >= 0, local, size)  # another device's: dropped
    done = state.done | jnp.any(token[:, None] == settings.eos, axis=1)
    return state._replace(
        token=token,
        position=_next_position(state),
        done=done,
        running=partition.pmax(jnp.any(~done).astype(jnp.int32), *BATCH_AXES) > 0,
        step=state.step + 1,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        logprobs=lax.dynamic_update_slice(state.logprobs, sampled.logprob[:, None], (0, state.step)),
        seen=state.seen.at[jnp.arange(token.shape[0]), local].set(True, mode="drop"),
    )


@partial(jax.jit, static_argnums=0)
def replicate(partition, arrays):
    """Replicates arrays that are split over rows, so that every process can read them."""
    return lax.with_sharding_constraint(arrays, partition.sharding(partition.array_spec()))


def same_on_all_processes(partition: Partition, number: int) -> int:
    """Broadcasts one process' number (32 bits) to all processes of the mesh."""
    if partition.mesh is None or not partition.mesh.is_multi_process:
        return number
    apart = jax.sharding.NamedSharding(partition.mesh, jax.sharding.PartitionSpec(partition.mesh.axis_names))
    numbers = jax.make_array_from_callback((partition.mesh.size,), apart, lambda _: np.array([number], np.uint32))
    return int(np.asarray(replicate(partition, numbers))[0])


@partial(jax.jit, static_argnums=0)
def stop_rows(partition, state_done, stopped):
    """The rows that are done, with those that the host has stopped; and whether any other is left."""
    done = state_done | stopped
    if partition.mesh is not None:
        done = lax.with_sharding_constraint(done, partition.sharding(partition.array_spec(BATCH_AXES)))
    return done, ~done.all()
