"""Tensor names and shapes of published checkpoint layouts, as tables from tensors to the model's parameters.

An entry maps a tensor to the parameters stacked in it along its first axis. `{i}` stands for every block, `{e}` for
every expert; with `{e}` only on the right side, the tensor holds all experts one after another. Parameters with the
suffix `.T` are stored transposed. A layout has three tables: COMMON, one of ATTENTION and one of EXPERTS.
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


LAYOUTS = {
    (experts, attention): Layout(
        experts if attention == "fused" else f"{experts}, {attention}", {**COMMON, **attention_table, **expert_table}
    )
    for experts, expert_table in EXPERTS.items()
    for attention, attention_table in ATTENTION.items()
}
FUSED = LAYOUTS["fused", "fused"]  # as DBRX was published


def recognise(names: Collection[str]) -> Layout:
    """Returns the layout of a checkpoint with tensors of these names; tables default to the published ones."""

    def first_match(tables: Mapping[str, Table]) -> str:
        for kind, table in tables.items():
            if any(pattern.format(i=0, e=0) in names for pattern in table):
                return kind
        return "fused"

    return LAYOUTS[first_match(EXPERTS), first_match(ATTENTION)]


@dataclasses.dataclass(frozen=True)
class TensorRows:
    """Rows of a tensor that hold one parameter."""

    parameter: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """A tensor that a checkpoint must hold: its stored shape, and the parameters in it."""

    shape: tuple[int, ...]
    parts: tuple[TensorRows, ...]
    transposed: bool = False  # relative to its only parameter


def expand(layout: Layout, config: DbrxConfig) -> dict[str, SourceTensor]:
    """Returns every tensor that a checkpoint of this configuration has in this layout, by name."""
    specs = parameter_specs(config)
    tensors = {}
    for pattern, parameters in layout.table.items():
        for i in range(config.n_layers) if "{i}" in pattern else (0,):
            experts = range(config.moe_num_experts)
            if "{e}" in pattern:
                for e in experts:
                    tensors[pattern.format(i=i, e=e)] = _stack(specs, [p.format(i=i, e=e) for p in parameters])
            else:
                names = dict.fromkeys(p.format(i=i, e=e) for p in parameters for e in experts)
                tensors[pattern.format(i=i)] = _stack(specs, list(names))
    return tensors


def _stack(specs: Mapping[str, ParameterSpec], names: list[str]) -> SourceTensor:
    """Describes the tensor that holds these parameters one after another."""
    if names[0].endswith(".T"):
        (name,) = (n.removesuffix(".T") for n in names)
        rows, columns = stored_shape(specs[name])
        return SourceTensor((columns, rows), (TensorRows(name, 0, columns),), transposed=True)
    parts, start = [], 0
    for name in names:
        rows = stored_shape(specs[name])[0]
        parts.append(TensorRows(name, start, start + rows))
        start += rows
    return SourceTensor((start, *stored_shape(specs[names[0]])[1:]), tuple(parts))


def stored_shape(spec: ParameterSpec) -> tuple[int, ...]:
    """Returns a parameter's shape in published checkpoints, where heads and head_dim are one axis."""
    if "head_dim" not in spec.axes:
        return spec.shape
    head_dim = spec.axes.index("head_dim")
    heads_and_elements = math.prod(spec.shape[head_dim - 1 : head_dim + 1])
    return (*spec.shape[: head_dim - 1], heads_and_elements, *spec.shape[head_dim + 1 :])
