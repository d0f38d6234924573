"""Slots: settings and state of the engine's rows on the devices, with all options of generation on for each.

A program for the slots serves rows with any options: an option that a row does not use has a neutral value in its slot,
and one that no row of a step uses is not computed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.filters import Filters, Nucleus
from dbrx_jax.generation.processors import CountPenalties, LengthPenalty, Processors, Sequences, local_ids
from dbrx_jax.generation.sampling import Sampling
from dbrx_jax.generation.settings import make_settings
from dbrx_jax.generation.state import Options, RowState, Settings, state_specs
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.sharding.partition import VOCAB_AXES, Partition

MAX_EOS = 32  # end-of-sequence ids of a row
MAX_SEQUENCES, MAX_SEQUENCE = 64, 16  # bad words and biases of several tokens of a row, and tokens of one
VECTORS = ("bias", "forced_eos", "suppressed_first")  # with an entry for each token of the vocabulary
NEVER = np.iinfo(np.int32).max


class SlotRow(NamedTuple):
    """Settings of one row, as numpy arrays with a leading dimension of 1."""

    settings: Settings  # without vectors
    vectors: dict[str, np.ndarray]  # those that the row uses, (1, V)


def neutral_settings(vocabulary: int) -> Settings:
    """Returns the settings of a greedy row without options, and without vectors."""

    def value(number: float, dtype: Any) -> np.ndarray:
        return np.array([number], dtype)

    no_sequences = Sequences(
        np.full((1, MAX_SEQUENCES, MAX_SEQUENCE), -1, np.int32),
        np.zeros((1, MAX_SEQUENCES), np.int32),
        np.zeros((1, MAX_SEQUENCES), np.float32),
    )
    processors = Processors(
        sequence_bias=no_sequences,
        repetition_penalty=value(1, np.float32),
        penalties=CountPenalties(value(0, np.float32), value(0, np.float32)),
        no_repeat_ngram_size=value(0, np.int32),
        bad_words=no_sequences,
        min_new_tokens=value(0, np.int32),
        last_step=value(-1, np.int32),
        length_penalty=LengthPenalty(value(NEVER, np.int32), value(1, np.float32)),
        allowed=np.full((1, -(-vocabulary // 32)), 0xFFFFFFFF, np.uint32),
        used=value(0, np.int32),
    )
    filters = Filters(
        Nucleus(value(vocabulary, np.int32), value(1, np.float32), value(0, np.float32)),
        typical_p=value(1, np.float32),
        epsilon_cutoff=value(0, np.float32),
        eta_cutoff=value(0, np.float32),
    )
    sampling = Sampling(np.zeros((1, 2), np.uint32), value(1, np.float32), filters, do_sample=np.array([False]))
    return Settings(np.full((1, MAX_EOS), -1, np.int32), processors, sampling, wants_top=np.array([False]))


def make_row(
    config: GenerationConfig,
    vocab_size: int,
    prompt_length: int,
    limit: int,
    key: np.ndarray,
    wants_top: bool,
    is_constrained: bool,
    partition: Partition,
) -> SlotRow:
    """Returns the settings of a row with these options.

    Args:
      limit: most new tokens.
      key: the row's random key (2,).
      wants_top: whether the most probable tokens of each step are needed.
      is_constrained: whether masks of the tokens that may come next will be written.

    Raises:
      GenerationError: an id is not in the vocabulary, or an option has more entries than a slot holds.
    """
    keys = key[None] if config.do_sample else None
    given = make_settings(config, vocab_size, prompt_length, limit, keys, partition)
    _check_sizes(config)
    neutral = neutral_settings(partition.pad_vocabulary(vocab_size))
    p, base = given.processors, neutral.processors
    bias = [np.asarray(v) for v in (p.bias, p.bad_tokens, p.suppressed) if v is not None]
    forced = p.forced_eos if p.suppressed is None or p.forced_eos is None else p.forced_eos + p.suppressed
    vectors = {"bias": sum(bias) if bias else None, "forced_eos": forced, "suppressed_first": p.suppressed_first}
    fields = {name: getattr(p, name) for name in Processors._fields if name not in VECTORS}
    fields |= {"sequence_bias": _padded(p.sequence_bias), "bad_words": _padded(p.bad_words)}
    fields |= {"bad_tokens": None, "suppressed": None}
    is_used = {name: value is not None for name, value in {**fields, **vectors}.items()} | {"allowed": is_constrained}
    used = sum(is_used.get(name, False) << i for i, name in enumerate(Processors._fields))
    processors = base._replace(**{n: v for n, v in fields.items() if v is not None}, used=np.array([used], np.int32))
    sampling = neutral.sampling
    assert sampling is not None
    if given.sampling is not None:
        chosen = {n: v for n, v in given.sampling.filters._asdict().items() if v is not None}
        filters = sampling.filters._replace(**chosen)
        sampling = Sampling(given.sampling.keys, given.sampling.temperature, filters, np.array([True]))
    eos = np.full((1, MAX_EOS), -1, np.int32)
    ids = np.asarray(given.eos)
    eos[:, : ids.shape[1]] = ids
    settings = Settings(eos, processors, sampling, np.array([wants_top]))
    return SlotRow(settings, {name: np.asarray(v) for name, v in vectors.items() if v is not None})


def _check_sizes(config: GenerationConfig) -> None:
    """Raises GenerationError if an option has more entries than a slot holds."""
    if len(config.eos_token_id) > MAX_EOS:
        raise GenerationError(f"eos_token_id: expected at most {MAX_EOS} ids, got {len(config.eos_token_id)}")
    for name, value in (("sequence_bias", config.sequence_bias or {}), ("bad_words_ids", config.bad_words_ids)):
        sequences = [ids for ids in value if len(ids) > 1]
        if len(sequences) > MAX_SEQUENCES:
            raise GenerationError(f"{name}: expected at most {MAX_SEQUENCES} sequences, got {len(sequences)}")
        if (longest := max(map(len, sequences), default=0)) > MAX_SEQUENCE:
            raise GenerationError(f"{name}: expected sequences of at most {MAX_SEQUENCE} tokens, got {longest}")


def _padded(sequences: Sequences | None) -> Sequences | None:
    """Pads the arrays of sequences to the sizes of a slot."""
    if sequences is None:
        return None
    ids, lengths, bias = (np.asarray(a) for a in sequences)
    more = MAX_SEQUENCES - lengths.shape[1]
    widths = ((0, 0), (0, more), (0, MAX_SEQUENCE - ids.shape[2]))
    pads = ((0, 0), (0, more))
    return Sequences(np.pad(ids, widths, constant_values=-1), np.pad(lengths, pads), np.pad(bias, pads))


def empty_slots(
    config: DbrxConfig, partition: Partition, options: Options, slots: int, positions: int
) -> tuple[Settings, RowState]:
    """Creates the settings and the state of slots without rows, on the devices."""
    settings = _empty_settings(config, partition, slots)
    return settings, _empty_state(config, partition, options, slots, positions)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_settings(config, partition, slots):
    vocabulary = partition.pad_vocabulary(config.vocab_size)
    settings = jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), slots, axis=0), neutral_settings(vocabulary))
    vectors = {name: jnp.zeros((slots, vocabulary), jnp.float32) for name in VECTORS}
    settings = settings._replace(processors=settings.processors._replace(**vectors))
    if partition.mesh is not None:
        specs = state_specs(settings, Options(), partition).settings
        shardings = jax.tree.map(partition.sharding, specs)
        settings = jax.tree.map(jax.lax.with_sharding_constraint, settings, shardings)
    return settings


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty_state(config, partition, options, slots, positions):
    vocabulary = partition.pad_vocabulary(config.vocab_size) // partition.size(*VOCAB_AXES)
    specs = state_specs(_abstract_settings(config, partition, slots), options, partition).state

    def create() -> RowState:
        zeros = jnp.zeros(slots, jnp.int32)
        return RowState(
            token=zeros,
            position=zeros,
            done=jnp.ones(slots, bool),
            step=zeros,
            limit=zeros,
            tokens=jnp.zeros((slots, positions), jnp.int32),
            seen=jnp.zeros((slots, vocabulary), bool),
            counts=jnp.zeros((slots, vocabulary), jnp.int32),
        )

    return partition.shard_map(create, (), specs)()


def _abstract_settings(config: DbrxConfig, partition: Partition, slots: int) -> Settings:
    return jax.eval_shape(partial(_empty_settings, config, partition, slots))


class SlotStart(NamedTuple):
    """Numbers of a row before its next token."""

    slot: int
    length: int  # of its tokens
    step: int  # of these that are new
    limit: int  # of new ones


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def write_slot(partition, settings, state, row, tokens, start):
    """Puts a row without vectors in a slot.

    Args:
      row: settings, each array with a leading dimension of 1.
      tokens: (S,), of the prompt and new ones so far.
      start: int32 (4,), the fields of SlotStart.
    """
    specs = state_specs(settings, Options(), partition)
    row_specs = jax.tree.map(lambda _: partition.array_spec(), row)
    run = partition.shard_map(
        partial(_write_slot, partition),
        (specs.settings, specs.state, row_specs, *[partition.array_spec()] * 2),
        (specs.settings, specs.state),
    )
    return run(settings, state, row, tokens, start)


def _write_slot(partition: Partition, settings: Settings, state: RowState, row: Settings, tokens: Array, start: Array):
    slot, length, step, limit = start

    def put(array: Array, value: ArrayLike) -> Array:
        return array.at[slot].set(value)

    assert state.seen is not None
    assert state.counts is not None
    vectors = {name: getattr(settings.processors, name) for name in VECTORS}
    small = settings._replace(processors=settings.processors._replace(**dict.fromkeys(VECTORS)))
    small = jax.tree.map(lambda array, value: put(array, value[0]), small, row)
    settings = small._replace(processors=small.processors._replace(**vectors))
    index, size = jnp.arange(len(tokens)), state.counts.shape[1]
    ids = local_ids(tokens, size, partition)
    seen = jnp.zeros(size, bool).at[jnp.where(index < length, ids, size)].set(True, mode="drop")
    is_new = (index >= length - step) & (index < length)
    counts = jnp.zeros(size, jnp.int32).at[jnp.where(is_new, ids, size)].add(1, mode="drop")
    return settings, RowState(
        token=put(state.token, 0),
        position=put(state.position, length - 1),
        done=put(state.done, False),
        step=put(state.step, step),
        limit=put(state.limit, limit),
        tokens=put(state.tokens, tokens),
        seen=put(state.seen, seen),
        counts=put(state.counts, counts),
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def write_vector(partition, name, settings, slot, vector):
    """Writes a vector (1, V) of a row to its slot; `name` is one of VECTORS."""
    array = getattr(settings.processors, name).at[slot].set(vector[0])
    if partition.mesh is not None:
        spec = partition.array_spec(None, VOCAB_AXES)
        array = jax.lax.with_sharding_constraint(array, partition.sharding(spec))
    return settings._replace(processors=settings.processors._replace(**{name: array}))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def write_masks(partition, settings, slots, masks):
    """Writes masks (R, W) of the tokens that may come next to slots (R,); a slot M is none."""
    allowed = settings.processors.allowed.at[slots].set(masks, mode="drop")
    if partition.mesh is not None:
        allowed = jax.lax.with_sharding_constraint(allowed, partition.sharding(partition.array_spec()))
    return settings._replace(processors=settings.processors._replace(allowed=allowed))
