"""State and settings of the rows that are generated, as the device programs take them.

Programs run on slots: a row of the state has a number, and a program gets the numbers of the rows that it runs. Each
array of the settings has a dimension of M slots in front, or of 1 if all rows share a value.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from dbrx_jax.generation.processors import LogitsFunction, Processors, local_ids, processor_specs
from dbrx_jax.generation.sampling import Sampling
from dbrx_jax.sharding.partition import BATCH_AXES, VOCAB_AXES, Partition


class RowState(NamedTuple):
    """M rows between two decode steps; S positions. None where no option needs it."""

    token: Int[Array, "M"]  # the last token, not yet in the cache
    position: Int[Array, "M"]  # of that token
    done: Bool[Array, "M"]
    step: Int[Array, "M"]  # number of new tokens so far
    limit: Int[Array, "M"]  # of new tokens, after which the row is done
    tokens: Int[Array, "M S"]  # of the prompt and new ones, by position
    seen: Bool[Array, "M V"] | None  # tokens in the row, for the repetition penalty
    counts: Int[Array, "M V"] | None  # number of each among the new tokens, for the other penalties


class Settings(NamedTuple):
    """Settings of the rows, as arrays: another value compiles nothing anew."""

    eos: Int[ArrayLike, "M E"]  # end-of-sequence ids, -1 for padding
    processors: Processors = Processors()
    sampling: Sampling | None = None  # None: all rows are greedy
    wants_top: Bool[ArrayLike, "M"] | None = None  # rows that need the most probable tokens


class Options(NamedTuple):
    """Static options of the programs: another value compiles them anew."""

    steps: int = 1  # most decode steps of one call
    batch_invariant: bool = False  # compute in row tiles, so that no bit of a row's result depends on the batch
    functions: tuple[LogitsFunction, ...] = ()  # the caller's logits processors
    save_logits: bool = False  # as the model gives them
    save_scores: bool = False  # the same after all processing
    renormalize: bool = False  # saved scores are log-probabilities
    top_logprobs: int = 0  # number of the most probable tokens to return


class Outputs(NamedTuple):
    """New tokens of R rows from one call of up to N steps; undefined behind a row's end."""

    num_steps: Int[Array, ""]  # that were run
    tokens: Int[Array, "R N"]
    logprobs: Float[Array, "R N"]  # in nats, of the logits as the model gives them
    top_ids: Int[Array, "R N n"] | None
    top_logprobs: Float[Array, "R N n"] | None
    logits: Float[Array, "N R V"] | None
    scores: Float[Array, "N R V"] | None


def changes_logits(settings: Settings, options: Options) -> bool:
    """Returns whether a processor is on, so that every token may be banned although the model's logits are finite."""
    return bool(options.functions) or any(p is not None for p in settings.processors)


def output_shapes(settings: Settings, options: Options, rows: int, vocabulary: int) -> Outputs:
    """Returns the outputs of one call for `rows` rows, as zeros."""

    def saved(is_saved: bool) -> Array | None:
        return jnp.zeros((options.steps, rows, vocabulary), jnp.float32) if is_saved else None

    top = (rows, options.steps, options.top_logprobs) if settings.wants_top is not None else None
    return Outputs(
        num_steps=jnp.int32(0),
        tokens=jnp.zeros((rows, options.steps), jnp.int32),
        logprobs=jnp.zeros((rows, options.steps), jnp.float32),
        top_ids=None if top is None else jnp.zeros(top, jnp.int32),
        top_logprobs=None if top is None else jnp.zeros(top, jnp.float32),
        logits=saved(options.save_logits),
        scores=saved(options.save_scores),
    )


class StateSpecs(NamedTuple):
    """Partition specs of what the programs take and return."""

    state: Any
    settings: Any
    outputs: Any


def state_specs(settings: Settings, options: Options, partition: Partition) -> StateSpecs:
    """Returns the partition specs of rows with these settings: rows are split over BATCH_AXES."""
    vector, matrix = partition.array_spec(BATCH_AXES), partition.array_spec(BATCH_AXES, None)
    logits, replicated = partition.array_spec(BATCH_AXES, VOCAB_AXES), partition.array_spec()
    cube, saved = partition.array_spec(BATCH_AXES, None, None), partition.array_spec(None, BATCH_AXES, VOCAB_AXES)
    processors = settings.processors
    make_state: Any = RowState  # of partition specs rather than arrays
    state = make_state(
        **dict.fromkeys(("token", "position", "done", "step", "limit"), vector),
        tokens=matrix,
        seen=None if processors.repetition_penalty is None else logits,
        counts=None if processors.penalties is None else logits,
    )
    make_outputs: Any = Outputs
    top = None if settings.wants_top is None else cube
    outputs = make_outputs(
        num_steps=replicated,
        tokens=matrix,
        logprobs=matrix,
        top_ids=top,
        top_logprobs=top,
        logits=saved if options.save_logits else None,
        scores=saved if options.save_scores else None,
    )

    def row_spec(array: Any) -> PartitionSpec:
        return vector if jnp.shape(array)[0] > 1 else replicated

    specs = jax.tree.map(row_spec, settings)._replace(processors=processor_specs(processors, partition))
    return StateSpecs(state, specs, outputs)


@partial(jax.jit, static_argnums=(0, 1, 2))
def start_rows(config, partition, options, settings, prompts, lengths, limits):
    """Returns the state of rows before their first new token, after prompts (B, S) of `lengths` (B,) tokens.

    Args:
      limits: most new tokens of each row (B,); 0 for rows that pad the batch, which are done from the start.
    """
    specs = state_specs(settings, options, partition)

    def run(prompts, lengths, limits):
        rows, positions = prompts.shape
        vocabulary = partition.pad_vocabulary(config.vocab_size) // partition.size(*VOCAB_AXES)
        seen = counts = None
        if settings.processors.repetition_penalty is not None:
            in_prompt = jnp.arange(positions) < lengths[:, None]
            ids = local_ids(jnp.where(in_prompt, prompts, -1), vocabulary, partition)
            seen = jnp.zeros((rows, vocabulary), bool).at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")
        if settings.processors.penalties is not None:
            counts = jnp.zeros((rows, vocabulary), jnp.int32)
        zeros = jnp.zeros(rows, jnp.int32)
        return RowState(zeros, lengths - 1, limits == 0, zeros, limits, prompts, seen, counts)

    vector, matrix = partition.array_spec(BATCH_AXES), partition.array_spec(BATCH_AXES, None)
    return partition.shard_map(run, (matrix, vector, vector), specs.state)(prompts, lengths, limits)


@partial(jax.jit, static_argnums=0)
def end_rows(partition, done, ended):
    """Returns the rows that are done (M,) once those `ended` by the host are."""
    done = done | ended
    if partition.mesh is not None:
        done = lax.with_sharding_constraint(done, partition.sharding(partition.array_spec(BATCH_AXES)))
    return done
