"""The manifest of an Orbax folder, dbrx_jax.json: the configuration and the arrays that it was written with."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import CheckpointError, ConfigError
from dbrx_jax.files import is_remote, read_json

MANIFEST = "dbrx_jax.json"  # written last: its presence marks a complete checkpoint
FORMAT_VERSION = 3
# Folders of these versions record neither their configuration nor their arrays; those of 2 are quantised.
OLDER_VERSIONS = (1, 2)
# The fields of DbrxConfig that decide which function of its weights a model is; the others are the dtype, the limit
# of positions, and what only initialising and training use.
CONFIGURATION = (
    "d_model",
    "n_heads",
    "n_layers",
    "vocab_size",
    "kv_n_heads",
    "clip_qkv",
    "rope_theta",
    "ffn_hidden_size",
    "ffn_act_fn",
    "moe_num_experts",
    "moe_top_k",
    "moe_normalize_expert_weights",
)


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """An array's record in the manifest: its layout, and a digest of each chunk.

    Args:
      chunk_rows: rows of a chunk; the last chunk may have fewer.
      sha256: of the bytes of each chunk's rows, uncompressed and without padding.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    sha256: tuple[str, ...]

    def describes(self, shape: tuple[int, ...], dtype: np.dtype, chunk_rows: int) -> bool:
        """Returns whether an array of this shape and dtype, in chunks of so many rows, is the recorded one."""
        return (self.shape, self.dtype, self.chunk_rows) == (shape, dtype.name, chunk_rows)

    def to_json(self) -> dict[str, Any]:
        """Returns the array's entry in the manifest."""
        return {**dataclasses.asdict(self), "shape": list(self.shape), "sha256": list(self.sha256)}

    @classmethod
    def from_json(cls, entry: Any) -> Self:
        """Reads an entry of the manifest.

        Raises:
          ValueError: it is not one.
        """
        try:
            shape, dtype, rows, digests = (entry[field.name] for field in dataclasses.fields(cls))
            numbers = all(isinstance(n, int) and n > 0 for n in (*shape, rows)) and len(shape) > 0
            texts = all(isinstance(text, str) for text in (dtype, *digests))
            if numbers and texts and len(digests) == -(-shape[0] // rows):
                return cls(tuple(shape), dtype, rows, tuple(digests))
        except (TypeError, KeyError):
            pass
        raise ValueError("not the record of an array")


def configuration_of(config: DbrxConfig) -> dict[str, Any]:
    """Returns the fields of a configuration that the manifest records."""
    return {name: getattr(config, name) for name in CONFIGURATION}


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint's folder.

    Raises:
      CheckpointError: it is damaged, or its format_version is not one that this release reads.
    """
    file = path / MANIFEST
    if not file.exists():
        raise CheckpointError(f"{path}: its manifest {MANIFEST} is missing; copy that too, or convert again")
    try:
        manifest = read_json(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    version = manifest.get("format_version") if isinstance(manifest, Mapping) else None
    if version not in (*OLDER_VERSIONS, FORMAT_VERSION) or isinstance(version, bool):
        raise CheckpointError(
            f"{file}: format_version: expected 1, 2 or {FORMAT_VERSION}, got {version!r:.40}; convert again"
        )
    required = ("configuration", "arrays") if version == FORMAT_VERSION else ()
    for key in ("configuration", "arrays", "not_finite", "sha256"):  # the last is of older versions
        if (key in required or key in manifest) and not isinstance(manifest.get(key), Mapping):
            raise CheckpointError(f"{file}: {key}: expected a JSON object; copy the file again")
    return dict(manifest)


def read_records(path: Path, manifest: Mapping[str, Any]) -> dict[str, ArrayRecord]:
    """Returns the manifest's record of every array; none in older versions of the format.

    Raises:
      CheckpointError: an entry is damaged.
    """
    records = {}
    for name, entry in manifest.get("arrays", {}).items():
        try:
            records[name] = ArrayRecord.from_json(entry)
        except ValueError:
            raise CheckpointError(f"{path / MANIFEST}: arrays: {name}: damaged; copy the file again") from None
    return records


def check_configuration(path: Path, manifest: Mapping[str, Any], config: DbrxConfig) -> None:
    """Checks that config.json is of the model that the folder was written for.

    Raises:
      CheckpointError: a field that changes the model's mathematics has another value.
    """
    recorded = manifest.get("configuration", {})
    for name, value in configuration_of(config).items():
        if name in recorded and recorded[name] != value:
            raise CheckpointError(
                f"{path / 'config.json'}: {name} is {json.dumps(value)}, but {json.dumps(recorded[name])!s:.40} when "
                f"the weights were written; undo that change, or if you mean it run: dbrx-convert seal {path}"
            )


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder, replacing one that is there at once."""
    text = json.dumps(manifest, indent=2) + "\n"
    if is_remote(path):
        (path / MANIFEST).write_text(text)
        return
    partial = path / f"{MANIFEST}.part"
    partial.write_text(text)
    partial.rename(path / MANIFEST)
