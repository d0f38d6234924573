"""Describes a checkpoint: kind, sizes, quantisation and problems."""

import math
from pathlib import Path
from typing import Any

from dbrx_jax.checkpoint.copy_rows import not_finite
from dbrx_jax.checkpoint.folder import CheckpointFolder
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.parameters import array_layouts, parameter_specs
from dbrx_jax.errors import CheckpointError, DbrxError
from dbrx_jax.files import location
from dbrx_jax.generation.checkpoint_config import read_generation_config
from dbrx_jax.quantization.formats import part_of
from dbrx_jax.text.tokenizer import DbrxTokenizer


def inspect(path: str | Path, values: bool = False) -> dict[str, Any]:
    """Returns facts about a checkpoint of either kind; `problems` lists what prevents its use.

    Args:
      values: also read every weight and count those that are not finite.

    Raises:
      CheckpointError: there is no such folder.
    """
    if not location(path).is_dir():
        raise CheckpointError(f"{path}: there is no such folder")
    facts: dict[str, Any] = {"path": str(path), "problems": []}
    try:
        folder = open_folder(path)
    except DbrxError as error:
        facts["problems"].append(str(error))
        return facts
    config = folder.config
    dtypes = sorted({str(folder.parameter_dtype(name)) for name in parameter_specs(config)})
    facts |= {
        "kind": folder.description,
        "dtypes": dtypes,
        "bytes": folder.size,
        "files": len(folder.files),
        "parameters": config.total_parameters,
        "active_parameters": config.active_parameters,
        "layers": config.n_layers,
        "d_model": config.d_model,
        "heads": [config.n_heads, config.kv_n_heads],
        "experts": [config.moe_num_experts, config.moe_top_k],
        "ffn_hidden_size": config.ffn_hidden_size,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_seq_len,
    }
    if folder.quantization is not None:
        facts |= {"quantization": str(folder.quantization), "bytes_by_part": _bytes_by_part(folder)}
    try:
        read_generation_config(folder.path)
    except DbrxError as error:
        facts["problems"].append(str(error))
    try:
        tokenizer = DbrxTokenizer.from_pretrained(path)
        facts["tokenizer"] = f"{tokenizer.vocab_size} ids, {len(tokenizer.special_tokens)} of them special"
        if tokenizer.vocab_size > config.vocab_size:
            facts["problems"].append(f"the tokenizer has ids beyond the model's {config.vocab_size}")
    except DbrxError as error:
        facts["tokenizer"] = None
        if str(error) not in facts["problems"]:  # the generation settings have the tokenizer's ids
            facts["problems"].append(str(error))
    if values:
        counts = {name: not_finite(folder, name, folder.parameter_dtype(name)) for name in parameter_specs(config)}
        bad = {name: count for name, count in counts.items() if count}
        facts["not_finite"] = sum(bad.values())
        facts["problems"] += [f"{name}: {count} values are not finite" for name, count in bad.items()]
    return facts


def _bytes_by_part(folder: CheckpointFolder) -> dict[str, int]:
    """Returns the bytes of each part of a model that a :class:`Quantization` distinguishes, and of the rest."""
    result: dict[str, int] = {}
    arrays = array_layouts(folder.config, None, folder.quantization, folder.dtype())
    for name, array in arrays.items():
        part = part_of(name) or "routers and norms"
        nbytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf, _ in array.leaves())
        result[part] = result.get(part, 0) + nbytes
    return result
