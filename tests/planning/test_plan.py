"""Tests of memory plans and rooflines against independent sums, and of the plan command."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbrx_jax import DbrxForCausalLM
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import MeshError, PlanError
from dbrx_jax.planning.compile import _holds_expert
from dbrx_jax.planning.plan import (
    Setting,
    cache_bytes,
    decode_roofline,
    distinct_experts,
    fits,
    memory,
    messages,
    prefill_roofline,
    smallest,
    suggest_axes,
    ways_to_fit,
)
from dbrx_jax.planning.targets import target
from tests.cli.test_cli import command
from tests.sharding.test_mesh import SMALL, mesh_of, small_parameters

DBRX = DbrxConfig.from_name("132b-instruct")


def setting(kind="v5e", axes=None, precision="bfloat16", batch=64, context=4096, config=DBRX):
    return Setting(config, target(kind), axes or {"expert": 16, "tensor": 4}, precision, batch, context)


def test_parameters_of_all_devices_sum_to_the_model():
    for axes in ({"expert": 16, "tensor": 4}, {"fsdp": 8, "expert": 8}, {"expert": 1}):
        sizes = memory(setting(axes=axes)).parameters
        shards = sum(size for group, size in sizes.items() if group != "routers and norms") * math.prod(axes.values())
        replicated = sizes["routers and norms"]
        assert shards + replicated == DBRX.total_parameters * 2, axes
        assert replicated == 2 * (40 * (16 * 6144 + 2 * 6144) + 6144)


@pytest.mark.parametrize("axes", ["expert=4,tensor=2", "fsdp=2,expert=2,tensor=2", "data=2,expert=4"])
def test_planned_memory_matches_a_sharded_model(axes):
    model = DbrxForCausalLM.from_parameters(SMALL, small_parameters(0), mesh_of(axes))
    arrays = jax.tree.leaves(jax.tree.map(lambda x: x, [p.get_value() for p in _parameters(model)]))
    on_first = sum(a.addressable_shards[0].data.nbytes for a in arrays)
    sizes = dict(zip(model.partition.mesh.axis_names, model.partition.mesh.devices.shape, strict=True))
    planned = memory(setting(axes=sizes, precision="float32", batch=4, context=256, config=SMALL))
    assert sum(planned.parameters.values()) == on_first


def _parameters(model):
    from flax import nnx

    return [leaf for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def test_132b_cache_size_matches_reference():
    """A token takes 163,840 bytes in bfloat16."""
    assert cache_bytes(setting()) * 64 == 64 * 4096 * 163840
    assert cache_bytes(setting(axes={"expert": 1}, kind="h200", batch=1, context=32768)) == 5 << 30


def test_quantised_weights_match_bits_per_weight():
    total = sum(memory(setting(kind="h200", axes={"expert": 1}, precision="int8")).parameters.values())
    assert total == pytest.approx(DBRX.total_parameters, rel=0.001)
    experts = memory(setting(kind="h200", axes={"expert": 1}, precision="int4")).parameters["experts"]
    assert experts == 40 * 16 * 3 * 6144 * 10752 * (0.5 + 2 / 128)


def test_rooflines_match_published_numbers():
    """Bytes at batch 1 with 1k of cache (71.9 GB, int8 36.0) and rates at published bandwidths."""
    options = {"batch": 1, "context": 1024, "axes": {"expert": 1}, "kind": "h200"}
    assert decode_roofline(setting(**options)).read == pytest.approx(71.9e9, rel=0.01)
    int8 = decode_roofline(setting(**options, precision="int8"))
    assert int8.read == pytest.approx(36.0e9, rel=0.01)
    assert int8.tokens_per_second == pytest.approx(133, rel=0.01)
    v5e = decode_roofline(setting(batch=64, context=1024))
    assert v5e.tokens_per_second == pytest.approx(12300, rel=0.03)
    assert [round(distinct_experts(DBRX, n), 1) for n in (1, 2, 4, 8, 16, 32)] == [4, 7, 10.9, 14.4, 15.8, 16]
    # 2 FLOP a parameter and token, at most.
    assert prefill_roofline(setting()).tokens_per_second < 64 * 197e12 / (2 * DBRX.active_parameters)


def test_fits_matches_known_settings():
    assert not fits(setting(axes={"expert": 16}, batch=64))
    assert fits(setting(axes={"expert": 16}, batch=64, precision="int8"))
    assert fits(setting(kind="v6e", axes={"expert": 16}))
    assert not fits(setting(kind="h200", axes={"expert": 1}, batch=1))
    assert fits(setting(kind="h200", axes={"expert": 1}, batch=1, precision="int4"))


def test_ways_to_fit_give_settings_that_fit():
    tight = setting(axes={"expert": 16}, batch=64)
    suggestions = ways_to_fit(tight, (16, 32, 64))
    assert suggestions == ["int8 weights", "2 rows", "32 devices"]
    assert not fits(tight)
    large = setting(axes={"expert": 16, "tensor": 4}, batch=2048, context=32768)
    assert not fits(large)
    (suggestion,) = [s for s in ways_to_fit(large, ()) if s.endswith("rows")]
    rows = int(suggestion.split()[0])
    assert fits(dataclasses.replace(large, batch=rows))
    assert not fits(dataclasses.replace(large, batch=2 * rows))


@settings(max_examples=30)
@given(st.integers(1, 512), st.sampled_from(["9b", "132b-base", "dense-a", "demo"]))
def test_suggested_axes_fit_the_model(devices, name):
    config = DbrxConfig.from_name(name)
    axes = suggest_axes(config, devices)
    assert math.prod(axes.values()) == devices
    assert setting(axes=axes, config=config).partition.size("data", "expert", "tensor") == devices


def test_smallest_finds_known_device_counts():
    smallest_v5e = smallest(DBRX, target("v5e"), "bfloat16", 64, 4096, (8, 16, 32, 64))
    assert smallest_v5e.devices == 32
    assert smallest(DBRX, target("h100"), "bfloat16", 8, 4096, (1, 2, 4, 8)).devices == 4
    assert smallest(DBRX, target("h100"), "float32", 8, 4096, (1, 2, 4)) is None


def test_only_fsdp_sends_weights():
    kinds = {m.what for m in messages(setting(), 64, False)}
    assert not any("weights" in w for w in kinds)
    sharded = messages(setting(axes={"fsdp": 4, "expert": 4, "tensor": 4}), 64, False)
    gathered = sum(m.size for m in sharded if "weights" in m.what)
    assert gathered == sum(
        size * 4 for group, size in memory(setting(axes={"fsdp": 4, "expert": 4, "tensor": 4})).parameters.items()
        if group != "routers and norms"
    )  # fmt: skip
    assert messages(setting(axes={"expert": 1}, kind="h200"), 64, True) == []


@pytest.mark.parametrize(
    ("shape", "is_copy"),
    [
        ("bf16[2688,6144]", True),  # a quarter of an expert's weight
        ("f32[1,6144,2688]", True),
        ("s8[2688,6144]", False),  # as it is stored
        ("bf16[10752,6144]", False),
        ("bf16[2048,2688]", False),  # rows
    ],
)
def test_expert_copies_are_recognised_by_shape(shape, is_copy):
    assert _holds_expert(shape, setting()) is is_copy


class TestCommand:
    def test_plan_prints_a_page(self):
        done = command("dbrx-jax", "plan", "--on", "v5e-64", "--batch", "64")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("64 x v5e (expert 16, tensor 4), bfloat16, batch 64, context 4096\n")
        assert "it fits" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80

    def test_plan_prints_json(self):
        done = command("dbrx-jax", "plan", "132b-base", "--on", "h200-1", "--dtype", "int8", "--json")
        facts = json.loads(done.stdout)
        assert facts["axes"] == {"expert": 1}
        assert facts["fits"] is True
        assert np.isclose(sum(facts["memory"]["parameters"].values()), 132e9, rtol=0.01)

    def test_plan_suggests_settings_that_fit(self):
        done = command("dbrx-jax", "plan", "--on", "h100-2")
        assert "it does not fit; it would with int8 weights, or 4 devices" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--on", "v9-4"], "no accelerator is called 'v9'"),
            (["--on", "v5e"], "expected a kind and a number of devices"),
            (["--mesh", "expert=2"], "makes 2 devices, and --on says 64"),
            (["--on", "v5e-3", "--mesh", "tensor=3"], "tensor=3 does not divide kv_n_heads 8"),
            (["nosuch"], "neither a folder with config.json nor one of"),
            (["--batch", "0"], "--batch: expected a whole number above 0"),
            (["--context", "99999"], "beyond the model's 32768 positions"),
            (["--dtype", "int3"], "--dtype: float32, bfloat16 or a quantisation; quantization: expected int8, int4"),
            (["--dtype", "int4", "--on", "h100-8", "--mesh", "tensor=8"], "does not divide ffn 10752 in its 84 groups"),
        ],
    )
    def test_plan_rejects_invalid_arguments(self, arguments, message):
        done = command("dbrx-jax", "plan", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_invalid_axes_and_target_are_rejected():
    with pytest.raises(MeshError):
        memory(setting(axes={"expert": 3}))
    with pytest.raises(PlanError):
        target("nosuch")


def test_every_recipe_has_a_plan():
    from dbrx_jax.sharding.recipes import find_recipe, recipe_names

    for name in recipe_names():
        recipe = find_recipe(name)
        if recipe.kind != "cpu":
            assert memory(setting(kind=recipe.kind, axes=recipe.axes)).total > 0


def test_int8_cache_takes_one_byte_per_element_and_two_per_scale():
    wide = setting()
    small = dataclasses.replace(wide, cache_dtype="int8")
    K = wide.config.head_dim
    assert cache_bytes(small) * 2 * K == cache_bytes(wide) * (K + 2)
    assert memory(wide).total - memory(small).total == cache_bytes(wide) - cache_bytes(small)
