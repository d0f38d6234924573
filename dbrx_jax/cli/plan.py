"""The command dbrx-jax plan: memory and speed of a model on given devices, as a page or as JSON."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dbrx_jax.console import print_status
from dbrx_jax.errors import PlanError, QuantizationError

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimate a model's memory per device, whether it fits, and its speed at best."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = "132b-instruct"
    """Name of a configuration such as 132b-instruct, or a checkpoint's folder."""
    on: str = "v5e-64"
    """Kind and number of devices, such as v5e-64, v6e-16, v5p-4, h100-8 or h200-1."""
    mesh: str | None = None
    """Axes such as "expert=16,tensor=4"; by default those of the recipe for these devices, or fitting ones."""
    dtype: str = "bfloat16"
    """Weights: float32, bfloat16, int8, int4 (experts in groups of 128, the rest int8; also int4-64 and
    int4-32), fp8, or parts such as experts=int4-64,attention=int8."""
    batch: int = 1
    """Number of prompts in a batch."""
    context: int = 4096
    """Positions of the cache: prompt and new tokens."""
    cache_dtype: Literal["int8"] | None = None
    """int8 halves a bfloat16 cache."""
    compile: bool = False
    """Also compile for these devices, which need not be present (extra [compile])."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        setting = self._setting()
        facts = collect(setting)
        if self.compile:
            import jax

            from dbrx_jax.planning.compile import compile_programs

            jax.config.update("jax_platforms", "cpu")  # else the plugins search for their devices, at length
            print_status(f"Compiling {self.model} for {self.on}; this takes a minute or two for each of two programs")
            facts["compiled"] = [dataclasses.asdict(program) for program in compile_programs(setting)]
        if self.json:
            print(json.dumps(facts, indent=2))
        else:
            print("\n".join(page(facts)))

    def _setting(self) -> Any:
        from dbrx_jax.config import DbrxConfig, config_names
        from dbrx_jax.planning.plan import FLOATS, Setting, suggest_axes
        from dbrx_jax.planning.targets import target
        from dbrx_jax.sharding.recipes import find_axes, find_recipe, recipe_names

        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise PlanError(f"--{name}: expected a whole number above 0, got {getattr(self, name)}")
        precision = self.dtype if self.dtype in FLOATS else _precision(self.dtype)
        config = DbrxConfig.from_name(self.model) if self.model in config_names() else _config_of(self.model)
        kind, _, count = self.on.partition("-")
        if not count.isdecimal() or int(count) < 1:
            raise PlanError(f"--on: expected a kind and a number of devices such as v5e-64, got {self.on!r:.40}")
        accelerator, devices = target(kind), int(count)
        if self.mesh is not None:
            axes = find_axes(self.mesh)
        elif self.on in recipe_names() and _divides(config, find_recipe(self.on).axes):
            axes = find_recipe(self.on).axes
        else:
            axes = suggest_axes(config, devices)
        if (mesh_devices := math.prod(axes.values())) != devices:
            raise PlanError(f"--mesh: {self.mesh} makes {mesh_devices} devices, and --on says {devices}")
        if self.context > config.max_seq_len:
            raise PlanError(f"--context: {self.context} is beyond the model's {config.max_seq_len} positions")
        return Setting(config, accelerator, axes, precision, self.batch, self.context, self.cache_dtype)


def _precision(text: str) -> str:
    """Returns a quantisation's text in its shortest form."""
    from dbrx_jax.planning.plan import FLOATS
    from dbrx_jax.quantization import Quantization

    try:
        return str(Quantization.parse(text))
    except QuantizationError as error:
        raise PlanError(f"--dtype: {', '.join(FLOATS)} or a quantisation; {error}") from None


def _divides(config: Any, axes: dict[str, int]) -> bool:
    """Returns whether a recipe's axes divide the model's sizes; if not, planning with them raises MeshError."""
    divided = (("expert", "moe_num_experts"), ("tensor", "kv_n_heads"), ("tensor", "ffn_hidden_size"))
    return all(getattr(config, field) % axes.get(axis, 1) == 0 for axis, field in divided)


def _config_of(path: str) -> Any:
    """Reads the configuration of a checkpoint's folder or URL; raises PlanError if it has none."""
    from dbrx_jax.config import DbrxConfig, config_names
    from dbrx_jax.files import location

    if not (location(path) / "config.json").exists():
        raise PlanError(f"{path}: neither a folder with config.json nor one of {', '.join(config_names())}")
    return DbrxConfig.from_file(Path(path) if "://" not in path else location(path))


def collect(setting: Any) -> dict[str, Any]:
    """Returns the estimates for a :class:`dbrx_jax.planning.plan.Setting`, without compiling."""
    from dbrx_jax.planning import plan
    from dbrx_jax.planning.targets import slice_sizes

    memory = plan.memory(setting)
    sizes = tuple(n * setting.target.devices_per_chip for n in slice_sizes(setting.target.name))
    decode = {}
    for batch in sorted({*plan.BATCHES, setting.batch}):
        decode[batch] = dataclasses.asdict(plan.decode_roofline(dataclasses.replace(setting, batch=batch)))
    sent = {}
    for phase, rows, prefill in (("decode", setting.rows, False), ("prefill", plan.PREFILL, True)):
        messages = plan.messages(setting, rows, prefill)
        sent[phase] = {"bytes": round(sum(m.moved for m in messages)), "collectives": len(messages)}
    return {
        "devices": f"{setting.devices} x {setting.target.name}",
        "axes": dict(setting.axes),
        "dtype": setting.precision,
        "batch": setting.batch,
        "context": setting.context,
        "cache_dtype": setting.cache_dtype or setting.dtype,
        "memory": {
            "parameters": dict(memory.parameters),
            "cache": memory.cache,
            "state": memory.state,
            "working": memory.working,
            "total": memory.total,
            "usable": plan.usable(setting.target),
        },
        "fits": plan.fits(setting),
        "ways_to_fit": [] if plan.fits(setting) else plan.ways_to_fit(setting, sizes),
        "decode": decode,
        "prefill": dataclasses.asdict(plan.prefill_roofline(setting)),
        "sent": sent,
    }


def page(facts: dict[str, Any]) -> list[str]:
    """Returns the facts as lines of at most 80 columns."""
    memory = facts["memory"]
    axes = ", ".join(f"{axis} {size}" for axis, size in facts["axes"].items())
    ways = ", or ".join(facts["ways_to_fit"])
    fit = "it fits" if facts["fits"] else "it does not fit" + (f"; it would with {ways}" if ways else "")
    lines = [
        f"{facts['devices']} ({axes}), {facts['dtype']}, batch {facts['batch']}, context {facts['context']}"
        + (", int8 cache" if facts["cache_dtype"] == "int8" else ""),
        "",
        "memory of a device, GB",
        *(f"  {name:<22}{size / GB:9.3f}" for name, size in memory["parameters"].items()),
        *(f"  {name:<22}{memory[name] / GB:9.3f}" for name in ("cache", "state", "working", "total")),
        f"  {'usable':<22}{memory['usable'] / GB:9.3f}",
        fit,
        "",
        "at best, by bandwidth, arithmetic and links, whichever takes longest:",
        "  batch   tokens/s    reading  computing    sending   experts a layer",
    ]
    for batch, roof in facts["decode"].items():
        lines.append(
            f"  {batch:5} {roof['tokens_per_second']:10,.0f} {roof['seconds_reading'] * 1e3:7.2f} ms "
            f"{roof['seconds_computing'] * 1e3:7.2f} ms {roof['seconds_sending'] * 1e3:7.2f} ms "
            f"{roof['distinct_experts']:12.1f}"
        )
    prefill, sent = facts["prefill"], facts["sent"]
    lines += [
        f"  prompts {prefill['tokens_per_second']:8,.0f} {prefill['seconds_reading'] * 1e3:7.2f} ms "
        f"{prefill['seconds_computing'] * 1e3:7.2f} ms {prefill['seconds_sending'] * 1e3:7.2f} ms",
        f"a device sends {sent['decode']['bytes'] / 1e6:,.1f} MB in the {sent['decode']['collectives']} collectives "
        "of a decode step,",
        f"{sent['prefill']['bytes'] / 1e6:,.1f} MB in the {sent['prefill']['collectives']} of a chunk of 2048 tokens",
    ]
    for program in facts.get("compiled", []):
        lines += [
            "",
            f"{program['program']}, compiled in {program['compile_seconds']} s",
            f"  memory           {program['total'] / GB:9.3f} GB, planned {program['planned'] / GB:.3f}",
            f"  of it temporary  {program['temporaries'] / GB:9.3f} GB, the largest {program['largest_temporary']}",
            f"  HBM traffic      {program['traffic'] / GB:9.3f} GB, at least {program['least_traffic'] / GB:.3f}",
            f"  sent             {program['moved'] / 1e6:9.1f} MB, planned {program['planned_moved'] / 1e6:.1f}",
            f"  weights sent     {len(program['weights_moved']):9}",
        ]
    return lines
