"""Records the configuration and the arrays of an Orbax folder, which has been changed on purpose, in its manifest."""

import hashlib
from pathlib import Path
from typing import Any

from dbrx_jax.checkpoint.copy_rows import Progress
from dbrx_jax.checkpoint.folder import PLAN
from dbrx_jax.checkpoint.manifest import FORMAT_VERSION, ArrayRecord, configuration_of, write_manifest
from dbrx_jax.checkpoint.orbax import FLOATS, PARAMS, OrbaxFolder, StoredArray, is_orbax
from dbrx_jax.checkpoint.orbax_metadata import write_orbax_metadata
from dbrx_jax.checkpoint.raw_arrays import bytes_of, count_not_finite, sha256_of
from dbrx_jax.checkpoint.work_folder import parallel
from dbrx_jax.errors import CheckpointError
from dbrx_jax.files import location


def seal(path: str | Path, arrays: bool = False, progress: Progress | None = None) -> list[str]:
    """Writes the manifest of an Orbax folder anew, after checking that config.json fits the arrays.

    Adds digests of arrays that have none, as in folders of older versions of the format.

    Args:
      path: a local folder or URL.
      arrays: accept changed bytes of arrays too: read all of them, and record their digests as they are now.
      progress: called with the number of bytes read since the last call.

    Returns what the manifest recorded otherwise before: fields of the configuration, and names of arrays.

    Raises:
      CheckpointError: this is not a complete Orbax folder, its arrays do not fit config.json, or an array without
        a record is not what its older digest says.
      ConfigError: config.json is missing or cannot be used.
    """
    path = location(path)
    if not is_orbax(path) or (path / PLAN).exists():
        raise CheckpointError(f"{path}: not a complete Orbax folder of dbrx-convert's")
    folder = OrbaxFolder.open(path, check_manifest=False)
    older_digests = {} if arrays else folder.manifest.get("sha256", {})
    records: dict[str, ArrayRecord] = {}
    bad = {name: count for name, count in folder.manifest.get("not_finite", {}).items() if name in folder.arrays}

    def record(name: str) -> None:
        array, known = folder.arrays[name], folder.records.get(name)
        if arrays or known is None or not known.describes(array.shape, array.dtype, array.chunk_rows):
            records[name], bad[name] = _record(array, older_digests.get(name))
        else:
            records[name] = known
        if progress is not None:
            progress(array.row_bytes * array.shape[0])

    parallel(record, folder.arrays, None)
    if records.keys() != folder.records.keys():
        write_orbax_metadata(path / PARAMS, records)
    configuration, recorded = configuration_of(folder.config), folder.manifest.get("configuration", {})
    counts = {name: bad[name] for name in sorted(bad) if bad[name]}
    manifest: dict[str, Any] = {k: v for k, v in folder.manifest.items() if k not in ("sha256", "not_finite")}
    manifest |= {
        **({"not_finite": counts} if counts else {}),
        "format_version": FORMAT_VERSION,
        "parameters": folder.config.total_parameters,
        "configuration": configuration,
        "arrays": {name: records[name].to_json() for name in sorted(records)},
    }
    write_manifest(path, manifest)
    fields = [name for name, value in configuration.items() if recorded.get(name) != value]
    names = folder.records.keys() | records.keys()
    return fields + sorted(name for name in names if folder.records.get(name) != records.get(name))


def _record(array: StoredArray, older_digest: str | None) -> tuple[ArrayRecord, int]:
    """Reads an array and makes its record; returns this with the number of its infinite or NaN values.

    Raises:
      CheckpointError: its bytes are not those of an older manifest's digest, which is of the whole array.
    """
    whole, digests, count = hashlib.sha256(), [], 0
    for rows in array.chunks():
        digests.append(sha256_of(rows))
        if array.dtype in FLOATS.values():
            count += count_not_finite(rows)
        if older_digest is not None:
            whole.update(bytes_of(rows))
    if older_digest is not None and whole.hexdigest() != older_digest:
        raise CheckpointError(f"{array.folder}: its bytes are not what was written; copy it or convert again")
    return ArrayRecord(array.shape, array.dtype.name, array.chunk_rows, tuple(digests)), count
