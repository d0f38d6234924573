"""The facts of dbrx-jax plan, and their page."""

import dataclasses
import textwrap
from typing import Any

from dbrx_jax.planning import plan
from dbrx_jax.planning.loading import loading
from dbrx_jax.planning.sizes import device_counts

GB = 1e9
WIDTH = 80  # columns


def collect(setting: plan.Setting, read_rate: float) -> dict[str, Any]:
    """Returns the estimates, without compiling.

    Args:
      read_rate: bytes/s at which a host reads the checkpoint.
    """
    memory, host = plan.memory(setting), loading(setting)
    decode = {}
    for batch in sorted({*plan.BATCHES, setting.batch}):
        decode[batch] = dataclasses.asdict(plan.decode_roofline(dataclasses.replace(setting, batch=batch)))
    sent = {}
    for phase, rows, prefill in (("decode", setting.rows, False), ("prefill", setting.chunk, True)):
        messages = plan.messages(setting, rows, prefill)
        sent[phase] = {"bytes": round(sum(m.moved for m in messages)), "collectives": len(messages)}
    fits = plan.fits(setting)
    return {
        "devices": f"{setting.devices} x {setting.target.name}",
        "hosts": setting.hosts,
        "axes": dict(setting.axes),
        "mesh": plan.axes_text(setting.axes),
        "dtype": setting.dtype,
        "quantization": None if setting.quantization is None else str(setting.quantization),
        "batch": setting.batch,
        "context": setting.context,
        "cache_dtype": setting.cache_dtype or setting.dtype,
        "kernels": setting.target.kernels,
        "memory": {
            "parameters": dict(memory.parameters),
            "cache": memory.cache,
            "state": memory.state,
            "working": memory.working,
            "total": memory.total,
            "usable": setting.target.usable_bytes,
        },
        "fits": fits,
        "ways_to_fit": [] if fits else plan.ways_to_fit(setting, device_counts(setting.target)),
        "loading": {**dataclasses.asdict(host), "rate": read_rate, "seconds": host.read / read_rate},
        "decode": decode,
        "prefill": dataclasses.asdict(plan.prefill_roofline(setting)),
        "chunk": setting.chunk,
        "sent": sent,
    }


def page(facts: dict[str, Any]) -> list[str]:
    """Returns the facts as lines of at most WIDTH columns, unless the model's name is longer."""
    compiled = [line for program in facts.get("compiled", []) for line in _compiled(program)]
    return [*_heading(facts), "", *_memory(facts), "", *_loading(facts["loading"]), "", *_rates(facts), *compiled]


def _heading(facts: dict[str, Any]) -> list[str]:
    """Returns the model and its setting; the second line is what --mesh takes."""
    weights = facts["dtype"] if facts["quantization"] is None else facts["quantization"]
    cache = ", int8 cache" if facts["cache_dtype"] == "int8" else ""
    return [
        f"{facts['model']} on {facts['devices']}, {weights}, batch {facts['batch']}, context {facts['context']}{cache}",
        f"--mesh {facts['mesh']}",
    ]


def _memory(facts: dict[str, Any]) -> list[str]:
    memory, ways = facts["memory"], ", or ".join(facts["ways_to_fit"])
    fit = "it fits" if facts["fits"] else "it does not fit" + (f"; it would with {ways}" if ways else "")
    return [
        "memory of a device, GB",
        *(f"  {name:<22}{size / GB:9.3f}" for name, size in memory["parameters"].items()),
        *(f"  {name:<22}{memory[name] / GB:9.3f}" for name in ("cache", "state", "working", "total")),
        f"  {'usable':<22}{memory['usable'] / GB:9.3f}",
        *textwrap.wrap(fit, WIDTH, break_on_hyphens=False),
    ]


def _loading(host: dict[str, Any]) -> list[str]:
    rate = f"{host['rate'] / GB:g} GB/s (--read-rate)"
    devices = "its device" if host["devices"] == 1 else f"its {host['devices']} devices"
    lines = [
        f"loading, on each host with {devices}",
        f"  host memory, at most  {host['memory'] / GB:9.3f} GB",
        f"  reads                 {host['read'] / GB:9.3f} GB: {host['seconds']:,.0f} s at {rate}",
    ]
    if host["read_float"] is not None:
        seconds = host["read_float"] / host["rate"]
        lines.append(f"  if it quantises       {host['read_float'] / GB:9.3f} GB: {seconds:,.0f} s")
    return lines


def _rates(facts: dict[str, Any]) -> list[str]:
    rates = {**facts["decode"], "prompt": facts["prefill"]}
    if all(roof["tokens_per_second"] is None for roof in rates.values()):
        return ["rates are not known: no data sheet has this machine's; give --memory-rate GB/s", *_sent(facts)]
    lines = ["tokens/s at best, by bandwidth, arithmetic and links, whichever takes longest"]
    if not facts["kernels"]:
        kind = facts["devices"].split()[-1]
        lines.append(f"(there are no kernels for {kind}: it runs XLA's operations, further below these)")
    lines.append("  batch    all rows    each row    reading  computing    sending  experts/layer")
    for batch, roof in rates.items():
        experts = "" if batch == "prompt" else f"{roof['distinct_experts']:15.1f}"
        seconds = "".join(_milliseconds(roof[f"seconds_{kind}"]) for kind in ("reading", "computing", "sending"))
        tokens = "".join(_number(roof[name]) for name in ("tokens_per_second", "tokens_per_second_of_row"))
        lines.append(f"  {batch:>6}{tokens}{seconds}{experts}".rstrip())
    return [*lines, *_sent(facts)]


def _number(value: float | None) -> str:
    return f"{'unknown' if value is None else f'{value:,.0f}':>12}"


def _milliseconds(seconds: float | None) -> str:
    return f"{'unknown' if seconds is None else f'{seconds * 1e3:.2f} ms':>11}"


def _sent(facts: dict[str, Any]) -> list[str]:
    decode, prefill = facts["sent"]["decode"], facts["sent"]["prefill"]
    if not decode["collectives"]:
        return []
    return [
        f"a device sends {decode['bytes'] / 1e6:,.1f} MB in the {decode['collectives']} collectives of a decode step,",
        f"{prefill['bytes'] / 1e6:,.1f} MB in the {prefill['collectives']} of a chunk of {facts['chunk']} tokens",
    ]


def _compiled(program: dict[str, Any]) -> list[str]:
    return [
        "",
        f"{program['program']}, compiled in {program['compile_seconds']} s",
        f"  memory           {program['total'] / GB:9.3f} GB, planned {program['planned'] / GB:.3f}",
        f"  of it temporary  {program['temporaries'] / GB:9.3f} GB, the largest {program['largest_temporary']}",
        f"  HBM traffic      {program['traffic'] / GB:9.3f} GB, at least {program['least_traffic'] / GB:.3f}",
        f"  sent             {program['moved'] / 1e6:9.1f} MB, planned {program['planned_moved'] / 1e6:.1f}",
        f"  weights sent     {len(program['weights_moved']):9}",
    ]
