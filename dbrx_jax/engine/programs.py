"""Programs: the engine's arrays on the devices, and the programs that change them, called with arrays of the host."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from dbrx_jax.engine.prompt_scores import score_chunk
from dbrx_jax.engine.scheduler import MAX_SEGMENTS
from dbrx_jax.engine.slots import VECTORS, SlotRow, empty_slots, neutral_settings, write_masks, write_slot, write_vector
from dbrx_jax.generation.decode import decode, sample_first
from dbrx_jax.generation.prefill import copy_blocks, empty_cache, prefill_chunk
from dbrx_jax.generation.processes import replicate
from dbrx_jax.generation.state import Options, Outputs, Settings
from dbrx_jax.generation.verify import verify
from dbrx_jax.model.causal_lm import CausalLM
from dbrx_jax.model.graph import split_model

COPIES = 16  # blocks that one program copies
MASKS = 8  # rows whose masks one program writes
Method = TypeVar("Method", bound=Callable[..., Any])
CALLS: dict[str, Callable[..., Any]] = {}  # that process 0 of several may send


def on_all_processes(method: Method) -> Method:
    """Makes a method of Programs send its arguments to the other processes, which make the same call."""
    CALLS[method.__name__] = method

    @wraps(method)
    def call(self: "Programs", *arguments: Any) -> Any:
        if self.send is not None:
            self.send(method.__name__, [np.asarray(array) for array in jax.tree.leaves(arguments)])
        return method(self, *arguments)

    return call  # type: ignore[return-value]


class Programs:
    """Runs programs on the cache, and on the settings and the state of M slots.

    Args:
      num_blocks: of the cache, with the spare one.
      positions: of a row.
      steps: most decode steps of one call.
      top_logprobs: most probable tokens that a row may ask for.

    Attributes:
      send: sends the name and the arrays of a call to other processes; None if they do not follow this one.
    """

    def __init__(
        self,
        model: CausalLM,
        num_blocks: int,
        cache_dtype: np.dtype,
        *,
        slots: int,
        positions: int,
        steps: int,
        batch_invariant: bool,
        top_logprobs: int,
    ):
        self.model_state, self._config, self._partition = split_model(model), model.config, model.partition
        self.num_slots, self.positions = slots, positions
        self.send: Callable[[str, Sequence[np.ndarray]], None] | None = None
        self.mask_width = -(-self._partition.pad_vocabulary(self._config.vocab_size) // 32)
        self.first_options = Options(batch_invariant=batch_invariant, top_logprobs=top_logprobs)
        self.options = self.first_options._replace(steps=steps)
        self.cache = empty_cache(self._config, self._partition, num_blocks, cache_dtype)
        self.settings, self.state = empty_slots(self._config, self._partition, self.options, slots, positions)
        # Hidden states of the last chunk's last tokens (MAX_SEGMENTS, D) and of all its tokens.
        self.last: Any = None
        self.hidden: Any = None

    def write_row(self, row: SlotRow, tokens: Int[np.ndarray, "S"], start: Int[np.ndarray, "4"]) -> None:
        """Puts a row in a slot; see :func:`dbrx_jax.engine.slots.write_slot`."""
        self._write_settings(row.settings, tokens, start)
        for name, vector in row.vectors.items():
            self._write_vector(VECTORS.index(name), start[0], vector)

    @on_all_processes
    def _write_settings(self, settings: Settings, tokens: np.ndarray, start: np.ndarray) -> None:
        self.settings, self.state = write_slot(self._partition, self.settings, self.state, settings, tokens, start)

    @on_all_processes
    def _write_vector(self, index: int, slot: np.ndarray, vector: np.ndarray) -> None:
        self.settings = write_vector(self._partition, VECTORS[index], self.settings, slot, vector)

    @on_all_processes
    def write_masks(self, slots: Int[np.ndarray, "MASKS"], masks: np.ndarray) -> None:
        """Writes masks of the tokens that may come next to slots, padded with M."""
        self.settings = write_masks(self._partition, self.settings, slots, masks)

    @on_all_processes
    def copy(self, pairs: Int[np.ndarray, "1 COPIES 2"]) -> None:
        """Copies blocks of the cache to others."""
        self.cache = copy_blocks(self._config, self._partition, self.cache, pairs)

    @on_all_processes
    def prefill(
        self, table: Int[np.ndarray, "R W"], tokens: Int[np.ndarray, "R T"], spans: Int[np.ndarray, "R 2"]
    ) -> None:
        """Runs a chunk of each of R prompts; :meth:`score` and :meth:`sample_first` use its hidden states."""
        self.cache, last, self.hidden = prefill_chunk(self.model_state, self.cache, table, tokens, spans)
        self.last = pad_segments(self._partition, last)

    @on_all_processes
    def score(self, targets: Int[np.ndarray, "1 T"]) -> tuple[Array, Array, Array]:
        """Returns log-probabilities of what follows the last chunk's tokens; see :func:`score_chunk`."""
        return self._readable(score_chunk(self.model_state, self.options.top_logprobs, self.hidden, targets))

    @on_all_processes
    def sample_first(self, slots: Int[np.ndarray, "R"], segments: Int[np.ndarray, "R"]) -> Outputs:
        """Samples the first token of rows after the prompts at these indices of the last chunk."""
        arrays = self.settings, self.state, slots, self.last, segments
        self.state, outputs = sample_first(self.model_state, self.first_options, *arrays)
        return self._readable(outputs)

    @on_all_processes
    def decode(self, slots: Int[np.ndarray, "R"], table: Int[np.ndarray, "R W"], steps: int) -> Outputs:
        """Adds up to `steps` tokens to rows."""
        arrays = self.settings, self.cache, self.state, slots, table, np.int32(steps)
        self.cache, self.state, outputs = decode(self.model_state, self.options, *arrays)
        return self._readable(outputs)

    @on_all_processes
    def verify(
        self,
        slots: Int[np.ndarray, "R"],
        table: Int[np.ndarray, "R W"],
        proposed: Int[np.ndarray, "R k"],
        num_proposed: Int[np.ndarray, "R"],
    ) -> tuple[Outputs, Array]:
        """Adds a token to rows, and more where proposals are right; also returns the number of new tokens of each."""
        arrays = self.settings, self.cache, self.state, slots, table, proposed, num_proposed
        self.cache, self.state, *results = verify(self.model_state, self.options, *arrays)
        return self._readable(results)

    def follow(self, calls: Iterable[tuple[str, list[np.ndarray]]]) -> None:
        """Makes the calls of process 0, and waits for each once the next has started: its errors must not go unseen."""
        structure = jax.tree.structure((neutral_settings(1), 0, 0))
        before = None
        for name, arrays in calls:
            arguments = jax.tree.unflatten(structure, arrays) if name == "_write_settings" else arrays
            results = CALLS[name](self, *arguments)
            jax.block_until_ready(before)
            before = results
        jax.block_until_ready(before)

    @property
    def replicated(self) -> Any:
        """The sharding of arrays that each device has as a whole; None without a mesh."""
        return None if self._partition.mesh is None else self._partition.sharding(self._partition.array_spec())

    def _readable(self, arrays: Any) -> Any:
        """Returns arrays as every process can read them."""
        return arrays if self._partition.mesh is None else replicate(self._partition, arrays)


@partial(jax.jit, static_argnums=0)
def pad_segments(partition, last):
    """Pads the hidden states of last tokens (R, D) to MAX_SEGMENTS rows, for one program that samples after them."""
    padded = jnp.pad(last, ((0, MAX_SEGMENTS - last.shape[0]), (0, 0)))
    if partition.mesh is not None:
        padded = jax.lax.with_sharding_constraint(padded, partition.sharding(partition.array_spec()))
    return padded
