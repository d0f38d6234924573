"""DbrxConfig: the sizes and constants of a DBRX, read from a published ``config.json`` or from configs/."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from dbrx_jax.errors import ConfigError
from dbrx_jax.files import location, read_json

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")  # those of ops.experts
DTYPES = ("float32", "bfloat16", "float16")

# Keys of config.json and of its two sub-dictionaries.
_TOP = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "initializer_range")
_ATTENTION = ("kv_n_heads", "clip_qkv", "rope_theta")
_FFN = (
    "ffn_hidden_size",
    "moe_num_experts",
    "moe_top_k",
    "moe_jitter_eps",
    "moe_loss_weight",
    "moe_normalize_expert_weights",
)
# Keys by which llm-foundry, with which DBRX was trained, and others ask for another architecture, and the values that
# DBRX has; null is always one of them. They may be in config.json and in both of its sub-dictionaries. Ignored are
# implementations (attn_impl, rope_impl, fc_type, mlp_impl), the layout (fused_qkv), settings of what is refused or
# given elsewhere (alibi_bias_max, expansion_ratio), of devices (moe_world_size) and of training (init_config,
# attn_uses_sequence_id, moe_zloss_weight).
_ARCHITECTURE: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_bias": (False,),
    "attn_logit_softcapping": (),
    "attn_type": ("grouped_query_attention",),
    "bias": (False,),
    "block_overrides": ({},),
    "emb_norm": (False,),
    "ffn_type": ("mb_dmoe", "torch_dmoe"),  # the kinds without a capacity
    "final_logit_softcapping": (),
    "flex_attn_mod_list": ([],),
    "kv_dim": (),
    "learned_pos_emb": (False,),
    "logit_scale": (1,),
    "mlp_bias": (False,),
    "mlp_type": ("glu",),
    "no_bias": (True,),
    "nope": (False,),
    "norm_eps": (1e-5,),
    "norm_type": ("layernorm", "low_precision_layernorm"),
    "partial_rotary_factor": (1,),
    "prefix_lm": (False,),
    "qk_gn": (False,),
    "qk_ln": (False,),
    "residual_modification": (),
    "reuse_kv_layer_idx": (),
    "reuse_kv_x_layer_idx": (),
    "rope": (True,),
    "shared_expert": (False,),
    "sliding_window": (-1,),
    "sliding_window_size": (-1,),
    "softmax_scale": (),
    "uniform_expert_assignment": (False,),
}
# Dictionaries of rotary embeddings, in the same places, and the entries that such a dictionary may have.
_ROPE_GROUPS = ("rope_parameters", "rope_scaling", "rope_hf_config", "rope_dail_config")
_ROPE_TYPES = ("default", "no_scaling", "original")
_ROPE: dict[str, tuple[Any, ...]] = {
    "type": _ROPE_TYPES,
    "rope_type": _ROPE_TYPES,
    "factor": (1,),
    "partial_rotary_factor": (1,),
}
_MAX_FLOAT = 1e30
_MAX_EXPERTS = 1 << 15  # of all layers together; the largest DBRX has 640
# Larger sizes mean a damaged or hostile file, which is rejected before anything is allocated.
_MAX_SIZES = {
    "d_model": 1 << 18,
    "n_heads": 1 << 12,
    "n_layers": 1 << 10,
    "max_seq_len": 1 << 24,
    "vocab_size": 1 << 22,
    "kv_n_heads": 1 << 12,
    "ffn_hidden_size": 1 << 20,
    "moe_num_experts": 1 << 10,
    "moe_top_k": 1 << 10,
}


@dataclasses.dataclass(frozen=True)
class DbrxConfig:
    """The sizes and constants of one DBRX. Field names are those of the published ``config.json``.

    Defaults are those of keys that a published file leaves out. Values are checked on construction.

    Raises:
      ConfigError: a value is of the wrong type, out of range, or inconsistent with another.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    max_seq_len: int = 2048  # tokens
    vocab_size: int = 32000
    initializer_range: float = 0.02  # standard deviation of the initial weights
    kv_n_heads: int = 1
    clip_qkv: float | None = None  # queries, keys and values are clamped to +- this
    rope_theta: float = 1e4
    ffn_hidden_size: int = 3584  # per expert
    ffn_act_fn: str = "silu"
    moe_num_experts: int = 4
    moe_top_k: int = 1
    moe_jitter_eps: float | None = None  # training only: router input times U(1 - eps, 1 + eps)
    moe_loss_weight: float = 0.01  # of the auxiliary load-balancing loss, in training
    moe_normalize_expert_weights: float | None = 1.0  # p of the norm; None: not normalised
    dtype: str = "bfloat16"  # of the stored weights

    def __post_init__(self) -> None:
        for name, maximum in _MAX_SIZES.items():
            _set(self, name, _integer(name, getattr(self, name), maximum))
        for name, minimum in (("initializer_range", 0.0), ("rope_theta", 1.0), ("moe_loss_weight", 0.0)):
            _set(self, name, _number(name, getattr(self, name), minimum))
        for name in ("clip_qkv", "moe_normalize_expert_weights"):
            value = getattr(self, name)
            if value is not None:
                value = _number(name, value, 0.0)
                if value == 0:
                    raise ConfigError(f"{name}: expected a number above 0, or null, got 0")
                _set(self, name, value)
        if self.moe_jitter_eps is not None:
            eps = _number("moe_jitter_eps", self.moe_jitter_eps, 0.0)
            if eps >= 1:
                raise ConfigError(f"moe_jitter_eps: expected a number below 1, got {eps}")
            _set(self, "moe_jitter_eps", eps or None)
        if self.n_layers * self.moe_num_experts > _MAX_EXPERTS:
            raise ConfigError(
                f"moe_num_experts: at most {_MAX_EXPERTS} in all layers together, "
                f"got {self.n_layers} layers of {self.moe_num_experts}"
            )
        if self.ffn_act_fn not in ACTIVATIONS:
            raise ConfigError(f"ffn_act_fn: expected one of {', '.join(ACTIVATIONS)}, got {self.ffn_act_fn!r:.40}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"torch_dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r:.40}")
        if self.d_model % self.n_heads:
            raise ConfigError(f"n_heads: expected a divisor of d_model {self.d_model}, got {self.n_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"n_heads: d_model / n_heads must be even for rotary embeddings, got {self.head_dim}")
        if self.n_heads % self.kv_n_heads:
            raise ConfigError(f"kv_n_heads: expected a divisor of n_heads {self.n_heads}, got {self.kv_n_heads}")
        if self.moe_top_k > self.moe_num_experts:
            raise ConfigError(
                f"moe_top_k: expected at most moe_num_experts {self.moe_num_experts}, got {self.moe_top_k}"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def total_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self._parameters(self.moe_num_experts)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that one token uses (with the whole embedding and head, as published)."""
        return self._parameters(self.moe_top_k)

    def _parameters(self, experts_per_layer: int) -> int:
        d, kv = self.d_model, self.kv_n_heads * self.head_dim
        attention = d * (d + 2 * kv) + d * d
        ffn = self.moe_num_experts * d + experts_per_layer * 3 * d * self.ffn_hidden_size
        return 2 * self.vocab_size * d + self.n_layers * (attention + ffn + 2 * d) + d

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads the dictionary of a ``config.json``.

        Unknown keys are ignored, which saved copies have many of, and so are those of dropout.

        Raises:
          ConfigError: the file is of another model or asks for another architecture, or a value cannot be used.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"expected a JSON object, got {type(data).__name__}")
        if (kind := data.get("model_type", "dbrx")) != "dbrx":
            raise ConfigError(f"model_type: expected 'dbrx', got {kind!r:.40}")
        attention, ffn = _group(data, "attn_config"), _group(data, "ffn_config")
        for prefix, group in (("", data), ("attn_config.", attention), ("ffn_config.", ffn)):
            _refuse_other_architectures(prefix, group)
        if data.get("tie_word_embeddings"):
            raise ConfigError("tie_word_embeddings: expected false (DBRX does not tie them), got true")
        groups = ((_TOP, data), (_ATTENTION, attention), (_FFN, ffn))
        values = {key: group[key] for keys, group in groups for key in keys if key in group}
        values["rope_theta"] = _rope_theta(data, attention)
        if "ffn_act_fn" in ffn:
            values["ffn_act_fn"] = _activation(ffn["ffn_act_fn"])
        if (dtype := stated_dtype(data)) is not None:
            values["dtype"] = dtype
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a ``config.json``, or the one in the folder `path`.

        Raises:
          ConfigError: there is no such file, it is not JSON, or as in :meth:`from_dict`.
        """
        path = location(path)
        if path.is_dir():
            path = path / "config.json"
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Reads a configuration that comes with the package, by its name (see :func:`config_names`).

        Raises:
          ConfigError: there is no configuration of this name.
        """
        if name not in config_names():
            raise ConfigError(f"no configuration is called {name!r}: choose one of {', '.join(config_names())}")
        return cls.from_dict(json.loads((configs_folder() / f"{name}.json").read_text()))

    def to_dict(self) -> dict[str, Any]:
        """Returns the dictionary of a published ``config.json``, which transformers reads too."""
        return {
            "architectures": ["DbrxForCausalLM"],
            "model_type": "dbrx",
            **{key: getattr(self, key) for key in _TOP},
            "attn_config": {"attn_pdrop": 0.0, **{key: getattr(self, key) for key in _ATTENTION}},
            "ffn_config": {"ffn_act_fn": {"name": self.ffn_act_fn}, **{key: getattr(self, key) for key in _FFN}},
            "emb_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "output_router_logits": False,
            "router_aux_loss_coef": self.moe_loss_weight,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
            "use_cache": True,
        }


def stated_dtype(data: Mapping[str, Any]) -> Any:
    """Returns the dtype that the dictionary of a ``config.json`` names; None if it names none."""
    dtype = data.get("torch_dtype") or data.get("dtype")  # dtype is written by transformers 5
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype


def config_names() -> list[str]:
    """Returns the names of the configurations that come with the package."""
    return sorted(f.name.removesuffix(".json") for f in configs_folder().iterdir() if f.name.endswith(".json"))


def configs_folder() -> Path:
    """Returns the folder of sizes and mesh recipes: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _set(config: DbrxConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # the dataclass is frozen


def _number(name: str, value: Any, minimum: float) -> float:
    if not _is_number(value) or not minimum <= value <= _MAX_FLOAT:
        raise ConfigError(f"{name}: expected a number of at least {minimum:g}, got {value!r:.40}")
    return float(value)


def _integer(name: str, value: Any, maximum: int) -> int:
    if not _is_number(value) or not 1 <= value <= maximum or value != int(value):
        raise ConfigError(f"{name}: expected a whole number from 1 to {maximum}, got {value!r:.40}")
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _group(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    group = data.get(key)
    if group is None:
        return {}
    if not isinstance(group, Mapping):
        raise ConfigError(f"{key}: expected a JSON object, got {group!r:.60}")
    return group


def _refuse_other_architectures(prefix: str, group: Mapping[str, Any]) -> None:
    """Raises ConfigError if a key of the group asks for mathematics that DBRX does not have."""
    places = [(prefix, group, _ARCHITECTURE)]
    places += [(f"{prefix}{name}.", _group(group, name), _ROPE) for name in _ROPE_GROUPS]
    for place, values, table in places:
        for key, allowed in table.items():
            if (value := values.get(key)) is not None and value not in allowed:
                expected = " or ".join(json.dumps(v) for v in (*allowed, None))
                raise ConfigError(
                    f"{place}{key}: expected {expected}, as DBRX has no other, got {value!r:.60}; "
                    "this is a model of another architecture"
                )


def _activation(value: Any) -> Any:
    """Returns the name of ffn_act_fn, which is a name, or an object with a name and arguments of PyTorch's function."""
    if not isinstance(value, Mapping):
        return value or "silu"
    name, arguments = value.get("name", "silu"), {k: v for k, v in value.items() if k not in ("name", "inplace")}
    if name == "gelu" and arguments.get("approximate") in ("none", "tanh"):
        name = "gelu" if arguments.pop("approximate") == "none" else "gelu_pytorch_tanh"
    if arguments:
        raise ConfigError(f"ffn_act_fn: expected a name alone, got {dict(value)!r:.60}")
    return name


def _rope_theta(data: Mapping[str, Any], attention: Mapping[str, Any]) -> Any:
    """Returns rope_theta; attn_config's takes precedence: transformers 5 also writes a default of 10000 elsewhere."""
    rope = _group(data, "rope_parameters")
    other = rope.get("rope_theta", data.get("rope_theta"))
    theta = attention.get("rope_theta")
    if theta is None:
        return 1e4 if other is None else other
    if other is not None and other != theta:
        warnings.warn(
            f"config.json gives rope_theta {theta!r:.40} in attn_config and {other!r:.40} outside it; "
            "the first is used. Delete the other one to be rid of this warning.",
            stacklevel=4,
        )
    return theta
