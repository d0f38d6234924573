"""The command dbrx-jax plan: memory and speed of a model on given devices, as a page or as JSON."""

import dataclasses
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dbrx_jax.console import print_status
from dbrx_jax.errors import MemoryLimitError, PlanError

if TYPE_CHECKING:
    from dbrx_jax.config import DbrxConfig
    from dbrx_jax.planning.plan import Setting
    from dbrx_jax.planning.targets import Target

CONTEXT = 4096  # positions by default, at most the model's
MAX_BATCH = 1 << 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimate a model's memory per device, whether it fits, and its speed at best.

    Exits with 1 if it does not fit.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = "132b-instruct"
    """Name of a configuration such as 132b-instruct, or a checkpoint's folder."""
    on: str = "v5e-64"
    """Kind and number of devices, such as v5e-64 or h100x8; kinds: v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200,
    and cpu for this machine."""
    mesh: str | None = None
    """Axes such as "expert=16,tensor=4"; by default those of the recipe for these devices, or fitting ones."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the weights, by default the model's; of quantised weights, that of the activations."""
    quantization: str | None = None
    """Quantised weights: int8, int4 (experts in groups of 128, the rest int8; also int4-64 and int4-32), fp8, or parts
    such as experts=int4-64,attention=int8."""
    batch: int = 1
    """Number of prompts in a batch."""
    context: int | None = None
    """Positions of the cache: prompt and new tokens; 4096 by default, or fewer if the model has fewer."""
    cache_dtype: Literal["int8"] | None = None
    """int8 halves a bfloat16 cache."""
    read_rate: float = 1.0
    """GB/s at which a host reads the checkpoint from its disk or network; the load time depends on it."""
    memory_rate: float | None = None
    """Measured GB/s of a device's memory in place of the data sheet's; with --on cpu, which has none, of the whole
    machine's memory."""
    compile: bool = False
    """Also compile for these devices, which need not be present (extra [compile])."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        import jax

        from dbrx_jax.cli.plan_report import collect, page

        jax.config.update("jax_platforms", "cpu")  # planning needs no device, and other plugins search at length
        setting = self._setting()
        facts = {"model": self.model, **collect(setting, self.read_rate * 1e9)}
        problem = self._compile(setting, facts) if self.compile else None
        print(json.dumps(facts, indent=2) if self.json else "\n".join(page(facts)))
        if problem is not None:
            print_status(f"dbrx-jax: {problem}")
        if problem is not None or not facts["fits"]:
            sys.stdout.flush()
            sys.exit(1)

    def _compile(self, setting: "Setting", facts: dict[str, Any]) -> str | None:
        """Adds the compiled programs to the facts, or returns the compiler's message that one does not fit."""
        from dbrx_jax.backend import KERNELS_VARIABLE
        from dbrx_jax.planning.compile import compile_programs

        if not setting.target.kernels:
            os.environ[KERNELS_VARIABLE] = "0"  # as on that device
        print_status(f"Compiling {self.model} for {self.on}; this takes a minute or two for each of two programs")
        try:
            facts["compiled"] = [dataclasses.asdict(program) for program in compile_programs(setting)]
        except MemoryLimitError as error:
            return str(error)
        return None

    def _setting(self) -> "Setting":
        from dbrx_jax.planning.plan import Setting
        from dbrx_jax.planning.sizes import parse_devices
        from dbrx_jax.planning.targets import topology_for

        self._check_numbers()
        config, stored = _model(self.model)
        try:
            target, devices = parse_devices(self.on)
        except PlanError as error:
            raise PlanError(f"--on: {error}") from None
        if self.compile:
            topology_for(target.name, devices // target.devices_per_chip)  # raises before anything is computed
        if self.memory_rate is not None:
            num_sharing = devices if target.name == "cpu" else 1
            target = dataclasses.replace(target, hbm_bandwidth=self.memory_rate * 1e9 / num_sharing)
        context = min(CONTEXT, config.max_seq_len) if self.context is None else self.context
        if context > config.max_seq_len:
            raise PlanError(f"--context: {context} is beyond the model's {config.max_seq_len} positions")
        dtype, quantization = self.dtype or config.dtype, _quantization(self.quantization, stored, self.model)
        return Setting(
            config=config,
            target=target,
            axes=self._axes(config, target, devices),
            precision=quantization or dtype,
            batch=self.batch,
            context=context,
            cache_dtype=self.cache_dtype,
            activations=dtype,
        )

    def _check_numbers(self) -> None:
        for name, maximum in (("batch", MAX_BATCH), ("context", None)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= (maximum or value):
                limits = "above 0" if maximum is None else f"from 1 to {maximum:,}"
                raise PlanError(f"--{name}: expected a whole number {limits}, got {value}")
        for name in ("read_rate", "memory_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise PlanError(f"--{name.replace('_', '-')}: expected GB/s above 0, got {value}")

    def _axes(self, config: "DbrxConfig", target: "Target", devices: int) -> dict[str, int]:
        """Returns --mesh's axes, or else those of the recipe for these devices, or fitting ones."""
        from dbrx_jax.planning.plan import suggest_axes_on
        from dbrx_jax.sharding.recipes import find_axes, find_recipe, recipe_names

        recipe = f"{target.name}-{devices}"
        if self.mesh is not None:
            axes = find_axes(self.mesh)
        elif recipe in recipe_names() and _divides(config, find_recipe(recipe).axes):
            axes = find_recipe(recipe).axes
        else:
            axes = suggest_axes_on(config, target, devices)
        if (mesh_devices := math.prod(axes.values())) != devices:
            raise PlanError(f"--mesh: {self.mesh:.80} makes {mesh_devices} devices, and --on says {devices}")
        return axes


def _divides(config: "DbrxConfig", axes: dict[str, int]) -> bool:
    """Returns whether a recipe's axes divide the model's sizes; if not, planning with them raises MeshError."""
    divided = (("expert", "moe_num_experts"), ("tensor", "kv_n_heads"), ("tensor", "ffn_hidden_size"))
    return all(getattr(config, field) % axes.get(axis, 1) == 0 for axis, field in divided)


def _quantization(requested: str | None, stored: str | None, model: str) -> str | None:
    """Returns the shortest text of the quantisation that is asked for, or else of the checkpoint's."""
    from dbrx_jax.quantization import Quantization

    if requested is None:
        return stored
    text = str(Quantization.parse(requested))
    if stored not in (None, text):
        raise PlanError(f"--quantization: the weights of {model} are {stored} already; plan for what it was made from")
    return text


def _model(name: str) -> tuple["DbrxConfig", str | None]:
    """Returns the configuration of this name, or a checkpoint's with its stored quantisation."""
    from dbrx_jax.checkpoint.open import stored_quantization
    from dbrx_jax.config import DbrxConfig, config_names
    from dbrx_jax.files import location

    if name in config_names():
        return DbrxConfig.from_name(name), None
    folder = location(name)
    if not (folder / "config.json").exists():
        raise PlanError(f"{name}: neither a folder with config.json nor one of {', '.join(config_names())}")
    stored = stored_quantization(folder)
    return DbrxConfig.from_file(folder), None if stored is None else str(stored)
