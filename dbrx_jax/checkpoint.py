"""Loading a model from a folder: one that dbrx-convert wrote, or a Hugging Face folder."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from dbrx_jax.config import DTYPES
from dbrx_jax.convert.folder import CheckpointFolder, open_folder
from dbrx_jax.convert.layouts import stored_shape
from dbrx_jax.errors import CheckpointError
from dbrx_jax.generation_config import GenerationConfig
from dbrx_jax.hub import checkpoint_folder
from dbrx_jax.model.causal_lm import DbrxForCausalLM
from dbrx_jax.parameters import ParameterSpec, model_from_parameters, parameter_specs
from dbrx_jax.tokenizer import stop_tokens

READERS = 4  # threads


def load_model(path: str | Path, dtype: DTypeLike | None = None) -> DbrxForCausalLM:
    """As :meth:`DbrxForCausalLM.from_pretrained`."""
    path = checkpoint_folder(path)
    if dtype is not None and str(np.dtype(dtype)) not in DTYPES:
        raise CheckpointError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    folder = open_folder(path)
    target = np.dtype(folder.dtype() if dtype is None else dtype)
    specs = parameter_specs(folder.config)
    with ThreadPoolExecutor(READERS) as pool:
        arrays = pool.map(lambda name: _read(folder, name, specs[name], target), specs)
        parameters = dict(zip(specs, arrays, strict=True))
    config = dataclasses.replace(folder.config, dtype=target.name)
    model = model_from_parameters(config, parameters)
    model.generation_config = _generation_config(path)
    return model


def _read(folder: CheckpointFolder, name: str, spec: ParameterSpec, dtype: np.dtype) -> jax.Array:
    """One parameter on the default device; on a CPU, where it was read to."""
    rows = folder.rows(name, 0, stored_shape(spec)[0])
    return jax.device_put(np.ascontiguousarray(rows.astype(dtype, copy=False)).reshape(spec.shape))


def _generation_config(path: Path) -> GenerationConfig:
    """generation_config.json's, and what it does not say from the tokenizer's configuration."""
    file = path / "generation_config.json"
    given = GenerationConfig.from_file(file) if file.exists() else GenerationConfig()
    eos, pad = stop_tokens(path)
    return GenerationConfig(given.eos_token_ids or eos, pad if given.pad_token_id is None else given.pad_token_id)
