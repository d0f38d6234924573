"""132B on one H200: checked against the references first, then measured, with random weights made on the card.

    python -m benchmarks.h200 [--toy] [--part check|decode|prefill|load|peer] [--precision int4|int8]

Writes results/h200.json after each figure, so that a run that is cut short leaves what it has. `--toy` runs
all but the peer on a tiny model on whatever device there is. The peer is a model of four layers in full
width, beside transformers 4.57.6 on the same card (DBRX_TRANSFORMERS_PYTHON; torch with CUDA there).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import roofline
from benchmarks.checkpoints import cache_folder, write_random
from benchmarks.commands import Decode as Compared
from benchmarks.machine import Machine, best_seconds, measure
from benchmarks.options import random_prompts
from benchmarks.record import RESULTS, ROOT, stamp, write
from benchmarks.workers import serve
from benchmarks.workers.ours import Ours
from dbrx_jax import decoding
from dbrx_jax.cache import CACHE_BLOCK, capacity, chunk_lengths, to_int8
from dbrx_jax.config import DbrxConfig
from dbrx_jax.console import say
from dbrx_jax.model.causal_lm import DbrxForCausalLM, split
from dbrx_jax.ops.attention import (
    SHORT_SEQUENCE,
    cached_attention,
    chosen,
    join_stripes,
    reference_attention,
    sequence_attention,
)
from dbrx_jax.ops.experts import ExpertWeights, apply_experts, reference_experts
from dbrx_jax.parameters import model_from_arrays, placed_arrays
from dbrx_jax.plan import Setting, fits, memory
from dbrx_jax.quantization import Format, Quantization, QuantizedArray, quantize
from dbrx_jax.sampling import Sampling
from dbrx_jax.sharding import ONE_DEVICE
from dbrx_jax.targets import TARGETS
from dbrx_jax.xla_settings import own_process

PARTS = ("check", "decode", "prefill", "load", "peer")
LARGEST_ERROR = 2e-2  # of the largest value: in bfloat16 the CPU's own products come to 1.1e-2


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured."""

    config: DbrxConfig
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int  # of decoding, timed together
    prompt: int
    checked: tuple[int, ...]  # numbers of tokens
    users: int
    together: int  # users at most
    peer: DbrxConfig | None


FULL = DbrxConfig.from_name("132b-instruct")
H200 = Size(
    FULL,
    ("int4", "int8"),
    (1, 4, 16, 64),
    (1024, 8192, 32768),
    steps=64,
    prompt=2048,
    checked=(1, 7, 64, 600),
    users=20,
    together=4,
    peer=dataclasses.replace(FULL, n_layers=4),
)
TOY = Size(
    dataclasses.replace(
        DbrxConfig.from_name("demo"), d_model=64, n_heads=4, kv_n_heads=2, n_layers=1, ffn_hidden_size=96
    ),
    ("int8",),
    (1, 3),
    (128,),
    steps=4,
    prompt=96,
    checked=(1, 90),
    users=2,
    together=2,
    peer=None,
)


def random_model(config: DbrxConfig, precision: str) -> DbrxForCausalLM:
    """Weights of about the published deviation, drawn as they are stored: nothing larger is ever made."""
    quantization = None if precision == "bfloat16" else Quantization.parse(precision)
    arrays: dict[str, Any] = {}
    for number, (name, placed) in enumerate(placed_arrays(config, None, quantization, jnp.bfloat16).items()):
        key = jax.random.key(number)
        if not isinstance(placed.value, QuantizedArray):
            norm = ".norm_" in name or name.startswith("norm_f")
            arrays[name] = jnp.ones(placed.shape, jnp.bfloat16) if norm else _normal(key, placed.shape)
            continue
        values, scale = placed.value.values, placed.value.scale
        deviation = 73.9 if values.dtype == jnp.int8 else 4.6  # of whole numbers that are all equally frequent
        arrays[name] = dataclasses.replace(
            placed.value,
            values=_bits(key, values.shape).view(values.dtype),
            scale=jnp.full(scale.shape, config.initializer_range / deviation, jnp.bfloat16),
        )
    return model_from_arrays(config, arrays, None, quantization=quantization)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (FULL.initializer_range * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)


def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random bytes; of a stack one after the other, to save memory."""
    if len(shape) < 3:
        return jax.random.bits(key, shape, jnp.uint8)
    return jax.lax.map(lambda k: jax.random.bits(k, shape[1:], jnp.uint8), jax.random.split(key, shape[0]))


# Whether it is right.


def check(size: Size) -> dict[str, float]:
    """Error of each path on this device, of the largest value, against its reference in float32.

    Ends the run where one is beyond LARGEST_ERROR.
    """
    errors = dict(_experts_errors(size)) | dict(_attention_errors(size.config))
    if wrong := [name for name, error in errors.items() if not error < LARGEST_ERROR]:
        sys.exit(f"{', '.join(wrong)}: not what the reference gives; nothing is measured")
    return errors


def _experts_errors(size: Size) -> Iterator[tuple[str, float]]:
    config = size.config
    platform, (E, F, D) = ONE_DEVICE.platform, (config.moe_num_experts, config.ffn_hidden_size, config.d_model)
    stacked = ONE_DEVICE.expert_arrays(E) == 1
    for text in ("bfloat16", "int8", "int4-128"):
        keys = jax.random.split(jax.random.key(1), 3)
        drawn = [_normal(key, (E, F, D)) for key in keys]
        if text != "bfloat16":
            drawn = [_quantized(w, text, c) for w, c in zip(drawn, (-1, -1, -2), strict=True)]
        weights = ExpertWeights(*(w if stacked else tuple(w[e] for e in range(E)) for w in drawn))
        for tokens in size.checked:
            x = jax.random.normal(jax.random.key(tokens), (tokens, D), jnp.bfloat16)
            scores = jax.random.uniform(jax.random.key(0), (tokens, E))
            mix, experts = jax.lax.top_k(scores, config.moe_top_k)
            out = jax.jit(lambda *a: apply_experts(*a, config.ffn_act_fn, platform=platform))(x, mix, experts, weights)
            want = _reference(x, mix, experts, drawn, config.ffn_act_fn)
            yield f"experts, {text}, {tokens} tokens", _error(out, want)


@jax.jit
def _one_expert(x, mix, experts, e, weights):
    w1, v1, w2 = (
        w.dequantize(jnp.float32) if isinstance(w, QuantizedArray) else w.astype(jnp.float32) for w in weights
    )
    one = ExpertWeights(w1[None], v1[None], w2[None])
    chosen = jnp.where(experts == e, mix, 0).sum(axis=1, keepdims=True)
    return reference_experts(x, chosen, jnp.zeros_like(chosen, jnp.int32), one, "silu")


@partial(jax.jit, static_argnums=(1, 2))
def _quantized(weight: Any, text: str, contracted: int) -> QuantizedArray:
    return quantize(weight, Format.parse(text), (contracted,), jnp.bfloat16)


def _reference(x: Any, mix: Any, experts: Any, weights: list[Any], activation: str) -> Any:
    """The definition, an expert at a time to save memory."""
    assert activation == "silu"
    with jax.default_matmul_precision("highest"):
        return sum(
            _one_expert(x.astype(jnp.float32), mix, experts, e, tuple(w[e] for w in weights))
            for e in range(weights[0].shape[0])
        )


def _attention_errors(config: DbrxConfig) -> Iterator[tuple[str, float]]:
    H, G, K, platform = config.n_heads, config.kv_n_heads, config.head_dim, ONE_DEVICE.platform
    how = chosen(None, platform)
    for rows, tokens, length, int8 in ((1, 1, 700, False), (5, 1, 700, True), (1, 256, 500, False), (1, 256, 0, True)):
        S = 1024
        keys = jax.random.split(jax.random.key(rows), 3)
        q = jax.random.normal(keys[0], (rows, tokens, H, K), jnp.bfloat16)
        k, v = (jax.random.normal(key, (rows, S, G, K), jnp.bfloat16) for key in keys[1:])
        positions = length + jnp.arange(rows)[:, None] * 3 + jnp.arange(tokens)
        held, scales = [k, v], None
        if int8:
            (k8, of_keys), (v8, of_values) = to_int8(k), to_int8(v)
            held, scales = [k8, v8], (of_keys.swapaxes(1, 2), of_values.swapaxes(1, 2))
            k, v = (
                a.astype(jnp.float32) * s[..., None].astype(jnp.float32) for a, s in ((k8, of_keys), (v8, of_values))
            )
        attend = partial(cached_attention, first_row=0, block=CACHE_BLOCK, platform=platform, implementation=how)
        part = jax.jit(attend)(q, *(a.swapaxes(1, 2) for a in held), positions, scales=scales)
        want = _definition(q, k, v, jnp.arange(S) <= positions[:, :, None])
        name = f"{how} attention, {rows} rows, {tokens} tokens, {'int8' if int8 else 'bfloat16'} cache"
        yield name, _error(join_stripes(part, jnp.float32, ONE_DEVICE), want)
    yield from _sequence_errors(config, how)


def _sequence_errors(config: DbrxConfig, how: str) -> Iterator[tuple[str, float]]:
    """Of whole sequences that are longer than what the definition computes, padded left and right, with gradients."""
    H, G, K, T = config.n_heads, config.kv_n_heads, config.head_dim, SHORT_SEQUENCE + 256
    shapes = ((2, T, H, K), (2, T, G, K), (2, T, G, K), (2, T, H, K))
    *qkv, d_out = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    place = jnp.arange(T)
    valid = jnp.stack([place >= 70, place < 900])
    mask = jnp.tril(jnp.ones((T, T), bool)) & valid[:, None]
    d_out = d_out * valid[:, :, None, None]

    def by(attention: Any) -> Any:
        def run(*qkv):
            out, pull = jax.vjp(attention, *qkv)
            return out * valid[:, :, None, None], pull(d_out.astype(out.dtype))

        return jax.jit(run)

    kernel = partial(sequence_attention, valid=valid, implementation=how, platform=ONE_DEVICE.platform)
    out, gradients = by(kernel)(*qkv)
    with jax.default_matmul_precision("highest"):
        want, true = by(partial(reference_attention, mask=mask))(*(a.astype(jnp.float32) for a in qkv))
    yield f"{how} attention, whole sequences", _error(out, want)
    for name, a, b in zip(("queries", "keys", "values"), gradients, true, strict=True):
        yield f"{how} attention, gradient of {name}", _error(a, b)


def _definition(q: Any, k: Any, v: Any, seen: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return reference_attention(*(a.astype(jnp.float32) for a in (q, k, v)), seen)


def _error(out: Any, want: Any) -> float:
    out, want = np.asarray(out, np.float32), np.asarray(want, np.float32)
    return float(np.abs(out - want).max() / np.abs(want).max())


# How fast it is.


def decode(size: Size, machine: Machine) -> Iterator[dict[str, Any]]:
    """Tokens a second of every batch and context that fits."""
    for precision in size.precisions:
        model = random_model(size.config, precision)
        for batch in size.batches:
            for context in size.contexts:
                case: dict[str, Any] = {"precision": precision, "batch": batch, "context": context}
                setting = Setting(size.config, TARGETS["h200"], {"expert": 1}, precision, batch, context)
                if jax.default_backend() != "cpu" and not fits(setting):
                    yield case | {"does_not_fit": f"takes {memory(setting).total / 1e9:.1f} GB"}
                    continue
                seconds = _decode_seconds(model, batch, context, size.steps)
                bound = roofline.decode_bound(size.config, machine, precision, batch, context - size.steps // 2)
                yield case | _figures(batch * size.steps / seconds, bound)
        del model


def _decode_seconds(model: DbrxForCausalLM, batch: int, context: int, steps: int) -> float:
    """Of `steps` steps that end with all rows at `context` positions. What the cache holds does not matter."""
    config, partition, parts = model.config, model.partition, split(model)
    positions = capacity(context, partition)
    cache, logits = decoding.empty(config, partition, batch, positions, jnp.dtype(jnp.bfloat16))
    sampling = Sampling(*(np.float32(n) for n in (1, config.vocab_size, 1, 0, 1)))
    settings = decoding.Settings(sampling._replace(top_k=np.int32(config.vocab_size)), None, np.full(8, -1, np.int32))
    prompts = jnp.zeros((batch, positions), jnp.int32)
    lengths = jnp.full(batch, context - steps, jnp.int32)
    done = jnp.zeros(batch, bool)
    state = decoding.first_token(config, partition, False, False, settings, cache, logits, prompts, lengths, done)
    holder = [state]

    def run() -> None:
        begin = holder.pop()
        after = decoding.decode(parts, False, False, settings, begin, steps)
        after.token.block_until_ready()
        # Back to where it began: the cache was given away and comes round.
        holder.append(after._replace(position=after.position - steps, step=after.step - steps))

    return best_seconds(run, 3)


def prefill(size: Size, machine: Machine) -> Iterator[dict[str, Any]]:
    """Tokens a second of one prompt that begins a row."""
    for precision in size.precisions:
        model = random_model(size.config, precision)
        parts, partition = split(model), model.partition
        length = chunk_lengths(partition)[-1]
        count = min(size.prompt, length)
        holder = [decoding.empty(size.config, partition, 1, capacity(count + 1, partition), jnp.dtype(jnp.bfloat16))]

        def run(parts=parts, length=length, count=count, holder=holder) -> None:
            tokens, at = np.ones((1, length), np.int32), np.array([[0, 0, count]], np.int32)
            holder.append(decoding.prefill_chunk(parts, *holder.pop(), tokens, at))
            jax.block_until_ready(holder[0])

        seconds = best_seconds(run, 3)
        bound = roofline.prefill_bound(size.config, machine, precision, count)
        case = {"precision": precision, "prompt": count, "chunk": length}
        yield case | _figures(count / seconds, bound)
        del model, parts, run
        holder.clear()


def load(size: Size, machine: Machine) -> Iterator[dict[str, Any]]:
    """Users who come one after another as the announcement has them: 2000 tokens in, 256 out, one a second."""
    prompt, tokens = roofline.ANNOUNCED_PROMPT, roofline.ANNOUNCED_TOKENS
    if size.prompt < prompt:
        prompt, tokens = size.prompt, size.steps
    for precision in size.precisions:
        engine = Ours()
        engine.model = random_model(size.config, precision)
        prompts = random_prompts(size.config, 0, size.users, prompt)
        for rows in range(1, size.together + 1):  # compiled before users come
            engine.generate((prompts * rows)[:rows], tokens)
        found = serve.users(engine, prompts, tokens, roofline.ANNOUNCED_SECONDS, size.together)
        alone = roofline.user_seconds(size.config, machine, precision, prompt, tokens)
        yield {
            "precision": precision,
            "prompt": prompt,
            "tokens": tokens,
            "users": size.users,
            "together": size.together,
            "tokens_per_second": round(size.users * tokens / found["seconds"], 2),
            "first_token_seconds_median": round(float(np.median(found["first"])), 3),
            "seconds_median": round(float(np.median(found["total"])), 3),
            "of_measured_roofline": round(alone / float(np.median(found["total"])), 4),  # of a user who is alone
        }
        del engine


def _figures(rate: float, bound: roofline.Bound) -> dict[str, Any]:
    """The rate, and its share of what this device was measured to allow, and of what an H200's data sheet does."""
    sheet = Machine(
        device="H200", bandwidth=TARGETS["h200"].hbm_bandwidth, float32=0.0, bfloat16=TARGETS["h200"].bf16_flops
    )
    seconds = max(bound.read / sheet["bandwidth"], bound.flops / sheet["bfloat16"])
    return {
        "tokens_per_second": round(rate, 2),
        "of_measured_roofline": round(rate / bound.tokens_per_second, 4),
        "of_datasheet_roofline": round(rate * seconds / bound.tokens, 4),
    }


def beside_peer(config: DbrxConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """Four layers in bfloat16 beside transformers, through the harness, which compares their logits first."""
    if not (folder / "config.json").exists():
        say(f"Making {folder}")
        write_random(config, folder)
    for batch in (1, 8):
        output = folder.parent / f"peer-{batch}.json"
        Compared(
            model=str(folder), dtype="bfloat16", against="transformers", batch=batch, rounds=3, output=output
        ).run()
        yield json.loads(output.read_text())


def cases(part: str, size: Size) -> Iterator[dict[str, Any]]:
    """What a part finds, one after the other."""
    if part == "peer":  # two workers share the card; this process takes nothing of it
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.4"
        if size.peer:
            yield from beside_peer(size.peer, cache_folder() / "h200-peer")
    elif part == "check":
        yield check(size)
    else:
        machine = measure()
        yield {"device": jax.devices()[0].device_kind, "measured": machine}
        yield from {"decode": decode, "prefill": prefill, "load": load}[part](size, machine)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h200", description=str(__doc__).splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model on any device, without the peer")
    parser.add_argument("--part", choices=PARTS, help="only this; by default all, each in a process of its own")
    parser.add_argument("--precision", choices=H200.precisions, help="only this one")
    parser.add_argument("--output", type=Path, default=RESULTS / "h200.json", help="JSON to write")
    options = parser.parse_args()
    size = TOY if options.toy else H200
    own_process()
    if options.part is None:
        options.output.unlink(missing_ok=True)
        failed: list[str] = []
        for part in PARTS:
            arguments = ["--part", part, "--output", str(options.output), *(["--toy"] if options.toy else [])]
            arguments += ["--precision", options.precision] if options.precision else []
            done = subprocess.run([sys.executable, "-m", "benchmarks.h200", *arguments], cwd=ROOT)
            failed += [part] if done.returncode else []
            if part == "check" and failed:
                break  # the speed of what is wrong says nothing
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    if not options.toy and options.part != "peer" and "H200" not in jax.devices()[0].device_kind:
        parser.error(f"this is a {jax.devices()[0].device_kind}, and no H200; --toy runs anywhere")
    if options.precision:
        size = dataclasses.replace(size, precisions=(options.precision,))
    say(f"{options.part} ...")
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    result = {"benchmark": "h200", "toy": options.toy, **stamp("dbrx-jax", "jax", "jaxlib", "flax"), **result}
    for case in cases(options.part, size):
        say(json.dumps(case))
        result.setdefault(options.part, []).append(case)
        write(result, options.output)


if __name__ == "__main__":
    main()
