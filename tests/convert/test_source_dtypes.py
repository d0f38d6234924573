"""Tests of sources whose config.json names a quantisation, or whose tensors have several dtypes."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dbrx_convert.inspect import inspect
from dbrx_convert.to_hf import to_hf
from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxForCausalLM
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.errors import CheckpointError
from tests.conftest import GOLDEN
from tests.convert.test_layouts import add_to_config, load_tensors


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
            "quantization_config: says FP8, and the tensors are plain; find the right files, or mend",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantization_config: 'bitsandbytes' is not among what can be read",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
            "quantization_config: 'gptq' is not among what can be read",
        ),
        (
            {"quantization_config": {"load_in_8bit": True}},
            "quantization_config: {'load_in_8bit': True} is not among what can be read",
        ),
        (
            {"quantization": {"bits": 4, "group_size": 64}},
            "quantization: says MLX 4-bit in groups of 64, and the tensors are plain",
        ),
        (
            {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
            "quantization: expected bits 2, 4 or 8 and group_size 32, 64 or 128, in the mode affine",
        ),
        ({"quantization": {"bits": 4.0, "group_size": 32}}, "quantization: expected bits 2, 4 or 8 and group_size 32"),
        ({"quantization": "int4"}, "quantization: expected a JSON object, got 'int4'"),
    ],
)
def test_entries_that_the_tensors_contradict_are_named(fused_copy, entries, message):
    add_to_config(fused_copy, **entries)
    with pytest.raises(CheckpointError) as error:
        open_folder(fused_copy)
    assert f"config.json: {message}" in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "suffixes", "message"),
    [
        (np.uint32, (".scales", ".biases"), "lm_head.weight: is packed, and has shape () rather than rows and columns"),
        (jnp.float8_e4m3fn, (".weight_scale",), "lm_head.weight: is FP8, and one number rather than rows"),
    ],
)
def test_quantised_number_is_no_weight(tmp_path, dtype, suffixes, message):
    shutil.copy(GOLDEN / "fused" / "config.json", tmp_path)
    add_to_config(tmp_path, quantization={"bits": 4, "group_size": 32})
    tensors = load_tensors(GOLDEN / "fused") | {"lm_head.weight": np.array(1, dtype)}
    save_file(tensors | {f"lm_head{suffix}": np.ones(1, np.float32) for suffix in suffixes}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_folder(tmp_path)
    assert message in str(error.value)


def test_entries_that_say_nothing_load(fused_copy):
    add_to_config(fused_copy, quantization=None, quantization_config={})
    assert open_folder(fused_copy).description == "fused layout"


class TestMixedDtypes:
    @pytest.fixture
    def mixed(self, tmp_path):
        """A function that writes golden/fused in one dtype and its head in another, and a third into config.json."""

        def write(most, head, stated):
            folder = tmp_path / "mixed"
            folder.mkdir()
            tensors = {name: x.astype(jnp.dtype(most)) for name, x in load_tensors(GOLDEN / "fused").items()}
            tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(jnp.dtype(head))
            save_file(tensors, folder / "model.safetensors")
            shutil.copy(GOLDEN / "fused" / "config.json", folder)
            add_to_config(folder, torch_dtype=stated)
            return folder

        return write

    @pytest.mark.parametrize(
        ("most", "head", "stated", "expected"),
        [
            ("float32", "bfloat16", "bfloat16", "bfloat16, as config.json says"),
            ("float32", "bfloat16", "float16", "float16, as config.json says"),
            ("bfloat16", "float32", None, "float32, the least that holds their values"),
            ("bfloat16", "float16", None, "float32, the least that holds their values"),
        ],
    )
    def test_they_load_as_the_configuration_says_or_as_the_widest(self, mixed, most, head, stated, expected):
        folder = mixed(most, head, stated)
        found = rf"has tensors of {most} \(26\) and {head} \(1\)"
        with pytest.warns(UserWarning, match=f"{found}; all are loaded as {expected}"):
            model = DbrxForCausalLM.from_pretrained(folder)
        assert model.dtype == model.config.dtype == expected.partition(",")[0]

    def test_conversion_uses_the_same_dtype(self, mixed, tmp_path):
        folder = mixed("float32", "bfloat16", None)
        with pytest.warns(UserWarning, match="all are loaded as float32"):
            to_orbax(folder, tmp_path / "orbax")
        with pytest.warns(UserWarning, match="all are loaded as float32"):
            to_hf(folder, tmp_path / "hf")
        lm_head = load_tensors(folder)["lm_head.weight"].astype(np.float32)
        np.testing.assert_array_equal(load_tensors(tmp_path / "hf")["lm_head.weight"], lm_head)
        assert open_folder(tmp_path / "orbax").parameter_dtype("lm_head") == np.float32
        facts = inspect(folder)
        assert facts["dtypes"] == ["bfloat16", "float32"]
        assert not any("dtype" in problem for problem in facts["problems"])

    def test_arrays_of_an_orbax_folder_too(self, tmp_path):
        to_orbax(GOLDEN / "dense", tmp_path / "low", dtype="bfloat16")
        folder = open_folder(GOLDEN / "dense")
        arrays = open_folder(tmp_path / "low").arrays
        to_orbax(GOLDEN / "dense", tmp_path / "out")
        opened = open_folder(tmp_path / "out")
        opened.arrays["lm_head"] = arrays["lm_head"]
        with pytest.warns(UserWarning, match=r"bfloat16 \(1\); all are loaded as float32, as config.json says"):
            assert opened.dtype() == folder.dtype() == np.float32
