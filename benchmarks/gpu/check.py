"""Checks the kernels on this GPU against float32 references."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.sizes import FULL, Size, normal, random_model
from benchmarks.record import ROOT, BenchmarkError
from dbrx_jax.backend import KERNELS_VARIABLE
from dbrx_jax.config import DbrxConfig
from dbrx_jax.kernels.attention import (
    SHORT_SEQUENCE,
    cached_attention,
    select_implementation,
    sequence_attention,
    write_and_attend,
)
from dbrx_jax.kernels.dispatch import expert_kernels
from dbrx_jax.kernels.experts import apply_experts
from dbrx_jax.model.cache import CACHE_BLOCK, quantize_to_int8
from dbrx_jax.ops.attention import merge_partial_attention, reference_attention
from dbrx_jax.ops.experts import ExpertWeights, reference_experts
from dbrx_jax.ops.norm import layer_norm
from dbrx_jax.ops.routing import route
from dbrx_jax.quantization import Format, QuantizedArray, quantize
from dbrx_jax.sharding.partition import ONE_DEVICE

MAX_ERROR = 2e-2  # relative to the largest value; matmuls of a CPU in bfloat16 reach 1.1e-2
# Likewise for two layers in full width, which reach 3.7e-2 in bfloat16 on a CPU without kernels.
MODEL_ERROR = 6e-2
MODEL_PRECISION = "int4"

Row = dict[str, Any]


class WrongResult(BenchmarkError):
    """A kernel differs from its reference by more than rounding explains."""


def experts(size: Size) -> Iterator[Row]:
    """Yields errors of the experts' kernels for each weight format and number of tokens.

    Raises:
      WrongResult: an error exceeds MAX_ERROR; the other checks raise it too.
    """
    config = size.config
    shape = (config.moe_num_experts, config.ffn_hidden_size, config.d_model)
    stacked = ONE_DEVICE.expert_arrays(shape[0]) == 1
    for format in ("bfloat16", "int8", "int4-128"):
        arrays: list[Any] = [normal(np.arange(shape[0], dtype=np.uint32) + 100 * i, shape) for i in range(3)]
        if format != "bfloat16":
            arrays = [_quantized(w, format, c) for w, c in zip(arrays, (-1, -1, -2), strict=True)]
        weights = ExpertWeights(*(w if stacked else tuple(w[e] for e in range(shape[0])) for w in arrays))
        for tokens in size.tokens:
            x = jax.random.normal(jax.random.key(tokens), (tokens, config.d_model), jnp.bfloat16)
            scores = jax.random.uniform(jax.random.key(0), (tokens, shape[0]))
            combine_weights, chosen_experts = jax.lax.top_k(scores, config.moe_top_k)
            out = _apply_experts(x, combine_weights, chosen_experts, weights, config.ffn_act_fn)
            expected = _experts_in_float32(x, combine_weights, chosen_experts, arrays, config.ffn_act_fn)
            yield _row(f"experts, {format}, {tokens} tokens", out, expected)
    yield from _norm_route(config)


def _norm_route(config: DbrxConfig) -> Iterator[Row]:
    """Yields errors of the kernel of norm and routing, where there is one: of its norm, and of its experts' weights."""
    kernels, D, E = expert_kernels(ONE_DEVICE.platform), config.d_model, config.moe_num_experts
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = (jax.random.normal(key, (4, D), jnp.bfloat16) for key in keys[:2])
    scale = jax.random.uniform(keys[2], (D,), jnp.bfloat16)
    router = jax.random.normal(keys[3], (E, D), jnp.bfloat16) * D**-0.5
    module: Any = None if kernels is None else kernels.norm_route
    if module is None or not module.supports(x, router, 1):
        return
    run = jax.jit(lambda *arrays: module.norm_route(*arrays, jnp.bool_(True), 0, E, E, 1, None))
    total, normed, _, chosen = run(x, y, scale, router)
    yield _row("residual of a token", total, (x + y)[:1])
    expected = layer_norm((x + y)[:1].astype(jnp.float32), scale)
    yield _row("norm of a token", normed, expected)
    with jax.default_matmul_precision("highest"):
        probs = route(expected @ router.astype(jnp.float32).T, E, 1).probs[0]
    yield _row("weights of a token's experts", chosen.combine_weights[:, 0], probs[chosen.active])


@partial(jax.jit, static_argnums=4)
def _apply_experts(x: Any, combine_weights: Any, experts: Any, weights: ExpertWeights, activation: str) -> Any:
    return apply_experts(x, combine_weights, experts, weights, activation, platform=ONE_DEVICE.platform)


@partial(jax.jit, static_argnums=(1, 2))
def _quantized(weight: Any, format: str, contracted: int) -> QuantizedArray:
    return quantize(weight, Format.parse(format), (contracted,), jnp.bfloat16)


def _experts_in_float32(x: Any, combine_weights: Any, experts: Any, weights: list[Any], activation: str) -> Any:
    """Computes the reference in float32, one expert at a time to save memory."""
    with jax.default_matmul_precision("highest"):
        return sum(
            _one_expert(x.astype(jnp.float32), combine_weights, experts, e, tuple(w[e] for w in weights), activation)
            for e in range(weights[0].shape[0])
        )


@partial(jax.jit, static_argnums=5)
def _one_expert(x: Any, combine_weights: Any, experts: Any, expert: int, weights: Any, activation: str) -> Any:
    def in_float32(w: Any) -> Any:
        return w.dequantize(jnp.float32) if isinstance(w, QuantizedArray) else w.astype(jnp.float32)

    alone = ExpertWeights(*(in_float32(w)[None] for w in weights))
    share = jnp.where(experts == expert, combine_weights, 0).sum(axis=1, keepdims=True)
    return reference_experts(x, share, jnp.zeros_like(share, jnp.int32), alone, activation)


def attention(size: Size) -> Iterator[Row]:
    """Yields errors of attention over the cache, and of whole sequences with gradients."""
    yield from _cached_attention(size.config)
    yield from _sequence_attention(size.config)


def _cached_attention(config: DbrxConfig) -> Iterator[Row]:
    H, G, K, S = config.n_heads, config.kv_n_heads, config.head_dim, 1024
    implementation = select_implementation(None, ONE_DEVICE.platform)
    attend = partial(cached_attention, platform=ONE_DEVICE.platform, implementation=implementation)
    for rows, tokens, length, int8 in ((1, 1, 700, False), (5, 1, 700, True), (3, 256, 500, False), (1, 256, 0, True)):
        keys = jax.random.split(jax.random.key(rows), 3)
        q = jax.random.normal(keys[0], (rows, tokens, H, K), jnp.bfloat16)
        k, v = (jax.random.normal(key, (rows, S, G, K), jnp.bfloat16) for key in keys[1:])
        positions = length + jnp.arange(rows)[:, None] * 3 + jnp.arange(tokens)
        table = 1 + jax.random.permutation(keys[0], rows * S // CACHE_BLOCK).reshape(rows, -1)
        cache = [k, v]
        if int8:
            (k8, key_scale), (v8, value_scale) = quantize_to_int8(k), quantize_to_int8(v)
            cache = [k8, v8, key_scale, value_scale]
            k = k8.astype(jnp.float32) * key_scale[..., None].astype(jnp.float32)
            v = v8.astype(jnp.float32) * value_scale[..., None].astype(jnp.float32)
        key, value, *scales = (_in_blocks(a, table) for a in cache)
        part = jax.jit(attend)(q, key, value, positions, table, scales=tuple(scales) or None)
        expected = _attention_in_float32(q, k, v, jnp.arange(S) <= positions[:, :, None])
        name = f"{implementation} attention, {rows} rows, {tokens} tokens, {'int8' if int8 else 'bfloat16'} cache"
        yield _row(name, merge_partial_attention(part, jnp.float32, ONE_DEVICE), expected)
        if tokens == 1 and not int8:
            yield from _token_attention(q, k, v, positions, table, expected, implementation)


def _token_attention(
    q: Any, k: Any, v: Any, positions: Any, table: Any, expected: Any, implementation: str
) -> Iterator[Row]:
    """Yields errors of attention that writes its token to the cache, which has NaNs there before, and of the cache."""
    rows = jnp.arange(len(q))[:, None]
    new = [x[rows, positions] for x in (k, v)]
    pools = [_in_blocks(x.at[rows, positions].set(jnp.nan), table) for x in (k, v)]
    run = jax.jit(partial(write_and_attend, platform=ONE_DEVICE.platform, implementation=implementation))
    result = run(q, *new, *pools, positions, jnp.ones_like(positions, bool), table)
    if result is None:  # no kernel does both
        return
    part, *written = result
    yield _row("attention that writes its token", merge_partial_attention(part, jnp.float32, ONE_DEVICE), expected)
    for what, pool, x in zip(("keys", "values"), written, (k, v), strict=True):
        yield _row(f"the {what} that it wrote", pool[table], _in_blocks(x, table)[table])


def _in_blocks(array: Any, table: Any) -> Any:
    """Returns an array (R, S, G, …) as a pool of cache blocks (N, G, P, …), with NaNs in the spare block."""
    blocks = array.reshape(-1, CACHE_BLOCK, *array.shape[2:]).swapaxes(1, 2)
    pool = jnp.full(
        (len(blocks) + 1, *blocks.shape[1:]), jnp.nan if jnp.issubdtype(array.dtype, jnp.floating) else 9, array.dtype
    )
    return pool.at[table.reshape(-1)].set(blocks)


def _attention_in_float32(q: Any, k: Any, v: Any, mask: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return reference_attention(*(a.astype(jnp.float32) for a in (q, k, v)), mask)


def _sequence_attention(config: DbrxConfig) -> Iterator[Row]:
    """Yields errors for sequences longer than SHORT_SEQUENCE, padded left and right, with gradients."""
    H, G, K, T = config.n_heads, config.kv_n_heads, config.head_dim, SHORT_SEQUENCE + 256
    shapes = ((2, T, H, K), (2, T, G, K), (2, T, G, K), (2, T, H, K))
    *qkv, d_out = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    position = jnp.arange(T)
    valid = jnp.stack([position >= 70, position < 900])
    mask = jnp.tril(jnp.ones((T, T), bool)) & valid[:, None]
    d_out = d_out * valid[:, :, None, None]

    @partial(jax.jit, static_argnums=0)
    def with_gradients(attention: Any, qkv: Any, seen: Any, valid: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, seen), *qkv)
        return out * valid[:, :, None, None], pull(d_out.astype(out.dtype))

    name = select_implementation(None, ONE_DEVICE.platform)

    def kernel(q: Any, k: Any, v: Any, valid: Any) -> Any:
        return sequence_attention(q, k, v, valid=valid, implementation=name, platform=ONE_DEVICE.platform)

    out, gradients = with_gradients(kernel, qkv, valid, valid, d_out)
    with jax.default_matmul_precision("highest"):
        in_float32 = [a.astype(jnp.float32) for a in qkv]
        expected, expected_gradients = with_gradients(reference_attention, in_float32, mask, valid, d_out)
    yield _row(f"{name} attention, whole sequences", out, expected)
    for what, *pair in zip(("queries", "keys", "values"), gradients, expected_gradients, strict=True):
        yield _row(f"{name} attention, gradient of {what}", *pair)


def model(size: Size) -> Iterator[Row]:
    """Yields the error of a model of two layers in bfloat16 against float32 without kernels, in another process.

    All experts are active, because random weights give router scores so close that rounding changes the top k.
    """
    toy = ["--toy"] if size is not FULL else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.npz"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", "reference-model", "--output", str(path), *toy]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {KERNELS_VARIABLE: "0"})
        with np.load(path) as file:
            reference = dict(file)
    logits, tokens = _run_model(size, jnp.bfloat16)
    row = _row(f"logits of two layers, {MODEL_PRECISION}", logits, reference["logits"], MODEL_ERROR)
    yield row | {"greedy_tokens_the_same": round(float((tokens == reference["tokens"]).mean()), 4)}


def write_reference_model(size: Size, path: Path) -> None:
    """Writes the float32 results that `model` compares with; the environment disables kernels."""
    logits, tokens = _run_model(size, jnp.float32)
    np.savez(path, logits=logits, tokens=tokens)


def _run_model(size: Size, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits of a prompt (T, V), and greedy tokens of a ragged batch and of its first row, (B + 1, 24)."""
    config = dataclasses.replace(size.config, n_layers=2, moe_top_k=size.config.moe_num_experts)
    model = random_model(config, MODEL_PRECISION, dtype)
    longest = size.lengths[0]
    mask = np.array([[0] * (longest - n) + [1] * n for n in size.lengths])
    ids = np.random.default_rng(0).integers(0, min(config.vocab_size, 100_000), mask.shape) * mask
    logits = np.asarray(model(ids[:1]))[0]
    rows = []
    for count in (len(ids), 1):  # a single row has kernels of its own
        out = model.generate(ids[:count], mask[:count], max_new_tokens=24, do_sample=False, eos_token_id=None)
        rows += [np.asarray(row)[-24:] for row in out]
    return logits, np.stack(rows)


def _row(what: str, out: Any, expected: Any, max_error: float = MAX_ERROR) -> Row:
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    error = float(np.abs(out - expected).max() / np.abs(expected).max())
    if not error < max_error:
        raise WrongResult(f"{what}: {error:.3g} of the largest value away from the reference; nothing is timed")
    return {"what": what, "error": round(error, 6)}
