"""Measures decoding, prefill and served users on this GPU, against its measured and published rates."""

import collections
import gzip
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import roofline
from benchmarks.gpu.sizes import Size, card, config_that_fits, random_model
from benchmarks.machine import Machine, best_seconds, measure
from benchmarks.options import random_prompts
from benchmarks.workers import serve
from benchmarks.workers.ours import Ours
from dbrx_jax.api import DbrxForCausalLM
from dbrx_jax.config import DbrxConfig
from dbrx_jax.generation import decode as decoding
from dbrx_jax.generation.prefill import empty_cache, prefill_chunk
from dbrx_jax.generation.settings import padded_ids
from dbrx_jax.generation.state import Options, Settings, start_rows
from dbrx_jax.model.cache import block_positions, cache_capacity, prefill_chunk_lengths
from dbrx_jax.model.graph import split_model
from dbrx_jax.planning.plan import Setting, fits, memory

SHOWN = 14  # kernels shown of a profile

Row = dict[str, Any]


def device() -> Iterator[Row]:
    """Yields the GPU and its measured rates: bytes/s read and FLOP/s."""
    yield {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "measured": measure()}


def decode(size: Size, machine: Machine, precision: str) -> Iterator[Row]:
    """Yields tokens/s of each batch and number of positions that fits, and a profile of the first."""
    model, config, facts = make_model(size, precision)
    yield facts
    for number, (batch, positions) in enumerate(size.decode[precision]):
        case: Row = {"precision": precision, "layers": config.n_layers, "batch": batch, "context": positions}
        setting = Setting(config, card(), {"expert": 1}, precision, batch, positions)
        if jax.default_backend() != "cpu" and not fits(setting):
            yield case | {"does_not_fit": f"takes {memory(setting).total / 1e9:.1f} GB"}
            continue
        run = _decode_steps(model, batch, positions, size.steps)
        begin = time.perf_counter()
        run()
        case["first_seconds"] = round(time.perf_counter() - begin, 1)
        seconds = best_seconds(run, 3)
        bound = roofline.decode_bound(config, machine, precision, batch, positions - size.steps // 2)
        case["milliseconds_a_step"] = round(seconds / size.steps * 1e3, 3)
        yield case | _rates(batch * size.steps / seconds, bound)
        if number == 0:
            yield case | kernel_times(run, size.steps)


def make_model(size: Size, precision: str) -> tuple[DbrxForCausalLM, DbrxConfig, Row]:
    """Returns a random model that fits, its configuration, and the time and memory that it took."""
    config = config_that_fits(size, precision)
    begin = time.perf_counter()
    model = random_model(config, precision)
    jax.block_until_ready(jax.tree.leaves(split_model(model)))
    stats = jax.devices()[0].memory_stats() or {}
    found = {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use", "bytes_limit") if name in stats}
    seconds = round(time.perf_counter() - begin, 1)
    return model, config, {"precision": precision, "layers": config.n_layers, "made_in_seconds": seconds, **found}


def _decode_steps(model: DbrxForCausalLM, batch: int, positions: int, steps: int) -> Callable[[], None]:
    """Returns a function that runs `steps` decode steps, which end with all rows at `positions` positions."""
    config, partition, model_state = model.config, model.partition, split_model(model)
    width = cache_capacity(positions, partition) // block_positions(partition)
    cache = empty_cache(config, partition, batch * width + 1, jnp.dtype(jnp.bfloat16))
    slots = np.arange(batch, dtype=np.int32)
    table = 1 + slots[:, None] * width + np.arange(width, dtype=np.int32)
    settings, options = Settings(padded_ids(())[None]), Options(steps=steps)
    prompts = jnp.zeros((batch, width * block_positions(partition)), jnp.int32)
    lengths, limits = (jnp.full(batch, n, jnp.int32) for n in (positions - steps, positions))
    state = start_rows(config, partition, options, settings, prompts, lengths, limits)
    # Rows with the same tokens would all read the same experts.
    token = jax.random.randint(jax.random.key(3), (batch,), 0, config.vocab_size, jnp.int32)
    latest = [(cache, state._replace(token=token))]  # each run donates the buffers and stores the new ones

    def run() -> None:
        arrays = (*latest.pop(), slots, table, np.int32(steps))
        cache, after, _ = decoding.decode(model_state, options, settings, *arrays)
        after.token.block_until_ready()
        latest.append((cache, after._replace(position=after.position - steps, step=after.step - steps)))

    return run


def prefill(size: Size, machine: Machine, precision: str) -> Iterator[Row]:
    """Yields tokens/s of a prompt's first chunk, and a profile."""
    model, config, facts = make_model(size, precision)
    yield facts
    model_state, partition = split_model(model), model.partition
    length = prefill_chunk_lengths(partition)[-1]
    count = min(size.prompt, length)
    tokens = np.array(random_prompts(config, 0, 1, length), np.int32)
    spans = np.array([[0, count]], np.int32)
    width = cache_capacity(count + 1, partition) // block_positions(partition)
    table = 1 + np.arange(width, dtype=np.int32)[None]
    latest = [empty_cache(config, partition, width + 1, jnp.dtype(jnp.bfloat16))]

    def run() -> None:
        cache, x, _ = prefill_chunk(model_state, latest.pop(), table, tokens, spans)
        latest.append(cache)
        jax.block_until_ready((cache, x))

    seconds = best_seconds(run, 3)
    bound = roofline.prefill_bound(config, machine, precision, count)
    case: Row = {"precision": precision, "layers": config.n_layers, "prompt": count}
    yield case | _rates(count / seconds, bound) | {"flops": round(bound.flops / seconds)}
    yield case | kernel_times(run, 1)


def load(size: Size, machine: Machine, precision: str) -> Iterator[Row]:
    """Yields rates and latencies under the announcement's load: a user each second, 2000 tokens in, 256 out."""
    engine = Ours()
    engine.model, config, facts = make_model(size, precision)
    yield facts
    prompt, tokens = roofline.ANNOUNCED_PROMPT, roofline.ANNOUNCED_TOKENS
    if size.prompt < prompt:
        prompt, tokens = size.prompt, size.steps
    prompts = random_prompts(config, 0, size.users, prompt)
    for rows in range(1, size.together + 1):  # compiles every batch size
        engine.generate((prompts * rows)[:rows], tokens)
    latencies = serve.users(engine, prompts, tokens, roofline.ANNOUNCED_SECONDS, size.together)
    alone = roofline.user_seconds(config, machine, precision, prompt, tokens)
    median = float(np.median(latencies["total"]))
    yield {
        "precision": precision,
        "layers": config.n_layers,
        "prompt": prompt,
        "tokens": tokens,
        "users": size.users,
        "together": size.together,
        "tokens_per_second": round(size.users * tokens / latencies["seconds"], 2),
        "first_token_seconds_median": round(float(np.median(latencies["first"])), 3),
        "seconds_median": round(median, 3),
        "of_measured_roofline": round(alone / median, 4),  # bound of a user served alone
    }


def kernel_times(run: Callable[[], Any], steps: int) -> Row:
    """Returns microseconds a step by kernel, from a profile of one run; empty if the device records none."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        file = next(Path(folder).glob("**/*.trace.json.gz"))
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    gpus = {e["pid"] for e in events if e.get("name") == "process_name" and "GPU" in e["args"]["name"]}
    streams = {(e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name" and "Stream" in e["args"]["name"]}
    microseconds: collections.Counter[str] = collections.Counter()
    number: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and event["pid"] in gpus and (event["pid"], event["tid"]) in streams:
            name = re.sub(r"(\.\d+)+$|_\d+$", "", event["name"])[:60]
            microseconds[name] += event["dur"]
            number[name] += 1
    longest = microseconds.most_common(SHOWN)
    shown = [[name, round(us / steps, 2), round(number[name] / steps, 1)] for name, us in longest]
    return {
        "microseconds_a_step": round(sum(microseconds.values()) / steps, 1),
        "kernels_a_step": round(sum(number.values()) / steps, 1),
        "kernels": shown,
    }


def _rates(rate: float, bound: roofline.Bound) -> Row:
    """Returns a rate and its shares of two rooflines: by measured and by published figures."""
    sheet = card()
    published = Machine(
        device=sheet.name, bandwidth=sheet.hbm_bandwidth, float32=sheet.bf16_flops, bfloat16=sheet.bf16_flops
    )
    seconds = max(bound.read / published["bandwidth"], bound.flops / published["bfloat16"])
    return {
        "tokens_per_second": round(rate, 2),
        "of_measured_roofline": round(rate / bound.tokens_per_second, 4),
        "of_datasheet_roofline": round(rate * seconds / bound.tokens, 4),
    }
