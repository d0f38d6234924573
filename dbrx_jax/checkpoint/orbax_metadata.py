"""Orbax's own metadata of a tree of arrays, made by Orbax: it saves tiny ones, whose metadata files are copied."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import jax
import numpy as np

from dbrx_jax.checkpoint.parameters import nest
from dbrx_jax.errors import CheckpointError

_SAVE = "import json, sys; from dbrx_jax.checkpoint.orbax_metadata import save_skeleton as save; "
_SAVE += "save(sys.argv[1], json.load(sys.stdin))"


def write_orbax_metadata(path: Path, names: Collection[str]) -> None:
    """Writes Orbax's metadata for arrays of these names, which are in folders of their own."""
    with tempfile.TemporaryDirectory() as temporary:
        skeleton = Path(temporary) / path.name
        if jax.process_count() == 1:
            save_skeleton(skeleton, names)
        else:
            _save_in_another_process(skeleton, names)
        for file in sorted(skeleton.rglob("*")):
            parts = file.relative_to(skeleton).parts
            is_of_array = len(parts) > 2 and parts[1] in names
            if file.is_file() and not is_of_array:
                target = path.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())


def save_skeleton(path: str | Path, names: Iterable[str]) -> None:
    """Saves a tree of arrays with one element each with Orbax."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = False
    context.array.saving.use_compression = False
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns that a checkpoint without OCDBT has no OCDBT
    try:
        with context:
            ocp.save(path, nest({name: np.zeros(1, np.float32) for name in names}))
    finally:
        logger.setLevel(level)


def _save_in_another_process(path: Path, names: Collection[str]) -> None:
    """Saves the tree where no other processes are known: Orbax would wait for those of a run, which do not save."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _SAVE, str(path)]
    done = subprocess.run(command, input=json.dumps([*names]), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(f"{path}: Orbax cannot save there: {(done.stderr.splitlines() or ['it failed'])[-1]}")
