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
from dbrx_jax.checkpoint.manifest import MANIFEST
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import MemoryLimitError, MeshError, PlanError
from dbrx_jax.host_memory import total_memory
from dbrx_jax.planning.compile import _holds_expert
from dbrx_jax.planning.loading import loading
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
from tests.commands import in_process
from tests.conftest import GOLDEN
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
    """A token takes 163,840 bytes in bfloat16; a spare block of 128 is on each device."""
    assert cache_bytes(setting()) == (64 * 4096 // 16 + 128) * 163840 // 4
    assert cache_bytes(setting(axes={"expert": 1}, kind="h200", batch=1, context=32768)) == (32768 + 128) * 163840


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
    assert suggestions == ["int8 weights", "2 rows", "32 devices (mesh expert=16,tensor=2)"]
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


def facts_of(*arguments):
    return json.loads(in_process("dbrx-jax", "plan", *arguments, "--json").stdout)


class TestCommand:
    def test_plan_prints_a_page(self):
        done = command("dbrx-jax", "plan", "--on", "v5e-64", "--batch", "64")
        assert done.returncode == 0, done.stderr
        model, mesh, *_ = done.stdout.splitlines()
        assert model == "132b-instruct on 64 x v5e, bfloat16, batch 64, context 4096"
        assert mesh == "--mesh expert=16,tensor=4"
        assert "it fits" in done.stdout
        assert "  batch    all rows    each row " in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80

    def test_plan_prints_json(self):
        done = in_process("dbrx-jax", "plan", "132b-base", "--on", "h200-1", "--quantization", "int8", "--json")
        facts = json.loads(done.stdout)
        assert facts["axes"] == {"expert": 1}
        assert facts["fits"] is True
        assert np.isclose(sum(facts["memory"]["parameters"].values()), 132e9, rtol=0.01)

    def test_plan_suggests_settings_that_fit(self):
        done = command("dbrx-jax", "plan", "--on", "h100-2")
        assert done.returncode == 1
        assert "it does not fit; it would with int8 weights, or 4 devices (mesh expert=4)\n" in done.stdout
        assert done.stderr == ""
        facts = json.loads(in_process("dbrx-jax", "plan", "--on", "h100-2", "--json").stdout)
        assert facts["ways_to_fit"] == ["int8 weights", "4 devices (mesh expert=4)"]

    def test_compiler_that_runs_out_of_memory_ends_in_a_line_after_the_page(self, monkeypatch):
        def refuse(setting):
            raise MemoryLimitError("decode: the compiler says that it does not fit: too large")

        monkeypatch.setattr("dbrx_jax.planning.compile.compile_programs", refuse)
        done = in_process("dbrx-jax", "plan", "--on", "h100-8", "--compile")
        assert done.returncode == 1
        assert done.stdout == in_process("dbrx-jax", "plan", "--on", "h100-8").stdout
        assert done.stderr.endswith("dbrx-jax: decode: the compiler says that it does not fit: too large\n")

    @pytest.mark.parametrize(
        ("on", "devices", "mesh"),
        [
            ("h100x8", "8 x h100", "expert=8"),
            ("H100-4", "4 x h100", "expert=4"),
            ("h100x16", "16 x h100", "data=2,expert=8"),
            ("a100x8", "8 x a100", "expert=8"),
            ("b200-2", "2 x b200", "expert=2"),
            ("v4-32", "32 x v4", "expert=16,tensor=2"),
            ("tpu7x-8", "8 x tpu7x", "expert=8"),
        ],
    )
    def test_plan_knows_kinds_and_takes_its_own_mesh(self, on, devices, mesh):
        facts = facts_of("--on", on)
        assert (facts["devices"], facts["mesh"], facts["fits"]) == (devices, mesh, True)
        assert facts_of("--on", on, "--mesh", facts["mesh"]) == facts

    def test_plan_of_this_machine_has_no_rates_unless_given(self):
        page = in_process("dbrx-jax", "plan", "demo", "--on", "cpu").stdout
        assert page.startswith("demo on 1 x cpu, bfloat16, batch 1, context 1024\n--mesh expert=1\n")
        assert "rates are not known" in page
        facts = facts_of("demo", "--on", "cpu-8", "--memory-rate", "40")
        assert facts["mesh"] == "expert=4,tensor=2"  # of the recipe
        assert facts["memory"]["usable"] == total_memory() // 8
        one, prompt = facts["decode"]["1"], facts["prefill"]
        assert one["tokens_per_second"] == pytest.approx(5e9 / one["read"])
        assert (one["seconds_computing"], one["seconds_sending"], prompt["tokens_per_second"]) == (None, None, None)
        assert "unknown" in in_process("dbrx-jax", "plan", "demo", "--on", "cpu-8", "--memory-rate", "40").stdout

    def test_plan_has_the_dtype_and_quantization_of_generate(self):
        plain, cast, small = (facts_of("demo", *a) for a in ([], ["--dtype", "float32"], ["--quantization", "int8"]))
        assert [(f["dtype"], f["quantization"]) for f in (plain, cast, small)] == [
            ("bfloat16", None), ("float32", None), ("bfloat16", "int8")
        ]  # fmt: skip
        both = facts_of("demo", "--quantization", "int8", "--dtype", "float32")
        assert (both["dtype"], both["quantization"]) == ("float32", "int8")
        assert both["memory"]["cache"] == 2 * small["memory"]["cache"]
        assert in_process("dbrx-jax", "plan", "--dtype", "int8").returncode == 2

    def test_plan_takes_a_checkpoints_quantisation(self, tmp_path):
        done = command("dbrx-convert", "to-orbax", GOLDEN / "dense", tmp_path / "small", "--quantization", "int8")
        assert done.returncode == 0, done.stderr
        assert facts_of(tmp_path / "small", "--on", "v5e-1")["quantization"] == "int8"
        done = in_process("dbrx-jax", "plan", tmp_path / "small", "--on", "v5e-1", "--quantization", "int4")
        assert done.returncode == 2
        assert "are int8 already; plan for what it was made from" in done.stderr
        manifest = tmp_path / "small" / MANIFEST
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"quantization": 8}))
        done = in_process("dbrx-jax", "plan", tmp_path / "small", "--on", "v5e-1")
        assert done.returncode == 2
        assert done.stderr.endswith(
            "dbrx_jax.json: quantization: does not go with the format's version; convert again\n"
        )

    def test_plan_says_what_loading_takes(self):
        facts = facts_of("--on", "v5e-64", "--quantization", "int4", "--read-rate", "2")
        host = facts["loading"]
        assert host["devices"] == 4
        replicated = facts["memory"]["parameters"]["routers and norms"]  # read once
        assert host["read"] == 4 * (sum(facts["memory"]["parameters"].values()) - replicated) + replicated
        assert host["seconds"] == pytest.approx(host["read"] / 2e9)
        assert host["read_float"] == pytest.approx(263e9 / 16, rel=0.01)
        page = in_process("dbrx-jax", "plan", "--read-rate", "2").stdout
        assert "loading, on each host with its 4 devices" in page
        assert "at 2 GB/s (--read-rate)" in page

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--on", "v9-4"], "--on: expected devices such as v5e-64 or h100x8, of the kinds v4, v5e, "),
            (["--on", "v5e"], "tpu7x, a100, h100, h200, b200, cpu, got 'v5e'"),
            (["--on", "v5e-63"], "v5e-63: there is no such slice of v5e; choose 32 or 64 devices (all: 1, 4, 8, 16, "),
            (["--on", f"v5e-{10**20}"], "there is no such slice of v5e; choose 256 devices"),
            (["--on", f"h100-{10**20}"], "1 to 8 devices of h100, or whole hosts of 8: 16, 24, … 8192"),
            (["--on", "h100x0000000001" + "0" * 5000], "1 to 8 devices of h100, or whole hosts of 8"),
            (["--mesh", "expert=2"], "makes 2 devices, and --on says 64"),
            (["--mesh", "expert=000000001" + "9" * 5000], "expected a recipe or axes"),
            (["--on", "v5e-16", "--mesh", "tensor=16"], "tensor=16 does not divide kv_n_heads 8"),
            (["--on", "h100x16", "--mesh", "expert=16"], "data or fsdp must be a multiple of the 2 hosts"),
            (["nosuch"], "neither a folder with config.json nor one of"),
            (["--batch", "0"], "--batch: expected a whole number from 1 to 1,048,576, got 0"),
            (["--batch", str(10**12)], f"--batch: expected a whole number from 1 to 1,048,576, got {10**12}"),
            (["--context", "0"], "--context: expected a whole number above 0, got 0"),
            (["--read-rate", "0"], "--read-rate: expected GB/s above 0, got 0.0"),
            (["--memory-rate", "nan"], "--memory-rate: expected GB/s above 0, got nan"),
            (["--on", "h100x16", "--compile"], "no slice of h100 has 16 chips: choose one of 1, 2, 4, 8"),
            (["--on", "b200x8", "--compile"], "cannot compile for b200, whose description is not known"),
            (["--on", "cpu", "--compile"], "cannot compile for cpu, whose description is not known"),
            (["--context", "99999"], "beyond the model's 32768 positions"),
            (["--quantization", "int3"], "quantization: expected int8, int4"),
            (["--quantization", "int4", "--on", "h100-8", "--mesh", "tensor=8"], "ffn 10752 in its 84 groups"),
        ],
    )
    def test_plan_rejects_invalid_arguments(self, arguments, message):
        done = in_process("dbrx-jax", "plan", *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_invalid_axes_and_target_are_rejected():
    with pytest.raises(MeshError):
        memory(setting(axes={"expert": 3}))
    with pytest.raises(PlanError):
        target("nosuch")


def test_hosts_of_gpus_are_linked_by_their_network():
    """Weights that fsdp gathers between hosts take the network's rate, those within a host the links'."""
    axes = {"fsdp": 2, "expert": 8}
    two_hosts, one_host = setting("h100", axes=axes), setting("h100", axes={"fsdp": 2, "expert": 4})
    weights = sum(m.moved for m in messages(two_hosts, two_hosts.rows, False) if "weights" in m.what)
    rest = sum(m.moved for m in messages(two_hosts, two_hosts.rows, False) if "weights" not in m.what)
    sending = decode_roofline(two_hosts).seconds_sending
    assert sending == pytest.approx(weights / 50e9 + rest / 450e9, rel=1e-4)
    within = sum(m.moved for m in messages(one_host, one_host.rows, False))
    assert decode_roofline(one_host).seconds_sending == pytest.approx(within / 450e9)
    assert decode_roofline(setting("v4", axes={"fsdp": 2, "expert": 8})).seconds_sending == pytest.approx(
        (weights + rest) / 300e9, rel=1e-4
    )


def test_rates_are_of_one_row_and_of_all():
    roof = decode_roofline(setting("h100", axes={"data": 2, "expert": 8}, batch=64))
    assert roof.tokens_per_second == pytest.approx(64 * roof.tokens_per_second_of_row)
    prompts = prefill_roofline(setting("h100", axes={"data": 2, "expert": 8}))
    assert prompts.tokens_per_second == pytest.approx(2 * prompts.tokens_per_second_of_row)  # one in each group


def test_cache_holds_the_rows_and_a_spare_block():
    planned = memory(setting(axes={"data": 2, "expert": 16}, batch=6))
    assert planned.cache == (3 * 4096 // 16 + 128) * 163840
    others = planned.state + planned.working + sum(planned.parameters.values())
    assert planned.total == others + planned.cache


def test_host_memory_is_that_of_the_largest_arrays_in_flight():
    """The four readers hold embedding, head and two experts' weights, and a parameter each as it is read."""
    single = setting("h200", axes={"expert": 1})
    vocabulary, expert = 100352 * 6144 * 2, 10752 * 6144 * 2
    assert loading(single).memory == 2 * (2 * vocabulary + 2 * expert)
    assert loading(single).read == sum(memory(single).parameters.values())
    host = loading(setting("v5e", axes={"data": 2, "expert": 16, "tensor": 2}))  # four devices have half of two experts
    shards = 2 * vocabulary // 8 + 2 * 2 * expert
    assert host.memory == shards + 2 * vocabulary + 2 * expert
    kernels = dataclasses.replace(single.target, platform="tpu")  # with kernels one array has all experts
    assert loading(dataclasses.replace(single, target=kernels)).memory == 2 * (2 * vocabulary + 17 * expert)


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
