"""Tests of checkpoint layouts: equal parameters from each, round trips, quantised sources and verification."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dbrx_convert.inspect import inspect
from dbrx_convert.to_hf import to_hf
from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.verify import check_digests, compare, compare_logits
from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.checkpoint.folder import shape_of
from dbrx_jax.checkpoint.huggingface import INDEX
from dbrx_jax.checkpoint.layouts import FUSED, LAYOUTS, expand, recognise
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.parameters import parameter_specs
from dbrx_jax.errors import CheckpointError
from tests.commands import in_process
from tests.conftest import CASES, GOLDEN


def load_tensors(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_layout(folder, key, source=GOLDEN / "fused"):
    """Writes golden/fused in another layout: renamed, split and transposed."""
    folder.mkdir()
    experts, attention = key
    config = DbrxConfig.from_file(source)
    F, E, D = config.ffn_hidden_size, config.moe_num_experts, config.d_model
    kv = config.kv_n_heads * config.head_dim
    result = {}
    for name, x in load_tensors(source).items():
        stem, _, w = name.rpartition(".")
        if stem.endswith("ffn.experts.mlp") and experts != "fused":
            for e in range(E):
                piece = x[e * F : (e + 1) * F]
                prefix = stem if experts == "per expert" else stem.removesuffix(".mlp")
                result[f"{prefix}.{e}.{w}.weight"] = np.ascontiguousarray(piece.T if w == "w2" else piece)
        elif name.endswith("attn.Wqkv.weight") and attention != "fused":
            for piece, rows in zip(("q", "k", "v"), np.split(x, [D, D + kv]), strict=True):
                result[name.replace("Wqkv", f"{piece}_proj")] = np.ascontiguousarray(rows)
        else:
            result[name] = x
    save_file(result, folder / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((source / "config.json").read_text())
    data["ffn_config"] |= {"top_k": 50, "return_dict": True}
    (folder / "config.json").write_text(json.dumps(data))


def add_to_config(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def checkpoints_equal(a, b):
    return list(compare(open_folder(a), open_folder(b))) == []


@pytest.mark.parametrize("key", LAYOUTS)
def test_layouts_are_recognised_and_convert_to_equal_parameters(tmp_path, key):
    write_layout(tmp_path / "in", key)
    assert recognise(load_tensors(tmp_path / "in")) is LAYOUTS[key]
    to_orbax(tmp_path / "in", tmp_path / "out")
    to_orbax(GOLDEN / "fused", tmp_path / "want")
    assert checkpoints_equal(tmp_path / "out", tmp_path / "want")
    assert checkpoints_equal(tmp_path / "in", tmp_path / "want")
    to_hf(tmp_path / "out", tmp_path / "back")
    back, want = load_tensors(tmp_path / "back"), load_tensors(GOLDEN / "fused")
    assert set(back) == set(want)
    for name, x in want.items():
        assert back[name].dtype == x.dtype
        assert back[name].tobytes() == x.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_round_trip_restores_every_byte(tmp_path, case):
    to_orbax(GOLDEN / case, tmp_path / "orbax")
    to_hf(tmp_path / "orbax", tmp_path / "back", max_shard_size=350_000)
    want, back = load_tensors(GOLDEN / case), load_tensors(tmp_path / "back")
    assert set(back) == set(want)
    assert all(back[n].tobytes() == x.tobytes() and back[n].dtype == x.dtype for n, x in want.items())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in want.values())
    assert {f.name for f in files} == set(index["weight_map"].values())
    for file in files:
        stored = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in stored)
        assert sum(x.nbytes for x in stored.values()) <= 350_000 or len(stored) == 1
    assert DbrxConfig.from_file(tmp_path / "back") == DbrxConfig.from_file(GOLDEN / case)
    x = np.arange(12)[None]
    np.testing.assert_array_equal(
        DbrxForCausalLM.from_pretrained(tmp_path / "back")(x), DbrxForCausalLM.from_pretrained(GOLDEN / case)(x)
    )


def test_commands_show_progress_in_bytes_of_the_source(tmp_path, monkeypatch):
    """Each command's progress ends at its total, the source's bytes: float32, bfloat16, and int8 with scales."""
    runs = []

    @contextlib.contextmanager
    def record(label, num_bytes):
        counts = []
        runs.append((num_bytes, counts))
        yield counts.append

    monkeypatch.setattr("dbrx_convert.cli.progress", record)
    plain, low, quantised = (GOLDEN / "fused", tmp_path / "low", tmp_path / "int8")
    for source, *arguments in (
        (plain, "to-orbax", plain, low, "--dtype", "bfloat16"),
        (low, "to-orbax", low, quantised, "--quantization", "int8"),
        (low, "to-hf", low, tmp_path / "float32", "--dtype", "float32"),
        (quantised, "to-hf", quantised, tmp_path / "dequantised"),
        (low, "verify", low),
        (plain, "verify", plain, low),
        (quantised, "verify", quantised, plain),
    ):
        done = in_process("dbrx-convert", *arguments)
        assert done.returncode in (0, 1), done.stderr
        num_bytes, counts = runs.pop()
        assert num_bytes == open_folder(source).size
        assert abs(sum(counts) - num_bytes) <= len(counts)  # rounded to whole bytes
    assert not runs


def test_shards_match_the_published_order_and_count():
    from dbrx_jax.checkpoint.write_huggingface import SHARD, plan_shards

    config = DbrxConfig.from_name("132b-base")
    shards = plan_shards(expand(FUSED, config), np.dtype(ml_dtypes.bfloat16), SHARD)
    names = [name for shard in shards for name in shard.tensors]
    assert names[0] == "transformer.wte.weight"
    assert names[-1] == "lm_head.weight"
    assert names.index("transformer.blocks.9.ffn.experts.mlp.w1") < names.index(
        "transformer.blocks.10.ffn.experts.mlp.w1"
    )
    assert sum(s.size(np.dtype(ml_dtypes.bfloat16)) for s in shards) == 263_193_047_040
    assert all(s.size(np.dtype(ml_dtypes.bfloat16)) <= SHARD for s in shards)
    assert len(shards) == 61  # as published


class TestQuantised:
    def test_mlx_4_bit_groups_match_reference(self, tmp_path):
        """4 bits in groups of 32 along rows, packed by this test. Golden rows have 96 and 56 elements, not all
        multiples of 32, so the test chooses its sizes."""
        rng = np.random.default_rng(0)
        config = {
            "model_type": "dbrx",
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 1,
            "vocab_size": 50,
            "attn_config": {"kv_n_heads": 2},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 3},
            "quantization": {"bits": 4, "group_size": 32},
        }
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors, expected = {}, {}
        for name, tensor in expand(LAYOUTS["MLX", "split q/k/v"], DbrxConfig.from_dict(config)).items():
            if len(tensor.shape) == 1:
                tensors[name] = expected[name] = rng.normal(size=tensor.shape).astype(np.float16)
                continue
            rows, columns = tensor.shape
            codes = rng.integers(0, 16, (rows, columns), dtype=np.uint32)
            packed = np.zeros((rows, columns // 8), np.uint32)
            for i in range(8):
                packed |= codes[:, i::8] << np.uint32(4 * i)
            scales, biases = (rng.normal(size=(rows, columns // 32)).astype(np.float16) for _ in range(2))
            stem = name.removesuffix(".weight")
            tensors |= {name: packed, f"{stem}.scales": scales, f"{stem}.biases": biases}
            exact = codes * np.repeat(scales.astype(np.float64), 32, 1) + np.repeat(biases.astype(np.float64), 32, 1)
            expected[name] = exact
        save_file(tensors, folder / "model.safetensors")
        add_to_config(folder, quantization_config={"bits": 8, "group_size": 32})
        with pytest.raises(CheckpointError, match=r"quantization_config: says MLX 8-bit .* tensors are MLX 4-bit"):
            open_folder(folder)
        add_to_config(folder, quantization_config=config["quantization"])
        opened = open_folder(folder)
        assert opened.description == "MLX, split q/k/v layout, MLX 4-bit in groups of 32"
        for name, tensor in opened.tensors.items():
            actual = opened.rows(tensor.parts[0].parameter, 0, shape_of(opened, tensor.parts[0].parameter)[0])
            exact = expected[name].T if tensor.transposed else expected[name]
            np.testing.assert_allclose(actual, exact, rtol=1e-3, atol=1e-3)
        to_orbax(folder, tmp_path / "out")
        assert checkpoints_equal(folder, tmp_path / "out")
        assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
        assert DbrxForCausalLM.from_pretrained(tmp_path / "out").dtype == np.float16

    @pytest.mark.parametrize("per_expert", [False, True])
    def test_fp8_scales_match_reference(self, tmp_path, per_expert):
        config = DbrxConfig.from_file(GOLDEN / "fused")
        E, F = config.moe_num_experts, config.ffn_hidden_size
        folder = tmp_path / "in"
        folder.mkdir()
        shutil.copy(GOLDEN / "fused" / "config.json", folder)
        rng = np.random.default_rng(0)
        tensors, expected = {}, {}
        for name, x in load_tensors(GOLDEN / "fused").items():
            if "experts" not in name:
                tensors[name] = expected[name] = x.astype(ml_dtypes.bfloat16)
                continue
            values = x.astype(ml_dtypes.float8_e4m3fn)
            scale = rng.uniform(0.5, 2, E if per_expert else 1).astype(np.float32)
            tensors |= {name: values, f"{name}_scale": scale if per_expert else np.array(scale[0])}
            row_scale = np.repeat(scale, F if per_expert else E * F)[:, None]
            expected[name] = (values.astype(np.float32) * row_scale).astype(ml_dtypes.bfloat16)
        save_file(tensors, folder / "model.safetensors")
        add_to_config(folder, quantization_config={"quant_method": "fp8"})
        to_orbax(folder, tmp_path / "out")
        to_hf(tmp_path / "out", tmp_path / "back")
        round_trip = load_tensors(tmp_path / "back")
        assert open_folder(folder).description == "fused layout, FP8"
        assert all(round_trip[n].tobytes() == x.tobytes() for n, x in expected.items())

    def test_invalid_fp8_scales_are_rejected_by_name(self, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        shutil.copy(GOLDEN / "fused" / "config.json", folder)
        name = "transformer.blocks.0.ffn.experts.mlp.w1"
        wrong = (np.ones(7, np.float32), np.ones(1, np.uint32))
        for scale, text in ((None, "is FP8, and"), *((x, "one float, or one for each expert, got") for x in wrong)):
            tensors = load_tensors(GOLDEN / "fused")
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            if scale is not None:
                tensors[f"{name}_scale"] = scale
            save_file(tensors, folder / "model.safetensors")
            with pytest.raises(CheckpointError) as error:
                open_folder(folder)
            assert text in str(error.value)
            assert name in str(error.value)


class TestOptions:
    def test_compressed_cast_has_equal_parameters_and_digests(self, tmp_path):
        to_orbax(GOLDEN / "fused", tmp_path / "small", dtype="bfloat16", compress=True, workers=3)
        to_orbax(GOLDEN / "fused", tmp_path / "plain", dtype="bfloat16", workers=1)
        assert checkpoints_equal(tmp_path / "small", tmp_path / "plain")
        small, plain = open_folder(tmp_path / "small"), open_folder(tmp_path / "plain")
        assert small.manifest["arrays"] == plain.manifest["arrays"]
        assert check_digests(small) == check_digests(plain) == []
        differences = list(compare(plain, open_folder(GOLDEN / "fused")))
        assert {d.kind for d in differences} <= {"values", "dtype"}
        assert max(d.relative for d in differences) < 2**-8
        x = np.arange(9)[None]
        np.testing.assert_array_equal(
            DbrxForCausalLM.from_pretrained(tmp_path / "small")(x),
            DbrxForCausalLM.from_pretrained(tmp_path / "plain")(x),
        )
        with (tmp_path / "plain/params/state/lm_head/0.0").open("r+b") as f:
            f.write(b"\x01")
        assert check_digests(open_folder(tmp_path / "plain")) == ["lm_head/0.0"]

    def test_several_chunks_restore_every_parameter(self, tmp_path, monkeypatch):
        """Chunks of rows over many files, the last one partial; each head has several source rows."""
        monkeypatch.setattr("dbrx_jax.checkpoint.raw_arrays.CHUNK", 5000)
        monkeypatch.setattr("dbrx_jax.checkpoint.folder.BLOCK", 3000)
        to_orbax(GOLDEN / "fused", tmp_path / "out")
        assert len(list((tmp_path / "out/params/state/lm_head").iterdir())) > 10
        assert checkpoints_equal(tmp_path / "out", GOLDEN / "fused")
        to_hf(tmp_path / "out", tmp_path / "back")
        assert checkpoints_equal(tmp_path / "back", GOLDEN / "fused")
        tree = restore_with_orbax_alone(tmp_path / "out", 1)
        assert tree == {
            name: list(spec.shape) for name, spec in parameter_specs(open_folder(tmp_path / "out").config).items()
        }


def restore_with_orbax_alone(folder, num_devices):
    """Restores onto a mesh without importing dbrx_jax, compares with the source's bytes and returns the shapes."""
    code = """
import json, sys, os
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp
path, n = sys.argv[1], int(sys.argv[2])
assert jax.device_count() == n
mesh = Mesh(np.array(jax.devices()), ("x",))
def target(leaf):
    axis = next((i for i, d in enumerate(leaf.shape) if d % n == 0), None)
    spec = P() if axis is None else P(*[None] * axis, "x")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
tree = ocp.load(path, jax.tree.map(target, ocp.metadata(path).metadata))
assert "dbrx_jax" not in sys.modules
flat = {".".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
assert all(isinstance(x, jax.Array) for x in flat.values())
np.savez(sys.argv[3], **{k: np.asarray(v).view(np.uint8) for k, v in flat.items()})
print(json.dumps({k: list(v.shape) for k, v in flat.items()}))
"""
    out = folder.parent / f"restored{num_devices}.npz"
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code, folder / "params", str(num_devices), out], capture_output=True, text=True, env=env
    )
    assert result.returncode == 0, result.stderr
    assert "malformed" not in result.stderr
    opened = open_folder(folder)
    restored = np.load(out)
    for name in parameter_specs(opened.config):
        expected = opened.rows(name, 0, shape_of(opened, name)[0])
        assert restored[name].tobytes() == expected.tobytes(), name
    return json.loads(result.stdout)


@pytest.mark.parametrize("num_devices", [1, 4, 8])
def test_orbax_alone_restores_onto_a_mesh(tmp_path, num_devices):
    to_orbax(GOLDEN / "bf16", tmp_path / "out")
    shapes = restore_with_orbax_alone(tmp_path / "out", num_devices)
    assert shapes == {n: list(s.shape) for n, s in parameter_specs(open_folder(tmp_path / "out").config).items()}


class TestVerify:
    def test_compare_reports_first_index_and_largest_error(self, tmp_path):
        shutil.copytree(GOLDEN / "dense", tmp_path / "b")
        tensors = load_tensors(tmp_path / "b")
        tensors["lm_head.weight"][7, 3] += 2.0
        tensors["lm_head.weight"][9, 1] -= 5.0
        tensors["transformer.norm_f.weight"][2] = np.nan
        save_file(tensors, tmp_path / "b" / "model.safetensors")
        a, b = open_folder(GOLDEN / "dense"), open_folder(tmp_path / "b")
        by_name = {d.name: d for d in compare(a, b)}
        assert set(by_name) == {"lm_head", "norm_f.scale"}
        assert by_name["lm_head"].first == (7, 3)
        assert by_name["lm_head"].largest == pytest.approx(5.0, rel=1e-5)
        assert by_name["norm_f.scale"].first == (2,)
        facts = inspect(tmp_path / "b", values=True)
        assert facts["not_finite"] == 1
        assert "norm_f.scale: 1 values are not finite" in facts["problems"]
        assert list(compare(b, b)) == []  # NaN equals the same NaN

    def test_compare_reports_missing_parameters_and_shapes(self):
        kinds = {d.kind for d in compare(open_folder(GOLDEN / "dense"), open_folder(GOLDEN / "unnormalised_mqa"))}
        assert kinds == {"missing", "shape"}

    def test_compare_logits_measures_kl_and_router_agreement(self, tmp_path):
        ids = list(range(60))
        same = compare_logits(GOLDEN / "fused", GOLDEN / "fused", ids)
        assert (same.tokens, same.kl_nats, same.top_1, same.top_5, same.router) == (60, 0.0, 1.0, 1.0, 1.0)
        to_orbax(GOLDEN / "fused", tmp_path / "low", dtype="bfloat16")
        close = compare_logits(GOLDEN / "fused", tmp_path / "low", ids)
        assert 0 < close.kl_nats < 0.2
        assert 0.5 < close.router < 1
        with pytest.raises(CheckpointError, match="different vocabularies"):
            compare_logits(GOLDEN / "fused", GOLDEN / "bf16", ids)


def test_inspect_reports_layout_size_and_problems():
    facts = inspect(GOLDEN / "fused")
    assert facts["kind"] == "fused layout"
    assert facts["parameters"] == 927_840
    assert facts["bytes"] == 3_711_360
    assert facts["files"] == 13
    assert any("vocabulary" in p for p in facts["problems"])  # there is no tokenizer
