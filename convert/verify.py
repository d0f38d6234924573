"""Compares two checkpoints of either kind, tensor by tensor or by their logits."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from dbrx_jax.checkpoint.copy_rows import Progress, byte_progress
from dbrx_jax.checkpoint.folder import CheckpointFolder, rows_per_block, shape_of
from dbrx_jax.checkpoint.orbax import OrbaxFolder
from dbrx_jax.checkpoint.parameters import parameter_specs
from dbrx_jax.checkpoint.raw_arrays import sha256_of
from dbrx_jax.checkpoint.work_folder import parallel
from dbrx_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference between two checkpoints, of one parameter or one setting."""

    name: str  # of the parameter; or configuration, tokenizer, chat template, generation configuration
    kind: str  # "shape", "dtype" (equal after casting), "values", "missing", or "setting"
    detail: str
    largest: float = 0.0  # |a - b|
    relative: float = 0.0  # the largest |a - b| over the largest |a|
    first: tuple[int, ...] | None = None  # where they first differ, in the published shape


def compare(a: CheckpointFolder, b: CheckpointFolder, progress: Progress | None = None) -> Iterator[Difference]:
    """Yields the parameters that differ, reading a block of rows at a time.

    Values of one dtype are compared as bytes, so NaN equals the same NaN and 0 differs from -0.
    """
    advance = byte_progress(a, progress)
    specs_a, specs_b = parameter_specs(a.config), parameter_specs(b.config)
    for name in {**specs_a, **specs_b}:
        if name not in specs_b or name not in specs_a:
            yield Difference(name, "missing", f"only in the {'first' if name in specs_a else 'second'}")
        elif specs_a[name].shape != specs_b[name].shape:
            yield Difference(name, "shape", f"{specs_a[name].shape} against {specs_b[name].shape}")
        elif difference := _compare_parameter(a, b, name):
            yield difference
        if name in specs_a:
            advance(specs_a[name].size)


def _compare_parameter(a: CheckpointFolder, b: CheckpointFolder, name: str) -> Difference | None:
    """Returns how a parameter's values or, with equal values, dtypes differ; None if neither do."""
    shape = shape_of(a, name)
    dtypes = a.parameter_dtype(name), b.parameter_dtype(name)
    largest = scale = 0.0
    first = None
    step = rows_per_block(shape, max(d.itemsize for d in dtypes))
    for start in range(0, shape[0], step):
        x, y = (f.rows(name, start, min(start + step, shape[0])) for f in (a, b))
        if dtypes[0] == dtypes[1] and x.tobytes() == y.tobytes():
            continue
        x, y = x.astype(np.float32), y.astype(np.float32)
        if dtypes[0] == dtypes[1]:
            different = x.view(np.uint32) != y.view(np.uint32)
        else:
            different = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        if different.any():
            if first is None:
                index = np.unravel_index(int(np.argmax(different)), x.shape)
                first = (int(index[0]) + start, *map(int, index[1:]))
            with np.errstate(invalid="ignore"):
                largest = max(largest, float(np.nanmax(np.abs(x - y), initial=0)))
        scale = max(scale, float(np.nanmax(np.abs(x), initial=0)))
    if first is not None:
        relative = largest / scale if scale else float("inf")
        detail = f"max error {largest:.3g} (relative {relative:.3g}), first at {list(first)}"
        return Difference(name, "values", detail, largest, relative, first)
    if dtypes[0] != dtypes[1]:
        return Difference(name, "dtype", f"{dtypes[0]} against {dtypes[1]}, values equal")
    return None


def summarise(a: CheckpointFolder, settings: Sequence[Difference], parameters: Sequence[Difference]) -> str:
    """Returns one line about the differences of two checkpoints: how many there are, and the largest."""
    total = len(parameter_specs(a.config))
    if not parameters:
        equal = f"every parameter is equal ({total})"
        return equal if settings else f"{equal}; so are configuration, tokenizer, template and generation settings"
    kinds = Counter(d.kind for d in parameters)
    line = f"{len(parameters)} of {total} parameters differ ({', '.join(f'{n} in {k}' for k, n in kinds.items())})"
    worst = max(parameters, key=lambda d: (d.relative, d.largest))
    return f"{line}; the most: {worst.name}, {worst.detail}"


def check_digests(folder: CheckpointFolder, progress: Progress | None = None) -> list[str]:
    """Returns the chunks, such as "lm_head/3.0", whose bytes differ from the manifest's SHA-256 digests.

    Raises:
      CheckpointError: the checkpoint has no digests.
    """
    if not isinstance(folder, OrbaxFolder):
        raise CheckpointError(f"{folder.path}: safetensors have no digests; dbrx-convert to-orbax makes them")
    if not folder.records:
        raise CheckpointError(f"{folder.path}: has no digests; add them with: dbrx-convert seal {folder.path}")
    changed: list[str] = []

    def check(name: str) -> None:
        array = folder.arrays[name]
        for index, rows in enumerate(array.chunks()):
            if sha256_of(rows) != folder.records[name].sha256[index]:
                changed.append(f"{name}/{array.chunk_file(index).name}")
        if progress is not None:
            progress(math.prod(array.shape) * array.dtype.itemsize)

    parallel(check, folder.arrays, None)
    return sorted(changed)


@dataclasses.dataclass(frozen=True)
class LogitAgreement:
    """Agreement of two models' predictions on a text, averaged over its tokens."""

    tokens: int
    kl_nats: float  # KL(first || second) of the next-token distributions
    top_1: float  # share of positions with the same most probable token
    top_5: float  # mean share of the five most probable tokens in common
    router: float  # mean share of chosen experts in common, over layers


def compare_logits(a: str | Path, b: str | Path, ids: Sequence[int]) -> LogitAgreement:
    """Compares the predictions of two models, run in float32 one after the other, on token ids.

    Raises:
      CheckpointError, ConfigError: one of them does not load.
    """
    from dbrx_jax.api import DbrxForCausalLM
    from dbrx_jax.model.forward import CausalLMOutput

    results = []
    for path in (a, b):
        model = DbrxForCausalLM.from_pretrained(path, dtype="float32")
        length = min(model.config.max_seq_len, 512)
        chunks = [ids[i : i + length] for i in range(0, len(ids), length)]
        outputs = [cast(CausalLMOutput, model([chunk], output_router_probs=True)) for chunk in chunks]
        logits = np.concatenate([np.asarray(o.logits[0], np.float64) for o in outputs])
        probs = np.concatenate([np.stack([np.asarray(p[0]) for p in o.router_probs or ()]) for o in outputs], axis=1)
        results.append((logits, np.argsort(-probs, axis=-1, kind="stable")[..., : model.config.moe_top_k]))
    (x, experts_x), (y, experts_y) = results
    if x.shape != y.shape or experts_x.shape != experts_y.shape:
        raise CheckpointError(f"{a} and {b} have different vocabularies, layers or experts per token")
    p, q = map(_log_softmax, (x, y))
    top = [np.argsort(-z, axis=-1)[:, :5] for z in (x, y)]
    return LogitAgreement(
        tokens=len(ids),
        kl_nats=float((np.exp(p) * (p - q)).sum(-1).mean()),
        top_1=float((top[0][:, 0] == top[1][:, 0]).mean()),
        top_5=_in_common(*top),
        router=_in_common(experts_x, experts_y),
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _in_common(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean fraction of the last axis' elements that both have."""
    return float((a[..., :, None] == b[..., None, :]).any(-1).mean())
