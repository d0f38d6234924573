"""Tensor names and shapes of published checkpoint layouts, as tables from tensors to the model's parameters.

A row is one tensor and the parameters stacked in it along its first axis. `{i}` stands for every block, `{e}` for
every expert; on the right side alone, the tensor holds all experts one after another. Names that end in `.T` are
stored transposed. A layout joins three tables: COMMON, one of ATTENTION and one of EXPERTS.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

from dbrx_jax.checkpoint.parameters import ParameterSpec, parameter_specs
from dbrx_jax.config import DbrxConfig

Table = Mapping[str, tuple[str, ...]]

_BLOCK = "transformer.blocks.{i}"
_ATTN = f"{_BLOCK}.norm_attn_norm.attn"
_EXPERT = "blocks.{i}.moe.experts.{e}"

COMMON: Table = {
    "transformer.wte.weight": ("embedding",),
    f"{_BLOCK}.norm_attn_norm.norm_1.weight": ("blocks.{i}.norm_1.scale",),
    f"{_ATTN}.out_proj.weight": ("blocks.{i}.attention.out",),
    f"{_BLOCK}.norm_attn_norm.norm_2.weight": ("blocks.{i}.norm_2.scale",),
    f"{_BLOCK}.ffn.router.layer.weight": ("blocks.{i}.moe.router",),
    "transformer.norm_f.weight": ("norm_f.scale",),
    "lm_head.weight": ("lm_head",),
}
ATTENTION: Mapping[str, Table] = {
    "fused": {f"{_ATTN}.Wqkv.weight": tuple(f"blocks.{{i}}.attention.{part}" for part in ("query", "key", "value"))},
    "split q/k/v": {
        f"{_ATTN}.q_proj.weight": ("blocks.{i}.attention.query",),
        f"{_ATTN}.k_proj.weight": ("blocks.{i}.attention.key",),
        f"{_ATTN}.v_proj.weight": ("blocks.{i}.attention.value",),
    },
}
EXPERTS: Mapping[str, Table] = {
    "fused": {f"{_BLOCK}.ffn.experts.mlp.{w}": (f"{_EXPERT}.{w}",) for w in ("w1", "v1", "w2")},
    "per expert": {
        f"{_BLOCK}.ffn.experts.mlp.{{e}}.w1.weight": (f"{_EXPERT}.w1",),
        f"{_BLOCK}.ffn.experts.mlp.{{e}}.v1.weight": (f"{_EXPERT}.v1",),
        f"{_BLOCK}.ffn.experts.mlp.{{e}}.w2.weight": (f"{_EXPERT}.w2.T",),
    },
    "MLX": {
        f"{_BLOCK}.ffn.experts.{{e}}.w1.weight": (f"{_EXPERT}.w1",),
        f"{_BLOCK}.ffn.experts.{{e}}.v1.weight": (f"{_EXPERT}.v1",),
        f"{_BLOCK}.ffn.experts.{{e}}.w2.weight": (f"{_EXPERT}.w2.T",),
    },
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tensor names of one kind of published checkpoint."""

    name: str
    table: Table


def _layouts() -> dict[tuple[str, str], Layout]:
    result = {}
    for experts, expert_table in EXPERTS.items():
        for attention, table in ATTENTION.items():
            name = experts if attention == "fused" else f"{experts}, {attention}"
            result[experts, attention] = Layout(name, {**COMMON, **table, **expert_table})
    return result


LAYOUTS = _layouts()
FUSED = LAYOUTS["fused", "fused"]  # as DBRX was published


def recognise(names: Collection[str]) -> Layout:
    """The layout of a checkpoint with tensors of these names; the published one where none fits better."""

    def first_of(tables: Mapping[str, Table]) -> str:
        for kind, table in tables.items():
            if any(pattern.format(i=0, e=0) in names for pattern in table):
                return kind
        return "fused"

    return LAYOUTS[first_of(EXPERTS), first_of(ATTENTION)]


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a tensor that hold one parameter."""

    parameter: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """A tensor that a checkpoint must hold: its shape, and the parameters in it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    transposed: bool = False  # the parameter is the transpose of what is stored


def expand(layout: Layout, config: DbrxConfig) -> dict[str, SourceTensor]:
    """Every tensor that a checkpoint of this configuration holds in this layout, by name."""
    specs = parameter_specs(config)
    result = {}
    for pattern, parameters in layout.table.items():
        for i in range(config.n_layers) if "{i}" in pattern else (0,):
            experts = range(config.moe_num_experts)
            if "{e}" in pattern:
                for e in experts:
                    result[pattern.format(i=i, e=e)] = _stack(specs, [p.format(i=i, e=e) for p in parameters])
            else:
                names = dict.fromkeys(p.format(i=i, e=e) for p in parameters for e in experts)
                result[pattern.format(i=i)] = _stack(specs, list(names))
    return result


def _stack(specs: Mapping[str, ParameterSpec], names: list[str]) -> SourceTensor:
    if names[0].endswith(".T"):
        (name,) = (n.removesuffix(".T") for n in names)
        rows, columns = stored_shape(specs[name])
        return SourceTensor((columns, rows), (Part(name, 0, columns),), transposed=True)
    parts, start = [], 0
    for name in names:
        rows = stored_shape(specs[name])[0]
        parts.append(Part(name, start, start + rows))
        start += rows
    return SourceTensor((start, *stored_shape(specs[names[0]])[1:]), tuple(parts))


def stored_shape(spec: ParameterSpec) -> tuple[int, ...]:
    """A parameter's shape in published checkpoints, where heads and the elements of a head are one axis."""
    if "head_dim" not in spec.axes:
        return spec.shape
    at = spec.axes.index("head_dim")
    return (*spec.shape[: at - 1], math.prod(spec.shape[at - 1 : at + 1]), *spec.shape[at + 1 :])
