"""Checks of the kernels on this card against float32 references."""

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
from dbrx_jax.kernels.attention import SHORT_SEQUENCE, cached_attention, select_implementation, sequence_attention
from dbrx_jax.kernels.experts import apply_experts
from dbrx_jax.model.cache import CACHE_BLOCK, quantize_to_int8
from dbrx_jax.ops.attention import merge_partial_attention, reference_attention
from dbrx_jax.ops.experts import ExpertWeights, reference_experts
from dbrx_jax.quantization import Format, QuantizedArray, quantize
from dbrx_jax.sharding.partition import ONE_DEVICE

MAX_ERROR = 2e-2  # of the largest value: in bfloat16 the CPU's own products come to 1.1e-2
# Of a model of two layers in full width: in bfloat16 on a CPU, without any kernel, the largest error was 3.7e-2.
MODEL_ERROR = 6e-2
MODEL_PRECISION = "int4"

Row = dict[str, Any]


class WrongResult(BenchmarkError):
    """A kernel is further from its reference than rounding explains."""


def experts(size: Size) -> Iterator[Row]:
    """Errors of the experts' kernels, for each form of weights and number of tokens.

    Raises:
      WrongResult: one is beyond MAX_ERROR; also from the other checks.
    """
    config = size.config
    shape = (config.moe_num_experts, config.ffn_hidden_size, config.d_model)
    stacked = ONE_DEVICE.expert_arrays(shape[0]) == 1
    for form in ("bfloat16", "int8", "int4-128"):
        drawn: list[Any] = [normal(np.arange(shape[0], dtype=np.uint32) + 100 * i, shape) for i in range(3)]
        if form != "bfloat16":
            drawn = [_quantized(w, form, c) for w, c in zip(drawn, (-1, -1, -2), strict=True)]
        weights = ExpertWeights(*(w if stacked else tuple(w[e] for e in range(shape[0])) for w in drawn))
        for tokens in size.tokens:
            x = jax.random.normal(jax.random.key(tokens), (tokens, config.d_model), jnp.bfloat16)
            scores = jax.random.uniform(jax.random.key(0), (tokens, shape[0]))
            combine_weights, chosen_experts = jax.lax.top_k(scores, config.moe_top_k)
            out = _apply_experts(x, combine_weights, chosen_experts, weights, config.ffn_act_fn)
            want = _experts_in_float32(x, combine_weights, chosen_experts, drawn, config.ffn_act_fn)
            yield _row(f"experts, {form}, {tokens} tokens", out, want)


@partial(jax.jit, static_argnums=4)
def _apply_experts(x: Any, combine_weights: Any, experts: Any, weights: ExpertWeights, activation: str) -> Any:
    return apply_experts(x, combine_weights, experts, weights, activation, platform=ONE_DEVICE.platform)


@partial(jax.jit, static_argnums=(1, 2))
def _quantized(weight: Any, form: str, contracted: int) -> QuantizedArray:
    return quantize(weight, Format.parse(form), (contracted,), jnp.bfloat16)


def _experts_in_float32(x: Any, combine_weights: Any, experts: Any, weights: list[Any], activation: str) -> Any:
    """The definition, an expert at a time to save memory."""
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
    """Errors of attention through the cache, and of whole sequences with their gradients."""
    yield from _cached_attention(size.config)
    yield from _sequence_attention(size.config)


def _cached_attention(config: DbrxConfig) -> Iterator[Row]:
    H, G, K, S = config.n_heads, config.kv_n_heads, config.head_dim, 1024
    implementation = select_implementation(None, ONE_DEVICE.platform)
    attend = partial(
        cached_attention, first_row=0, block=CACHE_BLOCK, platform=ONE_DEVICE.platform, implementation=implementation
    )
    for rows, tokens, length, int8 in ((1, 1, 700, False), (5, 1, 700, True), (1, 256, 500, False), (1, 256, 0, True)):
        keys = jax.random.split(jax.random.key(rows), 3)
        q = jax.random.normal(keys[0], (rows, tokens, H, K), jnp.bfloat16)
        k, v = (jax.random.normal(key, (rows, S, G, K), jnp.bfloat16) for key in keys[1:])
        positions = length + jnp.arange(rows)[:, None] * 3 + jnp.arange(tokens)
        held, scales = [k, v], None
        if int8:
            (k8, of_keys), (v8, of_values) = quantize_to_int8(k), quantize_to_int8(v)
            held, scales = [k8, v8], (of_keys.swapaxes(1, 2), of_values.swapaxes(1, 2))
            k, v = (
                a.astype(jnp.float32) * s[..., None].astype(jnp.float32) for a, s in ((k8, of_keys), (v8, of_values))
            )
        part = jax.jit(attend)(q, *(a.swapaxes(1, 2) for a in held), positions, scales=scales)
        want = _attention_in_float32(q, k, v, jnp.arange(S) <= positions[:, :, None])
        name = f"{implementation} attention, {rows} rows, {tokens} tokens, {'int8' if int8 else 'bfloat16'} cache"
        yield _row(name, merge_partial_attention(part, jnp.float32, ONE_DEVICE), want)


def _attention_in_float32(q: Any, k: Any, v: Any, mask: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return reference_attention(*(a.astype(jnp.float32) for a in (q, k, v)), mask)


def _sequence_attention(config: DbrxConfig) -> Iterator[Row]:
    """Sequences longer than the definition takes in one block, padded left and right, with gradients."""
    H, G, K, T = config.n_heads, config.kv_n_heads, config.head_dim, SHORT_SEQUENCE + 256
    shapes = ((2, T, H, K), (2, T, G, K), (2, T, G, K), (2, T, H, K))
    *qkv, d_out = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    place = jnp.arange(T)
    valid = jnp.stack([place >= 70, place < 900])
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
        want, true = with_gradients(reference_attention, in_float32, mask, valid, d_out)
    yield _row(f"{name} attention, whole sequences", out, want)
    for what, gradient, wanted in zip(("queries", "keys", "values"), gradients, true, strict=True):
        yield _row(f"{name} attention, gradient of {what}", gradient, wanted)


def model(size: Size) -> Iterator[Row]:
    """A whole model of two layers in bfloat16 with kernels beside float32 without, in a process of its own.

    All experts are active: with random weights the scores of the last active expert and the first inactive one
    are so close that rounding swaps them, and then nothing can be compared.
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
    """The float32 results that `model` compares with; the environment has turned kernels off."""
    logits, tokens = _run_model(size, jnp.float32)
    np.savez(path, logits=logits, tokens=tokens)


def _run_model(size: Size, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a prompt (T, V) and the greedy tokens of a ragged batch (B, 24)."""
    config = dataclasses.replace(size.config, n_layers=2, moe_top_k=size.config.moe_num_experts)
    model = random_model(config, MODEL_PRECISION, dtype)
    longest = size.lengths[0]
    mask = np.array([[0] * (longest - n) + [1] * n for n in size.lengths])
    ids = np.random.default_rng(0).integers(0, min(config.vocab_size, 100_000), mask.shape) * mask
    logits = np.asarray(model(ids[:1]))[0]
    out = model.generate(ids, mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
    return logits, np.stack([np.asarray(row)[-24:] for row in out])


def _row(what: str, out: Any, want: Any, largest: float = MAX_ERROR) -> Row:
    out, want = np.asarray(out, np.float32), np.asarray(want, np.float32)
    error = float(np.abs(out - want).max() / np.abs(want).max())
    if not error < largest:
        raise WrongResult(f"{what}: {error:.3g} of the largest value away from the reference; nothing is timed")
    return {"what": what, "error": round(error, 6)}
