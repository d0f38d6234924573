"""The dtype to load a checkpoint in whose tensors have several."""

import functools
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dbrx_jax.config import stated_dtype
from dbrx_jax.files import read_json


def common_dtype(folder: Path, dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns the dtype to load a checkpoint's tensors in, given the dtype of each.

    If they differ it is the one that config.json names, or without that the least that holds all their values; a
    warning says which.
    """
    counts = Counter(dtypes)
    if len(counts) == 1:
        return next(iter(counts))
    stated = stated_dtype(read_json(folder / "config.json"))
    target = np.dtype(functools.reduce(jnp.promote_types, counts) if stated is None else jnp.dtype(stated))
    found = " and ".join(f"{dtype} ({count})" for dtype, count in counts.most_common())
    reason = "the least that holds their values" if stated is None else "as config.json says"
    warnings.warn(
        f"{folder}: has tensors of {found}; all are loaded as {target}, {reason}. dtype chooses another.", stacklevel=3
    )
    return target
