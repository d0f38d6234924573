"""Tests of the conversion from Hugging Face to Orbax: its result, refused sources, and interrupted conversions."""

import base64
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.checkpoint.huggingface import INDEX
from dbrx_jax.checkpoint.layouts import FUSED, expand
from dbrx_jax.checkpoint.manifest import MANIFEST
from dbrx_jax.checkpoint.orbax import PARAMS
from dbrx_jax.checkpoint.parameters import flatten, parameter_specs
from dbrx_jax.demo import source_folder
from dbrx_jax.errors import CheckpointError, ConfigError, DbrxError
from tests.conftest import GOLDEN

DEMO = source_folder()


def source_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def edit_tensors(folder, name, change):
    """Applies `change` to the dictionary of tensors of the file with tensor `name`, and rewrites the file."""
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def converted_golden(tmp_path_factory):
    destination = tmp_path_factory.mktemp("converted") / "deep" / "fused"
    progress = []
    to_orbax(GOLDEN / "fused", destination, progress=progress.append)
    return destination, progress


class TestConvertedCheckpoint:
    def test_orbax_alone_restores_every_byte(self, converted_golden):
        tree = dict(flatten(ocp.load(converted_golden[0] / PARAMS)))
        config, tensors = DbrxConfig.from_file(GOLDEN / "fused"), source_tensors(GOLDEN / "fused")
        assert set(tree) == set(parameter_specs(config))
        D, K, F = config.d_model, config.head_dim, config.ffn_hidden_size
        Q, G = D, config.kv_n_heads * K
        for i in range(config.n_layers):
            block, out = f"transformer.blocks.{i}", f"blocks.{i}"
            wqkv = tensors[f"{block}.norm_attn_norm.attn.Wqkv.weight"]
            assert_same_bytes(tree[f"{out}.attention.query"], wqkv[:Q].reshape(-1, K, D))
            assert_same_bytes(tree[f"{out}.attention.key"], wqkv[Q : Q + G].reshape(-1, K, D))
            assert_same_bytes(tree[f"{out}.attention.value"], wqkv[Q + G :].reshape(-1, K, D))
            assert_same_bytes(
                tree[f"{out}.attention.out"], tensors[f"{block}.norm_attn_norm.attn.out_proj.weight"].reshape(D, -1, K)
            )
            assert_same_bytes(tree[f"{out}.moe.router"], tensors[f"{block}.ffn.router.layer.weight"])
            assert_same_bytes(tree[f"{out}.norm_1.scale"], tensors[f"{block}.norm_attn_norm.norm_1.weight"])
            assert_same_bytes(tree[f"{out}.norm_2.scale"], tensors[f"{block}.norm_attn_norm.norm_2.weight"])
            for e in range(config.moe_num_experts):
                for w in ("w1", "v1", "w2"):
                    expected = tensors[f"{block}.ffn.experts.mlp.{w}"][e * F : (e + 1) * F]
                    assert_same_bytes(tree[f"{out}.moe.experts.{e}.{w}"], expected)
        assert_same_bytes(tree["embedding"], tensors["transformer.wte.weight"])
        assert_same_bytes(tree["norm_f.scale"], tensors["transformer.norm_f.weight"])
        assert_same_bytes(tree["lm_head"], tensors["lm_head.weight"])

    def test_progress_totals_the_source_bytes(self, converted_golden):
        assert sum(converted_golden[1]) == sum(t.nbytes for t in source_tensors(GOLDEN / "fused").values())

    def test_manifest_lists_source_files_and_config_is_unchanged(self, converted_golden):
        manifest = json.loads((converted_golden[0] / MANIFEST).read_text())
        assert manifest["format_version"] == 3
        assert manifest["source"] == "fused layout"
        assert set(manifest["source_files"]) == {p.name for p in (GOLDEN / "fused").glob("*.safetensors")}
        for name, entry in manifest["source_files"].items():
            assert entry["bytes"] == (GOLDEN / "fused" / name).stat().st_size
        assert DbrxConfig.from_file(converted_golden[0]) == DbrxConfig.from_file(GOLDEN / "fused")

    def test_no_temporary_files_remain(self, converted_golden):
        assert [p.name for p in converted_golden[0].parent.iterdir()] == ["fused"]


def assert_same_bytes(actual, expected):
    assert actual.dtype == expected.dtype
    assert np.array_equal(np.asarray(actual).view(np.uint8), expected.view(np.uint8))


def test_to_orbax_casts_to_the_requested_dtype(tmp_path, expected):
    to_orbax(GOLDEN / "fused", tmp_path / "low", dtype=ml_dtypes.bfloat16)
    tree = dict(flatten(ocp.load(tmp_path / "low" / PARAMS)))
    want = source_tensors(GOLDEN / "fused")["lm_head.weight"].astype(ml_dtypes.bfloat16)
    assert_same_bytes(tree["lm_head"], want)
    assert DbrxConfig.from_file(tmp_path / "low").dtype == "bfloat16"
    model = DbrxForCausalLM.from_pretrained(tmp_path / "low", dtype="float32")
    assert model.dtype == np.float32
    np.testing.assert_array_equal(model.lm_head[...], want.astype(np.float32))


def test_to_orbax_copies_tokenizer_files(fused_copy, tmp_path):
    (fused_copy / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (fused_copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    for name, source in (("tokenizer.json", "tokenizer.json"), ("notes.txt", "config.json")):
        (fused_copy / name).write_bytes((DEMO / source).read_bytes())
    tokens = (f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256))
    (fused_copy / "cl100k_base.tiktoken").write_text("\n".join(tokens))
    to_orbax(fused_copy, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "cl100k_base.tiktoken"}
    assert names == {"config.json", MANIFEST, PARAMS} | copied
    assert DbrxForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == (3,)


def test_to_orbax_reads_one_or_several_files_without_index(tmp_path):
    tensors = source_tensors(GOLDEN / "fused")
    names = sorted(tensors)
    for num_files in (1, 3):
        folder = tmp_path / f"parts{num_files}"
        folder.mkdir()
        shutil.copy(GOLDEN / "fused" / "config.json", folder)
        for i in range(num_files):
            save_file({n: tensors[n] for n in names[i::num_files]}, folder / f"part{i}.safetensors")
        to_orbax(folder, tmp_path / f"out{num_files}")
    a, b = (dict(flatten(ocp.load(tmp_path / f"out{p}" / PARAMS))) for p in (1, 3))
    for name in a:
        assert_same_bytes(a[name], np.asarray(b[name]))


W1 = "transformer.blocks.1.ffn.experts.mlp.w1"


def truncate(folder, num_bytes=1000):
    path = folder / "model-00006-of-00013.safetensors"
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - num_bytes)


def edit_index(change):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def edit_config(**changes):
    def damage(folder):
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | changes))

    return damage


def flip_dtype(folder):
    path = folder / "model-00006-of-00013.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


def drop_tensor(folder):
    edit_tensors(folder, W1, lambda t: t.pop(W1))
    edit_index(lambda index: index["weight_map"].pop(W1))(folder)


DAMAGE = {
    "truncated file": (truncate, "model-00006-of-00013.safetensors: not a whole safetensors file"),
    "empty file": (lambda f: (f / "model-00006-of-00013.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "missing file": (lambda f: (f / "model-00006-of-00013.safetensors").unlink(), "there is no such file"),
    "unsupported dtype": (flip_dtype, f"{W1}: expected dtype F32, BF16 or F16, got I32"),
    "missing tensor": (drop_tensor, f"{W1} is missing"),
    "tensor missing from its indexed file": (lambda f: edit_tensors(f, W1, lambda t: t.pop(W1)), f"does not hold {W1}"),
    "unknown tensor": (
        lambda f: (
            edit_tensors(f, W1, lambda t: t.update({"x.bias": np.zeros(3, np.float32)})),
            edit_index(lambda i: i["weight_map"].update({"x.bias": i["weight_map"][W1]}))(f),
        ),
        "x.bias is not a tensor of this DBRX",
    ),
    "tensor not in the index": (
        lambda f: edit_tensors(f, W1, lambda t: t.update({"x.bias": np.zeros(3, np.float32)})),
        "holds x.bias, which model.safetensors.index.json does not place there",
    ),
    "tensor of wrong shape": (
        lambda f: edit_tensors(f, W1, lambda t: t.update({W1: t[W1][:-1].copy()})),
        f"{W1}: config.json asks for shape (896, 96), got (895, 96)",
    ),
    "transposed tensor": (
        lambda f: edit_tensors(f, W1, lambda t: t.update({W1: t[W1].T.copy()})),
        f"{W1}: config.json asks for shape (896, 96), got (96, 896)",
    ),
    "index to a file outside the folder": (edit_index(lambda i: i["weight_map"].update({W1: "../x"})), "got '../x'"),
    "index with an absolute path": (
        edit_index(lambda i: i["weight_map"].update({W1: "/a.safetensors"})),
        "in this folder",
    ),
    "index with another kind of file": (edit_index(lambda i: i["weight_map"].update({W1: "x.bin"})), "got 'x.bin'"),
    "index with a number for a file": (edit_index(lambda i: i["weight_map"].update({W1: 5})), "got 5"),
    "index without map": (edit_index(lambda i: i.pop("weight_map")), "expected an object weight_map"),
    "index with another total_size": (edit_index(lambda i: i["metadata"].update(total_size=1)), "total_size is 1 and"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "absent config": (lambda f: (f / "config.json").unlink(), "config.json: there is no such file"),
    "config of other sizes": (edit_config(d_model=192), "config.json asks for shape"),
    "config of more layers": (edit_config(n_layers=4), "transformer.blocks.3.norm_attn_norm.norm_1.weight is missing"),
    "config of fewer layers": (edit_config(n_layers=2), "is not a tensor of this DBRX (and 7 more)"),
    "config of another model": (edit_config(model_type="llama"), "model_type: expected 'dbrx'"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "holds no *.safetensors files"),
    "no folder": (lambda f: shutil.rmtree(f), "there is no such folder"),
}


@pytest.mark.parametrize("damage_name", DAMAGE)
def test_damaged_source_is_reported_in_one_line_and_writes_nothing(damage_name, fused_copy, tmp_path):
    damage, message = DAMAGE[damage_name]
    damage(fused_copy)
    before = set(tmp_path.iterdir())
    with pytest.raises((CheckpointError, ConfigError)) as error:
        to_orbax(fused_copy, tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) == before
    with pytest.raises((CheckpointError, ConfigError)):  # the source does not load directly either
        DbrxForCausalLM.from_pretrained(fused_copy)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_header_is_rejected_or_keeps_shapes(tmp_path_factory, data):
    """A change in a file's first kilobyte gives a DbrxError or unchanged shapes."""
    folder = tmp_path_factory.mktemp("mutated")
    for file in (GOLDEN / "dense").glob("[!e]*"):
        shutil.copy(file, folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 1023))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        to_orbax(folder, folder / "out")
    except DbrxError as error:
        assert "\n" not in str(error)
        assert not (folder / "out").exists()
    else:
        config = DbrxConfig.from_file(folder / "out")
        tree = dict(flatten(ocp.load(folder / "out" / PARAMS)))
        assert {n: a.shape for n, a in tree.items()} == {n: s.shape for n, s in parameter_specs(config).items()}


def test_rerun_removes_files_of_an_interrupted_conversion(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dbrx_convert.to_orbax.finish_orbax", stop)
    with pytest.raises(KeyboardInterrupt):
        to_orbax(GOLDEN / "dense", tmp_path / "out")
    monkeypatch.undo()
    incomplete = tmp_path / "out.incomplete"
    (incomplete / "params" / "state" / "lm_head").rename(incomplete / "params" / "state" / "lm_head.part")
    to_orbax(GOLDEN / "dense", tmp_path / "out")
    to_orbax(GOLDEN / "dense", tmp_path / "want")
    a, b = ({str(p.relative_to(d)) for p in d.rglob("*")} for d in (tmp_path / "out", tmp_path / "want"))
    assert a == b
    tree = dict(flatten(ocp.load(tmp_path / "out" / PARAMS)))
    assert_same_bytes(tree["lm_head"], source_tensors(GOLDEN / "dense")["lm_head.weight"])


def test_orbax_source_converts_to_another_dtype(tmp_path):
    to_orbax(GOLDEN / "dense", tmp_path / "a")
    to_orbax(tmp_path / "a", tmp_path / "b", dtype="bfloat16")
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    assert manifest["source"] == "Orbax"
    assert manifest["source_files"]["params/state/lm_head/0.0"] == {"bytes": 270 * 64 * 4}
    want = source_tensors(GOLDEN / "dense")["lm_head.weight"].astype(ml_dtypes.bfloat16)
    assert_same_bytes(dict(flatten(ocp.load(tmp_path / "b" / PARAMS)))["lm_head"], want)


def test_existing_destination_is_rejected_and_unchanged(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        to_orbax(GOLDEN / "dense", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_insufficient_disk_space_is_reported_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(CheckpointError, match=r"5e-09 GB are free and the checkpoint needs 0\.000\d+ GB"):
        to_orbax(GOLDEN / "dense", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_conversion_stopped_by_a_full_disk_can_be_resumed(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dbrx_jax.checkpoint.raw_arrays._copy_some", fail)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(No space left on device\); run the same"):
        to_orbax(GOLDEN / "dense", tmp_path / "out")
    with pytest.raises((CheckpointError, ConfigError)):
        DbrxForCausalLM.from_pretrained(tmp_path / "out.incomplete")
    monkeypatch.undo()
    to_orbax(GOLDEN / "dense", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_relative_paths_convert_and_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "dense", "in")
    to_orbax("in", "out")
    assert DbrxForCausalLM.from_pretrained("out").config.moe_num_experts == 1


CHUNK = "blocks.1.moe.experts.0.w2/0.0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MANIFEST).unlink(), "out: its manifest dbrx_jax.json is missing"),
        (lambda f: (f / MANIFEST).write_text('{"format_version": 99}'), "format_version: expected 1, 2 or 3, got 99"),
        (lambda f: shutil.rmtree(f / PARAMS), "params/state: the weights are missing"),
        (lambda f: (f / PARAMS / "state" / CHUNK).unlink(), f"{CHUNK}: is missing; convert"),
        (lambda f: os.truncate(f / PARAMS / "state" / CHUNK, 36863), f"{CHUNK}: is not 36864 bytes long"),
        (lambda f: (f / PARAMS / "state" / "lm_head" / ".zarray").write_text("{}"), "not the description of an array"),
        (lambda f: (f / PARAMS / "state" / "lm_head" / ".zarray").unlink(), "there is no such file"),
        (lambda f: (f / "config.json").unlink(), "config.json: there is no such file"),
        (edit_config(n_layers=3), "n_layers is 3, but 2 when the weights were written"),
        (edit_config(vocab_size=271), "vocab_size is 271, but 270 when the weights were written"),
    ],
)
def test_damaged_orbax_folder_is_rejected(tmp_path, damage, message):
    to_orbax(GOLDEN / "dense", tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises((CheckpointError, ConfigError)) as error:
        DbrxForCausalLM.from_pretrained(tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_fused_layout_covers_every_parameter_once():
    for name in ("132b-base", "dense-a", "demo"):
        config = DbrxConfig.from_name(name)
        parts = [p.parameter for tensor in expand(FUSED, config).values() for p in tensor.parts]
        assert len(parts) == len(set(parts))
        assert set(parts) == set(parameter_specs(config))
    full = expand(FUSED, DbrxConfig.from_name("132b-base"))
    assert len(full) == 323
    assert full["transformer.blocks.39.ffn.experts.mlp.w2"].shape == (16 * 10752, 6144)
    assert full["transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"].shape == (8192, 6144)
