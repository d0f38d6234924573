"""The part of generation that runs on the device: prompts in chunks, and the loop that adds a token at a time."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Key

from dbrx_jax.cache import Cache, create
from dbrx_jax.sampling import Sampling, choose

MOST_EOS = 8  # ids that can end a row, at most; a fixed shape


class DecodeState(NamedTuple):
    """A batch of B rows between two steps; S is the cache's length."""

    cache: Cache
    token: Int[Array, "B"]  # chosen, and not yet through the model
    position: Int[Array, "B"]  # of that token
    done: Bool[Array, "B"]
    step: Int[Array, ""]  # tokens chosen so far
    tokens: Int[Array, "B S"]  # the chosen tokens
    logprobs: Float[Array, "B S"]
    seen: Bool[Array, "B V"]


class Settings(NamedTuple):
    """What the loop needs to know, as arrays."""

    sampling: Sampling
    keys: Key[Array, "B"] | None  # None: greedy
    eos: Int[ArrayLike, "8"]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(config, rows, positions, dtype):
    """A cache, and the place of each row's logits."""
    return create(config, rows, positions, dtype), jnp.zeros((rows, config.vocab_size), jnp.float32)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def prefill_chunk(graph, params, cache, logits, tokens, at):
    """One chunk (1, C) of one row; `at` is its row, its first position and how many of its tokens count."""
    model = nnx.merge(graph, params)
    row, start, count = at
    place = jnp.arange(tokens.shape[1])[None]
    x, cache = model.extend(tokens, place < count, start + place, cache, row)
    last = model.norm_f(lax.dynamic_slice_in_dim(x, count - 1, 1, axis=1)[:, 0])
    return cache, lax.dynamic_update_slice(logits, model.logits(last), (row, 0))


@partial(jax.jit, static_argnums=0, donate_argnums=(2,))
def first_token(filtered, settings, cache, logits, seen, lengths):
    """Each row's first new token, after prompts of `lengths` (B,) tokens that gave `logits` (B, V)."""
    rows, positions = lengths.shape[0], cache[0].key.shape[2]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(rows, jnp.int32),
        position=lengths - 1,
        done=jnp.zeros(rows, bool),
        step=jnp.int32(0),
        tokens=jnp.zeros((rows, positions), jnp.int32),
        logprobs=jnp.zeros((rows, positions), jnp.float32),
        seen=seen,
    )
    return _add_token(filtered, settings, state, logits)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def decode(graph, filtered, params, settings, state, steps):
    """Up to `steps` more tokens of every row that is not done."""
    model = nnx.merge(graph, params)
    end = state.step + steps

    def body(state: DecodeState) -> DecodeState:
        x, cache = model.extend(state.token[:, None], ~state.done[:, None], state.position[:, None], state.cache)
        logits = model.logits(model.norm_f(x[:, 0]))
        return _add_token(filtered, settings, state._replace(cache=cache), logits)

    return lax.while_loop(lambda s: (s.step < end) & ~s.done.all(), body, state)


def _add_token(filtered: bool, settings: Settings, state: DecodeState, logits: Float[Array, "B V"]) -> DecodeState:
    """Chooses each row's next token and notes it. What it notes for rows that are done, nobody reads."""
    position = jnp.where(state.done, state.position, state.position + 1)  # an ended row looks no further
    token = choose(logits, state.seen, settings.keys, position, settings.sampling, filtered)
    rows = jnp.arange(token.shape[0])
    logprob = logits[rows, token] - jax.nn.logsumexp(logits, axis=-1)
    ended = jnp.any(token[:, None] == settings.eos, axis=1)
    return state._replace(
        token=token,
        position=position,
        done=state.done | ended,
        step=state.step + 1,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], (0, state.step)),
        seen=state.seen.at[rows, token].set(True),
    )
