"""Quantisation as a published config.json names it, compared with the tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dbrx_jax.checkpoint.stored_tensors import Fp8Tensor, StoredTensor, mlx_description
from dbrx_jax.errors import CheckpointError

KEYS = ("quantization", "quantization_config")  # MLX writes both, others the second
FP8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark")


class QuantizationEntry(NamedTuple):
    """An entry of config.json that says how the tensors are quantised."""

    key: str
    kind: str  # as in StoredTensor.quantization
    mlx: tuple[int, int] | None  # bits and group size of MLX's affine quantisation


def read_entries(path: Path, config: Mapping[str, Any]) -> list[QuantizationEntry]:
    """Reads the entries of a config.json.

    Raises:
      CheckpointError: one of them names a quantisation that is not read here.
    """
    return [_read_entry(f"{path}: {key}", key, config[key]) for key in KEYS if config.get(key) not in (None, {})]


def _read_entry(where: str, key: str, entry: Any) -> QuantizationEntry:
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where}: expected a JSON object, got {entry!r:.80}")
    method = entry.get("quant_method")
    if method in FP8_METHODS:
        return QuantizationEntry(key, Fp8Tensor.quantization, None)
    if method is not None or not {"bits", "group_size"} & entry.keys():
        raise CheckpointError(
            f"{where}: {method or dict(entry)!r:.80} is not among what can be read, MLX's and FP8; "
            "find the weights as plain floats, or delete this entry if they are"
        )
    bits, group = entry.get("bits"), entry.get("group_size")
    known = bits in (2, 4, 8) and group in (32, 64, 128) and entry.get("mode", "affine") == "affine"
    if not known or type(bits) is not int or type(group) is not int:
        raise CheckpointError(
            f"{where}: expected bits 2, 4 or 8 and group_size 32, 64 or 128, in the mode affine, "
            f"got {dict(entry)!r:.80}"
        )
    return QuantizationEntry(key, mlx_description(bits, group), (bits, group))


def check_entries(path: Path, entries: list[QuantizationEntry], stored: Mapping[str, StoredTensor]) -> None:
    """Checks that some tensor is quantised as each entry says.

    Raises:
      CheckpointError: none is; the message names the entry.
    """
    kinds = {tensor.quantization for tensor in stored.values() if tensor.quantization}
    found = " and ".join(sorted(kinds)) or "plain"
    for entry in entries:
        if entry.kind not in kinds:
            raise CheckpointError(
                f"{path}: {entry.key}: says {entry.kind}, and the tensors are {found}; "
                "find the right files, or mend or delete this entry"
            )
