"""Tests of DbrxConfig: published files and their quirks, defaults, and rejected values."""

import dataclasses
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbrx_jax import DbrxConfig
from dbrx_jax.config import config_names
from dbrx_jax.errors import ConfigError
from tests.conftest import CASES, GOLDEN

PUBLISHED = {  # name: total, active, in billions
    "9b": (9.17, 2.83),
    "18b": (18.61, 5.53),
    "35b": (35.65, 10.29),
    "73b": (73.51, 20.66),
    "132b-base": (131.60, 36.47),
    "132b-instruct": (131.60, 36.47),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_match(name):
    config = DbrxConfig.from_name(name)
    assert (round(config.total_parameters / 1e9, 2), round(config.active_parameters / 1e9, 2)) == PUBLISHED[name]
    assert (config.moe_num_experts, config.moe_top_k, config.kv_n_heads, config.head_dim) == (16, 4, 8, 128)
    assert (config.clip_qkv, config.rope_theta, config.vocab_size) == (8.0, 5e5, 100352)


def test_132b_parameter_counts_are_exact():
    config = DbrxConfig.from_name("132b-base")
    assert config.total_parameters == 131_596_523_520
    assert config.active_parameters == 36_469_708_800


def test_shipped_configurations_round_trip():
    assert {"bench", "demo", "dense-a", *PUBLISHED} == set(config_names())
    for name in config_names():
        config = DbrxConfig.from_name(name)
        assert DbrxConfig.from_dict(config.to_dict()) == config
        assert config.ffn_hidden_size != config.d_model


def test_bench_and_dense_parameter_counts():
    assert 0.7e9 < DbrxConfig.from_name("bench").total_parameters < 0.9e9
    dense = DbrxConfig.from_name("dense-a")
    assert dense.moe_num_experts == 1
    assert round(dense.total_parameters / 1e9, 1) == 6.7
    assert dense.total_parameters == dense.active_parameters


@pytest.mark.parametrize("case", CASES)
def test_golden_configuration_round_trips(case):
    config = DbrxConfig.from_file(GOLDEN / case)
    assert config == DbrxConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert config == DbrxConfig.from_file(GOLDEN / case / "config.json")


def test_missing_keys_take_published_defaults():
    config = DbrxConfig.from_dict({"model_type": "dbrx", "attn_config": {}, "ffn_config": None})
    assert config == DbrxConfig()
    assert (config.d_model, config.n_heads, config.n_layers, config.max_seq_len, config.vocab_size) == (
        2048,
        16,
        24,
        2048,
        32000,
    )
    assert (config.kv_n_heads, config.clip_qkv, config.rope_theta) == (1, None, 1e4)
    assert (config.ffn_hidden_size, config.moe_num_experts, config.moe_top_k) == (3584, 4, 1)
    assert (config.moe_loss_weight, config.moe_normalize_expert_weights) == (0.01, 1.0)
    assert (config.ffn_act_fn, config.moe_jitter_eps) == ("silu", None)


def test_null_expert_normalisation_differs_from_missing():
    assert (
        DbrxConfig.from_dict({"ffn_config": {"moe_normalize_expert_weights": None}}).moe_normalize_expert_weights
        is None
    )
    assert DbrxConfig.from_dict({"ffn_config": {}}).moe_normalize_expert_weights == 1.0


def test_unrelated_keys_are_ignored():
    noise = {"top_k": 50, "temperature": 1.0, "tie_word_embeddings": True, "id2label": {"0": "x"}, "return_dict": True}
    data = DbrxConfig.from_name("demo").to_dict()
    noisy = {**data, "attn_config": {**data["attn_config"], **noise}, "ffn_config": {**data["ffn_config"], **noise}}
    assert DbrxConfig.from_dict(noisy) == DbrxConfig.from_name("demo")


OTHER_ARCHITECTURES = {
    "attn_config": {
        "alibi": True,
        "attn_logit_softcapping": 50.0,
        "attn_type": "multihead_attention",
        "bias": True,
        "flex_attn_mod_list": [{"mod_name": "causal_mask"}],
        "kv_dim": 64,
        "nope": True,
        "partial_rotary_factor": 0.5,
        "prefix_lm": True,
        "qk_gn": True,
        "qk_ln": True,
        "reuse_kv_layer_idx": -1,
        "rope": False,
        "rope_dail_config": {"type": "xpos"},
        "rope_hf_config": {"type": "dynamic", "factor": 2.0},
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "sliding_window_size": 3,
        "softmax_scale": 0.5,
    },
    "ffn_config": {
        "bias": True,
        "ffn_type": "mptmlp",
        "mlp_type": "mlp",
        "shared_expert": True,
        "uniform_expert_assignment": True,
    },
    "": {
        "alibi": True,
        "block_overrides": {"order": [{"name": "default"}]},
        "emb_norm": True,
        "final_logit_softcapping": 30.0,
        "learned_pos_emb": True,
        "logit_scale": "inv_sqrt_d_model",
        "no_bias": False,
        "norm_eps": 1e-6,
        "norm_type": "rmsnorm",
        "residual_modification": "layer",
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"},
        "rope_scaling": {"factor": 4.0},
        "sliding_window": 4096,
    },
}


def changed(group, values):
    """The demo's config.json with these values in the group, or at the top where it has no name."""
    data = DbrxConfig.from_name("demo").to_dict()
    return {**data, group: {**data[group], **values}} if group else {**data, **values}


@pytest.mark.parametrize(
    ("group", "key", "value"), [(g, k, v) for g, values in OTHER_ARCHITECTURES.items() for k, v in values.items()]
)
def test_keys_of_other_architectures_are_refused_by_name(group, key, value):
    with pytest.raises(ConfigError, match="another architecture") as error:
        DbrxConfig.from_dict(changed(group, {key: value}))
    assert str(error.value).startswith(f"{group}.{key}".removeprefix("."))


@pytest.mark.parametrize(
    ("group", "values"),
    [
        (
            "attn_config",
            {
                "alibi": False,
                "alibi_bias_max": 8,
                "attn_impl": "flash",
                "attn_logit_softcapping": None,
                "attn_type": "grouped_query_attention",
                "attn_uses_sequence_id": True,
                "flex_attn_mod_list": [],
                "fused_qkv": True,
                "kv_dim": None,
                "qk_gn": False,
                "qk_ln": False,
                "rope": True,
                "rope_dail_config": {"type": "original", "pos_idx_in_fp32": True, "xpos_scale_base": 512},
                "rope_hf_config": {"type": "no_scaling", "factor": 1.0},
                "rope_impl": "dail",
                "sliding_window_size": -1,
                "softmax_scale": None,
            },
        ),
        (
            "ffn_config",
            {
                "bias": False,
                "fc_type": {"name": "torch"},
                "ffn_type": "mb_dmoe",
                "mlp_impl": "grouped",
                "mlp_type": "glu",
                "moe_world_size": 8,
                "uniform_expert_assignment": False,
            },
        ),
        (
            "",
            {
                "expansion_ratio": 4,
                "init_config": {"name": "kaiming_normal_"},
                "learned_pos_emb": False,
                "logit_scale": None,
                "no_bias": True,
                "norm_type": "low_precision_layernorm",
                "rope_scaling": {"rope_type": "default"},
                "use_pad_tok_in_ffn": True,
            },
        ),
    ],
)
def test_the_words_of_the_architecture_that_is_dbrx_load(group, values):
    assert DbrxConfig.from_dict(changed(group, values)) == DbrxConfig.from_name("demo")


@pytest.mark.parametrize(("group", "key"), [("attn_config", "attn_pdrop"), ("", "resid_pdrop"), ("", "emb_pdrop")])
def test_dropout_of_training_is_ignored(group, key):
    assert DbrxConfig.from_dict(changed(group, {key: 0.1})) == DbrxConfig.from_name("demo")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"name": "swish"}, "swish"),
        ("gelu_new", "gelu_new"),
        ({"name": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"name": "gelu", "approximate": "none"}, "gelu"),
        ({"name": "gelu", "approximate": "tanh"}, "gelu_pytorch_tanh"),
        ({"name": "silu", "inplace": True}, "silu"),
        ({}, "silu"),
        (None, "silu"),
    ],
)
def test_activations_of_pytorch_and_transformers_are_known(value, name):
    assert DbrxConfig.from_dict(changed("ffn_config", {"ffn_act_fn": value})).ffn_act_fn == name


def test_int_and_float_numbers_are_equal():
    a = DbrxConfig.from_dict({"d_model": 96.0, "n_heads": 6, "attn_config": {"clip_qkv": 8, "rope_theta": 500000}})
    b = DbrxConfig.from_dict({"d_model": 96, "n_heads": 6.0, "attn_config": {"clip_qkv": 8.0, "rope_theta": 5e5}})
    assert a == b
    assert hash(a) == hash(b)


def test_dtype_is_read_from_either_key():
    assert DbrxConfig.from_dict({"dtype": "float32"}).dtype == "float32"
    assert DbrxConfig.from_dict({"torch_dtype": "torch.float16"}).dtype == "float16"


class TestRopeTheta:
    def test_attn_config_overrides_others_with_a_warning(self):
        data = {
            "attn_config": {"rope_theta": 500000},
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        }
        with pytest.warns(UserWarning, match=r"500000 in attn_config and 10000\.0 outside"):
            assert DbrxConfig.from_dict(data).rope_theta == 5e5

    def test_equal_values_give_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DbrxConfig.from_dict({"attn_config": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 500000}})

    @pytest.mark.parametrize("data", [{"rope_parameters": {"rope_theta": 7e4}}, {"rope_theta": 7e4}])
    def test_other_keys_are_read_without_attn_config_value(self, data):
        assert DbrxConfig.from_dict({"attn_config": {}, **data}).rope_theta == 7e4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model_type": "mixtral"}, "model_type: expected 'dbrx', got 'mixtral'"),
        ({"d_model": "big"}, "d_model: expected a whole number"),
        ({"d_model": 10.5}, "d_model: expected a whole number"),
        ({"d_model": True}, "d_model: expected a whole number"),
        ({"d_model": 10**400}, "d_model: expected a whole number from 1 to"),
        ({"attn_config": {"rope_theta": 10**400}}, "rope_theta: expected a number"),
        ({"n_layers": 1024, "ffn_config": {"moe_num_experts": 1024}}, "moe_num_experts: at most"),
        ({"d_model": 10**12}, "d_model: expected a whole number from 1 to"),
        ({"d_model": float("nan")}, "d_model: expected a whole number"),
        ({"n_layers": 0}, "n_layers: expected a whole number from 1"),
        ({"n_layers": None}, "n_layers: expected a whole number"),
        ({"n_heads": 7}, "n_heads: expected a divisor of d_model 2048, got 7"),
        ({"d_model": 48, "n_heads": 16}, "must be even"),
        ({"attn_config": {"kv_n_heads": 3}}, "kv_n_heads: expected a divisor of n_heads 16, got 3"),
        ({"attn_config": {"clip_qkv": -1}}, "clip_qkv: expected a number"),
        ({"attn_config": {"clip_qkv": 0}}, "clip_qkv: expected a number above 0"),
        ({"attn_config": {"rope_theta": "x"}}, "rope_theta: expected a number"),
        ({"attn_config": {"rope_scaling": "linear"}}, "rope_scaling: expected a JSON object"),
        (
            {"attn_config": {"qk_ln": True}},
            "attn_config.qk_ln: expected false or null, as DBRX has no other, got True; this is a model of another",
        ),
        ({"attn_config": [1]}, "attn_config: expected a JSON object"),
        ({"ffn_config": {"moe_top_k": 9}}, "moe_top_k: expected at most moe_num_experts 4, got 9"),
        ({"ffn_config": {"ffn_act_fn": {"name": "mish"}}}, "ffn_act_fn: expected one of silu"),
        ({"ffn_config": {"ffn_act_fn": {"name": "relu", "beta": 2}}}, "ffn_act_fn: expected a name alone, got {'name'"),
        (
            {"ffn_config": {"moe_normalize_expert_weights": 0}},
            "moe_normalize_expert_weights: expected a number above 0",
        ),
        ({"ffn_config": {"moe_jitter_eps": 1.5}}, "moe_jitter_eps: expected a number below 1"),
        ({"torch_dtype": "int4"}, "torch_dtype: expected one of float32"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected false"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_invalid_values_are_rejected(data, message):
    with pytest.raises(ConfigError) as error:
        DbrxConfig.from_dict(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [f.name for f in dataclasses.fields(DbrxConfig)] + [
    "attn_config",
    "ffn_config",
    "rope_parameters",
    "rope_scaling",
    "rope_hf_config",
    "alibi",
    "ffn_act_fn",
    "name",
    "torch_dtype",
    "model_type",
]


@given(st.dictionaries(st.sampled_from(KEYS), JSON | st.dictionaries(st.sampled_from(KEYS), JSON)))
@pytest.mark.filterwarnings("ignore:config.json gives rope_theta")
def test_any_json_gives_a_config_or_config_error(data):
    try:
        config = DbrxConfig.from_dict(data)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert DbrxConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"d_model": 1, "d_model": 2}', "'d_model' occurs twice"),
        ("[" * 99999, "not valid JSON"),
        ('{"d_model": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_damaged_files_are_rejected(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        DbrxConfig.from_file(tmp_path)


def test_missing_file_and_unknown_name_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        DbrxConfig.from_file(tmp_path)
    with pytest.raises(ConfigError, match=r"no configuration is called 'x': choose one of .*9b"):
        DbrxConfig.from_name("x")
