"""Random keys of a request's completions, from its seed."""

import secrets
from collections.abc import Sequence

import jax
import numpy as np

from dbrx_jax.errors import GenerationError
from dbrx_jax.generation.sampling import row_keys

NO_KEY = np.zeros(2, np.uint32)  # of rows that draw nothing


def completion_keys(seed: int | Sequence[int] | None, copies: int, do_sample: bool) -> list[np.ndarray]:
    """Returns the random key (2,) of each completion, as :class:`dbrx_jax.engine.request.Request` describes the seed.

    A CPU computes them: another device may be busy with a long step.

    Raises:
      GenerationError: there is not a seed for each completion.
    """
    if isinstance(seed, Sequence) and len(seed) != copies:
        raise GenerationError(f"seed: expected one for each of {copies} completions, got {len(seed)}")
    if not do_sample:
        return [NO_KEY] * copies
    seeds = list(seed) if isinstance(seed, Sequence) else [secrets.randbits(32) if seed is None else seed] * copies
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves out the CPU
        device = None
    numbers = [None if isinstance(seed, Sequence) else np.array([index], np.uint32) for index in range(copies)]
    with jax.default_device(device):
        pairs = zip(seeds, numbers, strict=True)
        return [np.asarray(row_keys(np.array([own], np.uint32), number))[0] for own, number in pairs]
