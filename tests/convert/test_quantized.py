"""Tests of quantised checkpoints: stored bytes, loading, resumed conversion, and damaged folders."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from dbrx_convert.inspect import inspect
from dbrx_convert.to_hf import to_hf
from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.verify import check_digests, compare
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.checkpoint.folder import shape_of
from dbrx_jax.checkpoint.manifest import MANIFEST
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.orbax import PARAMS, STATE
from dbrx_jax.checkpoint.parameters import array_layouts, flatten, parameter_specs, parameters_of
from dbrx_jax.checkpoint.raw_arrays import METADATA
from dbrx_jax.checkpoint.write_orbax import _Writer
from dbrx_jax.demo import source_folder
from dbrx_jax.errors import CheckpointError, DbrxError, QuantizationError
from dbrx_jax.quantization import Quantization, QuantizedArray, quantize
from tests.cli.test_cli import command
from tests.quantization.test_quantization import assert_same_bits
from tests.sharding.test_mesh import mesh_of

DEMO = source_folder()
W2 = "blocks.0.moe.experts.3.w2"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A function from a quantisation to the demo's quantised checkpoint, each converted once."""
    folder, folders = tmp_path_factory.mktemp("quantized"), {}

    def convert(text):
        if text not in folders:
            folders[text] = folder / text.replace("=", "-").replace(",", "-")
            to_orbax(DEMO, folders[text], quantization=text)
        return folders[text]

    return convert


def load_tree(folder):
    return dict(flatten(ocp.load(folder / PARAMS)))


@pytest.mark.parametrize(
    "text", ["int4", *(pytest.param(t, marks=pytest.mark.slow) for t in ("int8", "fp8")), "experts=int4,head=int8"]
)
def test_stored_bytes_match_quantised_weights(text, converted):
    folder, source, q = converted(text), open_folder(DEMO), Quantization.parse(text)
    opened, tree, names = open_folder(folder), load_tree(folder), set()
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["format_version"], manifest["quantization"], manifest["dtype"]) == (3, str(q), "bfloat16")
    for name, spec in parameter_specs(opened.config).items():
        want = source.rows(name, 0, shape_of(source, name)[0]).reshape(spec.shape)
        weight_format = q.format_of(name)
        if weight_format is None:
            names.add(name)
            assert np.asarray(tree[name]).tobytes() == want.tobytes()
            continue
        names |= {f"{name}.values", f"{name}.scale"}
        quantised = quantize(want, weight_format, spec.contracted, "bfloat16")
        stored = [np.asarray(tree[f"{name}.{part}"]) for part in ("values", "scale")]
        assert stored[0].dtype in (np.int8, np.uint8)
        assert_same_bits((stored[0].view(quantised.values.dtype), stored[1]), (quantised.values, quantised.scale))
        rows = opened.rows(name, 0, shape_of(source, name)[0])
        assert rows.tobytes() == quantised.dequantize().tobytes()
        assert opened.rows(name, 3, 9).tobytes() == rows[3:9].tobytes()  # across pairs and groups
        assert opened.pieces(name, 0, 2) is None
    assert set(tree) == names
    assert check_digests(opened) == []


@pytest.mark.parametrize("text", ["int4", "int8"])
def test_sizes_match_bits_per_weight(text, converted):
    """Bytes on disk and in memory."""
    arrays = array_layouts(open_folder(DEMO).config, None, Quantization.parse(text), np.dtype(ml_dtypes.bfloat16))
    expected = sum(leaf.size * leaf.dtype.itemsize for a in arrays.values() for _, leaf, _ in a.leaves())
    state = converted(text) / PARAMS / STATE
    on_disk = sum(f.stat().st_size for f in state.rglob("*") if f.is_file() and f.name[0].isdigit())
    assert on_disk == pytest.approx(expected, rel=0.03)
    assert open_folder(converted(text)).size == expected
    model = DbrxForCausalLM.from_pretrained(converted(text))
    assert sum(x.nbytes for x in jax.tree.leaves(parameters_of(model))) == expected


@pytest.mark.parametrize("text", ["int4", pytest.param("fp8", marks=pytest.mark.slow)])
def test_loading_matches_quantising_while_loading(text, converted):
    want = parameters_of(DbrxForCausalLM.from_pretrained(converted(text)))
    assert isinstance(want[W2], QuantizedArray)
    mesh = mesh_of("expert=4,tensor=2")
    for model in (
        DbrxForCausalLM.from_pretrained(DEMO, quantization=text),
        DbrxForCausalLM.from_pretrained(converted(text), mesh),
        DbrxForCausalLM.from_pretrained(DEMO, mesh, quantization=text),
    ):
        assert model.quantization == Quantization.parse(text)
        assert (model.dtype, model.config.dtype) == (ml_dtypes.bfloat16, "bfloat16")
        parameters = parameters_of(model)
        for name in want:
            assert_same_bits(want[name], parameters[name])


def test_float32_load_keeps_values_and_scales(converted):
    a, b = (
        parameters_of(DbrxForCausalLM.from_pretrained(converted("int4"), dtype=dtype))[W2]
        for dtype in (None, "float32")
    )
    assert (b.dtype, b.scale.dtype) == (np.float32, np.float32)
    assert_same_bits(a.values, b.values)
    assert np.array_equal(np.asarray(a.scale, np.float32), b.scale)


@pytest.mark.parametrize("compress", [False, True])
def test_conversion_interrupted_between_values_and_scales_resumes(tmp_path, monkeypatch, compress, converted):
    write, remaining = _Writer._write, [25]

    def write_until_killed(*args):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(_Writer, "_write", write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        to_orbax(DEMO, tmp_path / "out", compress=compress, workers=1, quantization="int4")
    monkeypatch.undo()
    state = tmp_path / "out.incomplete" / PARAMS / STATE
    assert sum(f.name.endswith(".values") for f in state.iterdir()) == 13
    assert sum(f.name.endswith(".scale") for f in state.iterdir()) == 12
    with pytest.raises(CheckpointError, match="begun with another"):
        to_orbax(DEMO, tmp_path / "out", compress=compress, quantization="int8")
    to_orbax(DEMO, tmp_path / "out", compress=compress, quantization="int4")
    want, tree = load_tree(converted("int4")), load_tree(tmp_path / "out")
    assert want.keys() == tree.keys()
    for name in want:
        assert_same_bits(want[name], tree[name])
    assert list(compare(open_folder(converted("int4")), open_folder(tmp_path / "out"))) == []


def edit_array(leaf, **fields):
    def damage(folder):
        file = folder / PARAMS / STATE / leaf / METADATA
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return damage


def edit_manifest(**fields):
    def damage(folder):
        file = folder / MANIFEST
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return damage


DAMAGE = {
    "no scales": (lambda f: shutil.rmtree(f / PARAMS / STATE / f"{W2}.scale"), "there is no such file"),
    "no values": (lambda f: shutil.rmtree(f / PARAMS / STATE / f"{W2}.values"), "there is no such file"),
    "short values": (lambda f: (f / PARAMS / STATE / f"{W2}.values" / "0.0").write_bytes(b"x"), "bytes long"),
    "scales of wrong shape": (
        edit_array(f"{W2}.scale", shape=[2, 96], chunks=[2, 96]),
        "int4-128 asks for shape (1, 192), got (2, 96)",
    ),
    "too few scales": (edit_array(f"{W2}.scale", shape=[1, 96]), "not the description of an array of weights"),
    "values of another dtype": (edit_array(f"{W2}.values", dtype="|i1"), "int4-128 asks for dtype uint8, got int8"),
    "scales of another dtype": (edit_array(f"{W2}.scale", dtype="<f2"), "expected dtype bfloat16 or float32"),
    "shape too large": (edit_array(f"{W2}.values", shape=[1 << 60, 192]), "is missing"),
    "other groups in the manifest": (
        edit_manifest(quantization="int4-32"),
        "int4-32 asks for shape (104, 6), got (104, 2)",
    ),
    "another kind in the manifest": (
        edit_manifest(quantization="int8"),
        "int8 asks for shape (104, 192), got (104, 96)",
    ),
    "invalid quantisation in the manifest": (edit_manifest(quantization="int5"), "expected int8, int4"),
    "integer quantisation in the manifest": (edit_manifest(quantization=4), "does not go with the format's version"),
    "other format version": (edit_manifest(format_version=1), "does not go with the format's version"),
    "integers in an unquantised array": (edit_array("norm_f.scale", dtype="|i1"), "bytes long"),
}


@pytest.mark.parametrize("damage_name", DAMAGE)
def test_damaged_folder_is_reported_in_one_line(damage_name, converted, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(converted("int4"), folder)
    damage, message = DAMAGE[damage_name]
    damage(folder)
    with pytest.raises(DbrxError) as error:
        DbrxForCausalLM.from_pretrained(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class TestErrors:
    def test_second_quantisation_is_rejected(self, converted, tmp_path):
        with pytest.raises(CheckpointError, match="its weights are int4 already"):
            to_orbax(converted("int4"), tmp_path / "out", quantization="int8")
        with pytest.raises(CheckpointError, match="its weights are int4 already, and int8 is asked for"):
            DbrxForCausalLM.from_pretrained(converted("int4"), quantization="int8")
        DbrxForCausalLM.from_pretrained(converted("int4"), quantization="int4")

    def test_invalid_quantisation_and_dtype_are_rejected(self, tmp_path):
        with pytest.raises(QuantizationError, match="got 'int3'"):
            to_orbax(DEMO, tmp_path / "out", quantization="int3")
        with pytest.raises(QuantizationError, match="bfloat16 or float32"):
            DbrxForCausalLM.from_pretrained(DEMO, dtype="float16", quantization="int8")
        assert not list(tmp_path.iterdir())

    def test_command_rejects_invalid_quantisation(self, tmp_path):
        done = command("dbrx-convert", "to-orbax", str(DEMO), str(tmp_path / "out"), "--quantization", "int2")
        assert done.returncode == 2
        assert "expected int8, int4" in done.stderr
        assert "Traceback" not in done.stderr


def test_to_hf_writes_dequantised_weights(converted, tmp_path):
    to_hf(converted("int4"), tmp_path / "hf")
    exported = open_folder(tmp_path / "hf")
    assert exported.dtype() == ml_dtypes.bfloat16
    assert list(compare(open_folder(converted("int4")), exported)) == []
    differences = list(compare(open_folder(DEMO), exported))
    assert 0 < max(d.relative for d in differences) < 0.4
    assert not {d.name for d in differences} & {"norm_f.scale", "blocks.0.moe.router"}


def test_inspect_reports_quantisation_and_sizes(converted):
    facts = inspect(converted("int4"), values=True)
    assert facts["problems"] == []
    assert (facts["quantization"], facts["kind"], facts["dtypes"]) == ("int4", "Orbax, int4", ["bfloat16"])
    assert sum(facts["bytes_by_part"].values()) == facts["bytes"]
    assert facts["bytes_by_part"]["experts"] == 6 * 16 * (3 * 104 * 96 + 2 * (2 * 104 * 2 + 192))
    done = command("dbrx-convert", "inspect", str(converted("int4")))
    assert done.returncode == 0, done.stderr
    assert "\n  experts           2,992,128 bytes\n" in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
