"""Tests that the model on meshes of eight simulated devices matches the model on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.checkpoint.parameters import parameter_specs, parameters_from_state, parameters_of
from dbrx_jax.errors import MeshError, NotFiniteError
from dbrx_jax.model.graph import parameter_partition_specs
from dbrx_jax.sharding.partition import Partition, make_mesh, parse_axes
from dbrx_jax.sharding.recipes import find_axes, find_mesh, find_recipe, recipe_names
from dbrx_jax.training.step import Losses, losses
from tests.conftest import GOLDEN

MESHES = ("data=8", "fsdp=8", "expert=8", "expert=4,tensor=2", "data=2,expert=2,tensor=2", "fsdp=2,expert=4")
FAST_MESH = "expert=4,tensor=2"  # the one mesh tested without -m slow
SMALL = DbrxConfig(
    d_model=48, n_heads=12, kv_n_heads=4, n_layers=2, vocab_size=83, ffn_hidden_size=56, moe_num_experts=8,
    moe_top_k=3, max_seq_len=512, clip_qkv=1.5, rope_theta=1e4, dtype="float32",
)  # fmt: skip


def mesh_of(text):
    """Returns a mesh of the first of the eight devices."""
    axes = parse_axes(text)
    return make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])


@pytest.mark.parametrize(
    ("case", "axes"),
    [
        pytest.param(case, axes, marks=() if axes == FAST_MESH and case == "fused" else pytest.mark.slow)
        for case, axes in [*(("fused", axes) for axes in MESHES), ("bf16", "data=2,expert=2,tensor=2")]
    ],
)
def test_mesh_matches_oracle(case, axes, expected):
    e = expected[case]
    model = DbrxForCausalLM.from_pretrained(GOLDEN / case, axes, dtype="float32")
    out = model(e["tokens"], e["mask"], output_hidden_states=True, output_router_probs=True)
    valid = e["mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(out.logits)[valid], e["logits"][valid], rtol=0, atol=1e-4)
    np.testing.assert_allclose([h[0] for h in out.hidden_states], e["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose([p[0] for p in out.router_probs], e["router_probs"], rtol=0, atol=1e-5)
    generated = model.generate(e["tokens"], e["mask"], max_new_tokens=e["greedy"].shape[1], eos_token_id=None)
    np.testing.assert_array_equal(generated[:, e["tokens"].shape[1] :], e["greedy"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "axes"),
    [("unnormalised_mqa", "data=2,expert=3"), ("unnormalised_mqa", "fsdp=2,expert=2"), ("dense", "data=2,tensor=4")],
)
def test_mesh_matches_oracle_for_other_shapes(case, axes, expected):
    e = expected[case]
    model = DbrxForCausalLM.from_pretrained(GOLDEN / case, mesh_of(axes), dtype="float32")
    valid = e["mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(model(e["tokens"], e["mask"]))[valid], e["logits"][valid], rtol=0, atol=1e-4)
    generated = model.generate(e["tokens"], e["mask"], max_new_tokens=e["greedy"].shape[1], eos_token_id=None)
    np.testing.assert_array_equal(generated[:, e["tokens"].shape[1] :], e["greedy"])


def gradients(config, parameters, mesh, tokens, all_to_all=False):
    """Returns the training loss and its gradients by parameter name."""
    model = DbrxForCausalLM.from_parameters(config, parameters, mesh, all_to_all=all_to_all)
    graph, params = nnx.split(model)
    partition = model.partition
    rows, replicated = partition.array_spec(("data", "fsdp"), None), partition.array_spec()
    compute_losses = partition.shard_map(
        lambda p, t, m: losses(nnx.merge(graph, p), t, m),
        (parameter_partition_specs(params, partition), rows, rows),
        Losses(replicated, replicated, replicated),
    )
    mask = (np.arange(tokens.size).reshape(tokens.shape) % 5 != 3).astype(np.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: compute_losses(p, tokens, mask).total))(params)
    return float(value), parameters_from_state(config, gradient, mesh)


def assert_same_gradients(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    for name in parameter_specs(SMALL) if len(a[1]) == len(parameter_specs(SMALL)) else a[1]:
        x, y = np.asarray(a[1][name]), np.asarray(b[1][name])
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y) + 1e-9, name


@functools.lru_cache
def golden_gradients():
    model = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", dtype="float32")
    # 24 predicted tokens a row: enough to be split over the experts' devices and sorted into row tiles.
    tokens = np.random.default_rng(3).integers(0, model.config.vocab_size, (8, 25))
    parameters = parameters_of(model)
    return model.config, parameters, tokens, gradients(model.config, parameters, None, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [axes for axes in MESHES if "," in axes] + ["expert=8"])
def test_mesh_gradients_match_one_device(axes):
    config, parameters, tokens, want = golden_gradients()
    assert_same_gradients(gradients(config, parameters, mesh_of(axes), tokens), want)


@functools.lru_cache
def small_parameters(skew):
    """Returns random parameters; with `skew` the router sends nearly all tokens to the first experts."""
    parameters = parameters_of(DbrxForCausalLM(SMALL, rngs=nnx.Rngs(1)))
    if skew:
        for i in range(SMALL.n_layers):
            name = f"blocks.{i}.moe.router"
            bias = np.linspace(skew, -skew, SMALL.moe_num_experts)[:, None] * np.ones(SMALL.d_model)
            parameters[name] = np.asarray(parameters[name]) + bias.astype(np.float32)
            parameters[f"blocks.{i}.norm_2.scale"] = np.abs(np.asarray(parameters[f"blocks.{i}.norm_2.scale"])) + 0.1
    return parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "skew"), [("expert=4,tensor=2", 3), ("expert=4,tensor=2", 0), ("data=2,fsdp=2,expert=2", 3)]
)
def test_all_to_all_matches_one_device(axes, skew):
    """Ragged all-to-all dispatch matches one device, forward and backward, with balanced and skewed routing."""
    parameters, mesh = small_parameters(skew), mesh_of(axes)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, SMALL.vocab_size, (4, 24)), np.arange(24) >= np.array([[0], [3], [11], [20]])
    one = DbrxForCausalLM.from_parameters(SMALL, parameters)
    many = DbrxForCausalLM.from_parameters(SMALL, parameters, mesh, all_to_all=True)
    out, want = (m(ids, mask, output_router_probs=True) for m in (many, one))
    np.testing.assert_allclose(np.asarray(out.logits)[mask], np.asarray(want.logits)[mask], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out.router_probs[1][mask], want.router_probs[1][mask], rtol=0, atol=1e-5)
    tokens = rng.integers(0, SMALL.vocab_size, (4, 25))
    assert_same_gradients(gradients(SMALL, parameters, mesh, tokens, True), gradients(SMALL, parameters, None, tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "num_rows", "length", "skew"), [("fsdp=2,expert=2,tensor=2", 5, 27, 0), ("data=2,expert=4", 3, 7, 3)]
)
def test_ragged_batch_matches_one_device(axes, num_rows, length, skew):
    """Rows and tokens that the mesh does not divide, and routing to few experts."""
    parameters = small_parameters(skew)
    one = DbrxForCausalLM.from_parameters(SMALL, parameters)
    many = DbrxForCausalLM.from_parameters(SMALL, parameters, mesh_of(axes))
    rng = np.random.default_rng(num_rows)
    ids = rng.integers(0, SMALL.vocab_size, (num_rows, length))
    mask = np.arange(length) >= rng.integers(0, length, (num_rows, 1))
    valid = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(many(ids, mask))[valid], np.asarray(one(ids, mask))[valid], rtol=0, atol=1e-4)
    options = {"max_new_tokens": 4, "do_sample": True, "seed": 2, "top_p": 0.95}
    np.testing.assert_array_equal(many.generate(ids, mask, **options), one.generate(ids, mask, **options))


@pytest.mark.slow
def test_gradients_of_odd_lengths_with_skewed_routing_match_one_device():
    tokens = np.random.default_rng(74).integers(0, SMALL.vocab_size, (8, 52))
    parameters, mesh = small_parameters(3), mesh_of("data=2,fsdp=2,expert=2")
    assert_same_gradients(gradients(SMALL, parameters, mesh, tokens), gradients(SMALL, parameters, None, tokens))


@pytest.mark.slow
def test_prompt_of_several_chunks_with_padding_matches_one_device():
    """Three rows over two data shards, the first longer than a chunk; the cache is split over positions."""
    parameters = small_parameters(0)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (3, 150))
    mask = np.arange(150) >= np.array([[0], [140], [30]])
    want = DbrxForCausalLM.from_parameters(SMALL, parameters).generate(ids, mask, max_new_tokens=5)
    many = DbrxForCausalLM.from_parameters(SMALL, parameters, mesh_of("data=2,expert=4"))
    np.testing.assert_array_equal(many.generate(ids, mask, max_new_tokens=5), want)


# Every processor and filter at once, each with an effect.
ALL_OPTIONS = {
    "do_sample": True, "temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.97,
    "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4, "repetition_penalty": 1.2, "frequency_penalty": 0.3,
    "presence_penalty": 0.2, "no_repeat_ngram_size": 2, "logit_bias": {3: 2.0}, "sequence_bias": {(1, 2): 1.0},
    "bad_words_ids": [[5], [6, 7]], "min_new_tokens": 4, "forced_eos_token_id": 11, "suppress_tokens": [8, 9],
    "begin_suppress_tokens": [10], "exponential_decay_length_penalty": (2, 1.1), "eos_token_id": [11, 12],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "batch_invariant"), [("expert=4,tensor=2", False), ("data=2,expert=2,tensor=2", True)]
)
def test_all_options_match_one_device(axes, batch_invariant):
    """Also with functions of logits, saved scores and several continuations of a prompt."""
    parameters = small_parameters(0)
    ids, outputs = [[1, 2, 3, 4], [5, 6]], []
    options = {
        **ALL_OPTIONS, "max_new_tokens": 10, "num_return_sequences": 3, "seed": 4, "return_dict_in_generate": True,
        "output_scores": True, "output_logits": True, "logits_processor": lambda ids, lengths, logits: logits * 1.5,
        "batch_invariant": batch_invariant,
    }  # fmt: skip
    for mesh in (None, mesh_of(axes)):
        outputs.append(DbrxForCausalLM.from_parameters(SMALL, parameters, mesh).generate(ids, **options))
    one, many = outputs
    np.testing.assert_array_equal(many.sequences, one.sequences)
    assert len({tuple(row) for row in one.sequences}) == 6
    for ours, theirs in ((many.logits, one.logits), (many.scores, one.scores)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_parameters_round_trip_through_a_mesh():
    parameters = small_parameters(0)
    for axes in ("expert=8", "fsdp=2,expert=2,tensor=2"):
        restored = parameters_of(DbrxForCausalLM.from_parameters(SMALL, parameters, mesh_of(axes)))
        assert list(restored) == list(parameters)
        for name, value in parameters.items():
            np.testing.assert_array_equal(restored[name], value)


def test_loading_reads_only_rows_of_each_shard(tmp_path, monkeypatch):
    """No read exceeds a shard's rows, and each device stores only its shard."""
    from dbrx_jax.checkpoint.huggingface import HuggingFaceFolder

    read = []
    rows = HuggingFaceFolder.rows
    monkeypatch.setattr(
        HuggingFaceFolder, "rows", lambda self, name, a, b: (read.append((name, b - a)), rows(self, name, a, b))[1]
    )
    model = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", mesh_of("expert=4,tensor=2"), dtype="float32")
    config = model.config
    ffn = [count for name, count in read if name.endswith("w1")]
    assert set(ffn) == {config.ffn_hidden_size // 2}
    assert len(ffn) == 2 * config.moe_num_experts * config.n_layers
    w1 = model.blocks[0].moe.experts[0].w1.get_value()
    assert w1.shape == (4, config.ffn_hidden_size, config.d_model)
    assert {s.data.shape for s in w1.addressable_shards} == {(1, config.ffn_hidden_size // 2, config.d_model)}
    query = model.blocks[0].attention.query.get_value()
    assert {s.data.shape for s in query.addressable_shards} == {(3, config.head_dim, config.d_model // 4)}


def test_random_parameters_are_initialised_as_shards():
    model = DbrxForCausalLM(SMALL, rngs=nnx.Rngs(0), mesh=mesh_of("expert=4,tensor=2"))
    w1 = model.blocks[1].moe.experts[1].w1.get_value()
    assert {s.data.shape for s in w1.addressable_shards} == {(1, 28, 48)}
    assert 0.015 < np.asarray(w1).std() < 0.025
    assert np.isfinite(np.asarray(model([[1, 2, 3]]))).all()


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("tensor=8", "tensor=8 does not divide kv_n_heads 4; 1, 2, 4 would"),
        ("expert=3", "expert=3 does not divide moe_num_experts 8; 1, 2, 4 would"),
        ("fsdp=5", "expert times fsdp=5 does not divide d_model 48; 1, 2, 3, 4, 6, 8 would"),
    ],
)
def test_mesh_that_does_not_divide_the_model_is_rejected(axes, message):
    with pytest.raises(MeshError) as error:
        DbrxForCausalLM(SMALL, rngs=None, mesh=mesh_of(axes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "expert", "expert=", "expert=0", "expert=2,expert=4", "model=2", "expert=-1", "v9"]
)
def test_find_mesh_rejects_invalid_text(text):
    with pytest.raises(MeshError):
        find_mesh(text)


def test_mesh_of_other_size_or_axes_is_rejected():
    with pytest.raises(MeshError, match="makes 4 devices, and there are 8"):
        find_mesh("expert=4")
    with pytest.raises(MeshError, match="no axis is called 'model'"):
        DbrxForCausalLM(SMALL, rngs=None, mesh=jax.make_mesh((8,), ("model",)))


def test_recipes_match_their_names_and_divide_the_model():
    assert find_mesh("cpu-8").shape == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 2}
    config = DbrxConfig.from_name("132b-instruct")
    for name in recipe_names():
        kind, _, count = name.partition("-")
        recipe = find_recipe(name)
        assert recipe.kind == kind
        assert np.prod(list(recipe.axes.values())) == int(count)
        for axis, field in (("tensor", "kv_n_heads"), ("expert", "moe_num_experts")):
            assert getattr(config, field) % recipe.axes.get(axis, 1) == 0, name
    assert find_axes("v5e-64") == {"expert": 16, "tensor": 4}


def test_all_to_all_is_rejected_on_tpu_v5e():
    mesh = Mesh(np.array([FakeDevice(0, 0)]), ("expert",))
    DbrxForCausalLM(SMALL, rngs=None, mesh=mesh, all_to_all=True)
    mesh.devices[0].device_kind = "TPU v5 lite"
    with pytest.raises(MeshError, match="the network of TPU v5e cannot"):
        DbrxForCausalLM(SMALL, rngs=None, mesh=mesh, all_to_all=True)


class FakeDevice:
    """The attributes of a device that the layout of a mesh depends on."""

    platform = device_kind = "gpu"

    def __init__(self, device_id, slice_index):
        self.id, self.slice_index, self.process_index = device_id, slice_index, slice_index


def test_data_axis_spans_slices():
    devices = [FakeDevice(i, i // 4) for i in range(8)]
    grid = make_mesh({"data": 2, "expert": 4}, devices).devices
    assert {d.slice_index for d in grid[0].flat} == {0}
    with pytest.raises(MeshError, match="data or fsdp must be a multiple of the 2 slices"):
        make_mesh({"expert": 8}, devices)


def test_partition_specs_match_parameter_axes():
    partition = Partition(mesh_of("fsdp=2,expert=2,tensor=2"))
    specs = {name: partition.spec(spec.axes) for name, spec in parameter_specs(SMALL).items()}
    assert specs["embedding"] == jax.P(("expert", "tensor"), ("fsdp",))
    assert specs["blocks.0.attention.query"] == jax.P(("tensor",), None, ("expert", "fsdp"))
    assert specs["blocks.0.norm_1.scale"] == jax.P(None)
    sizes = dataclasses.asdict(SMALL)
    assert len({sizes[k] for k in ("d_model", "ffn_hidden_size", "vocab_size")}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("do_sample", [False, True])
def test_row_without_a_usable_token_ends_generation(do_sample):
    """On each shard of the vocabulary, whose last one has padding."""
    model = DbrxForCausalLM.from_pretrained(GOLDEN / "fused", "data=2,expert=2,tensor=2", dtype="float32")
    last = model.config.vocab_size - 1

    def spoil(ids, lengths, logits):
        return logits.at[0, last].set(jnp.nan)

    options = {"max_new_tokens": 2, "do_sample": do_sample, "eos_token_id": None}
    for mistake in ({"logits_processor": spoil}, {"suppress_tokens": range(last + 1)}):
        with pytest.raises(NotFiniteError, match="row 0: the logits of new token 1 are not finite"):
            model.generate([[1, 2], [3, 4]], **mistake, **options)
    tokens = model.generate([[1, 2], [3, 4]], suppress_tokens=range(last), **options)
    assert tokens.tolist() == [[1, 2, last, last], [3, 4, last, last]]
