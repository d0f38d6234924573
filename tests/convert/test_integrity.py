"""Tests that an Orbax folder loads as what was written, or not at all: configuration, arrays, digests and seal."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from dbrx_convert.inspect import inspect
from dbrx_convert.seal import seal
from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.verify import check_digests
from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.checkpoint.manifest import CONFIGURATION, MANIFEST
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.orbax import PARAMS, STATE
from dbrx_jax.checkpoint.parameters import parameter_specs
from dbrx_jax.checkpoint.raw_arrays import METADATA
from dbrx_jax.errors import CheckpointError
from tests.commands import in_process
from tests.conftest import GOLDEN
from tests.sharding.test_mesh import mesh_of

W1 = "blocks.1.moe.experts.3.w1"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """golden/fused as an Orbax folder of several chunks an array, plain and compressed."""
    folder = tmp_path_factory.mktemp("integrity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbrx_jax.checkpoint.raw_arrays.CHUNK", 5000)
        for compress in (False, True):
            to_orbax(GOLDEN / "fused", folder / str(compress), compress=compress)
    return folder


@pytest.fixture
def orbax(converted, tmp_path):
    """A copy to damage."""
    shutil.copytree(converted / "False", tmp_path / "orbax")
    return tmp_path / "orbax"


def edit_json(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def make_older(folder):
    """Gives a folder the manifest of format version 1."""

    def change(manifest):
        del manifest["configuration"], manifest["arrays"]
        manifest["format_version"] = 1

    edit_json(folder / MANIFEST, change)


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[101] ^= 0x40
    file.write_bytes(data)


def logits(folder, **options):
    return np.asarray(DbrxForCausalLM.from_pretrained(folder, **options)([[5, 6, 7]]))


def error_of(folder, **options):
    """Returns the one-line error of loading, which inspect shows too."""
    with pytest.raises(CheckpointError) as error:
        DbrxForCausalLM.from_pretrained(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


CHANGES = {
    "n_layers": lambda c: c.update(n_layers=2),
    "moe_top_k": lambda c: c["ffn_config"].update(moe_top_k=1),
    "rope_theta": lambda c: c["attn_config"].update(rope_theta=10001.0),
    "clip_qkv": lambda c: c["attn_config"].update(clip_qkv=7.5),
    "ffn_act_fn": lambda c: c["ffn_config"].update(ffn_act_fn={"name": "relu"}),
    "moe_normalize_expert_weights": lambda c: c["ffn_config"].update(moe_normalize_expert_weights=None),
}


class TestConfiguration:
    @pytest.mark.parametrize("field", CHANGES)
    def test_change_of_the_mathematics_is_refused_by_name(self, orbax, field):
        edit_json(orbax / "config.json", CHANGES[field])
        message = error_of(orbax)
        assert f"config.json: {field} is " in message
        assert f"if you mean it run: dbrx-convert seal {orbax}" in message
        assert inspect(orbax)["problems"] == [message]

    def test_other_changes_are_not_refused(self, orbax):
        want = logits(orbax)
        changes = {"max_seq_len": 99, "initializer_range": 0.5, "eos_token_id": 3, "transformers_version": "5"}
        edit_json(orbax / "config.json", lambda c: c.update(changes))
        assert np.array_equal(logits(orbax), want)

    def test_every_field_is_either_recorded_or_named_here(self):
        others = {"max_seq_len", "initializer_range", "moe_jitter_eps", "moe_loss_weight", "dtype"}
        assert {field.name for field in dataclasses.fields(DbrxConfig)} == others | set(CONFIGURATION)
        assert not others & set(CONFIGURATION)

    def test_seal_accepts_a_change_that_fits_the_arrays(self, orbax):
        before = logits(orbax)
        edit_json(orbax / "config.json", CHANGES["clip_qkv"])
        assert in_process("dbrx-convert", "seal", orbax).returncode == 0
        assert not np.array_equal(logits(orbax), before)
        assert json.loads((orbax / MANIFEST).read_text())["configuration"]["clip_qkv"] == 7.5
        assert check_digests(open_folder(orbax)) == []
        edit_json(orbax / "config.json", CHANGES["moe_top_k"])
        assert seal(orbax) == ["moe_top_k"]

    def test_seal_refuses_a_change_that_does_not_fit_the_arrays(self, orbax):
        edit_json(orbax / "config.json", CHANGES["n_layers"])
        with pytest.raises(CheckpointError, match=r"blocks\.2\.attention\.key: config\.json asks for no such array"):
            seal(orbax)
        for folder in (orbax / PARAMS / STATE).glob("blocks.2.*"):
            shutil.rmtree(folder)
        changed = seal(orbax)
        assert changed[0] == "n_layers"
        assert "blocks.2.moe.router" in changed
        assert logits(orbax).shape == (1, 3, open_folder(orbax).config.vocab_size)
        assert set(ocp.load(orbax / PARAMS)["blocks"]) == {"0", "1"}  # plain Orbax's metadata follows


class TestArrays:
    @pytest.mark.parametrize("older", [False, True])
    def test_left_over_array_is_refused(self, orbax, older):
        if older:
            make_older(orbax)
        shutil.copytree(orbax / PARAMS / STATE / W1, orbax / PARAMS / STATE / "blocks.7.moe.experts.3.w1")
        assert "blocks.7.moe.experts.3.w1: config.json asks for no such array" in error_of(orbax)

    def test_older_folder_loads_and_refuses_a_configuration_of_fewer_layers(self, orbax):
        want = logits(orbax)
        make_older(orbax)
        assert np.array_equal(logits(orbax), want)
        edit_json(orbax / "config.json", CHANGES["n_layers"])
        assert "blocks.2.attention.key: config.json asks for no such array (and" in error_of(orbax)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: m["arrays"].pop(W1), f"does not list {W1}; copy the folder again, or if you mean it"),
            (lambda m: m["arrays"].update(x=m["arrays"][W1]), "lists, and config.json does not ask for, x;"),
            (lambda m: m["arrays"][W1].update(dtype="bfloat16"), f"{W1}: is not stored as it was written"),
            (lambda m: m["arrays"][W1].update(shape=[896, 97]), "damaged; copy the file again"),
            (lambda m: m["arrays"][W1]["sha256"].pop(), "damaged; copy the file again"),
            (lambda m: m["arrays"].update({W1: 5}), "damaged; copy the file again"),
            (lambda m: m.update(arrays=[]), "arrays: expected a JSON object"),
            (lambda m: m.pop("configuration"), "configuration: expected a JSON object"),
            (lambda m: m.update(format_version=1, arrays=[]), "arrays: expected a JSON object"),
            (lambda m: m.update(format_version=2, configuration="n_layers"), "configuration: expected a JSON object"),
            (lambda m: m.update(format_version=1, sha256=["x"]), "sha256: expected a JSON object"),
        ],
    )
    def test_manifest_of_other_arrays_is_refused(self, orbax, change, message):
        edit_json(orbax / MANIFEST, change)
        assert message in error_of(orbax)


class TestDigests:
    @pytest.mark.parametrize("mesh", [None, "expert=2,tensor=2"])
    def test_flipped_bit_is_named(self, orbax, mesh):
        options = {"mesh": None if mesh is None else mesh_of(mesh)}
        want = logits(orbax, verify=True, **options)
        assert np.array_equal(logits(orbax, **options), want)
        flip_bit(orbax / PARAMS / STATE / W1 / "2.0")
        assert f"{W1}/2.0: its bytes are not what was written" in error_of(orbax, verify=True, **options)
        done = in_process("dbrx-convert", "verify", orbax)
        assert (done.returncode, done.stdout.splitlines()[0]) == (1, f"{W1}/2.0: not what was written")
        assert done.stdout.splitlines()[1] == "1 chunks are not what was written"
        assert seal(orbax) == []  # a seal of the configuration alone changes no digest
        assert seal(orbax, arrays=True) == [W1]
        logits(orbax, verify=True, **options)

    def test_digests_are_of_the_rows_whatever_the_storage(self, converted):
        plain, compressed = (open_folder(converted / name) for name in ("False", "True"))
        assert plain.records == compressed.records
        assert len(plain.records[W1].sha256) > 2
        assert check_digests(plain) == check_digests(compressed) == []
        rows = open_folder(converted / "True", verify=True).rows(W1, 3, 7)
        assert np.array_equal(rows, plain.rows(W1, 3, 7))

    def test_other_bytes_in_a_compressed_chunk_are_named(self, converted, tmp_path):
        shutil.copytree(converted / "True", tmp_path / "orbax")
        chunks = tmp_path / "orbax" / PARAMS / STATE / W1
        shutil.copy(chunks / "1.0", chunks / "2.0")
        assert check_digests(open_folder(tmp_path / "orbax")) == [f"{W1}/2.0"]
        assert f"{W1}/2.0: its bytes" in error_of(tmp_path / "orbax", verify=True)

    @pytest.mark.parametrize("name", ["True", "False"])
    def test_missing_chunk_is_refused(self, converted, tmp_path, name):
        """A missing chunk of a compressed array counts too: tensorstore would read zeros."""
        shutil.copytree(converted / name, tmp_path / "orbax")
        (tmp_path / "orbax" / PARAMS / STATE / W1 / "2.0").unlink()
        assert f"{W1}/2.0: is missing; convert or copy it again" in error_of(tmp_path / "orbax")

    @pytest.mark.parametrize("change", [{"chunks": [1 << 40, 97]}, {"chunks": [8, 1]}, {"order": "F"}])
    def test_other_storage_of_a_compressed_array_is_refused(self, converted, tmp_path, change):
        shutil.copytree(converted / "True", tmp_path / "orbax")
        edit_json(tmp_path / "orbax" / PARAMS / STATE / W1 / METADATA, lambda m: m.update(change))
        assert f"{W1}/.zarray: not the description of an array of weights" in error_of(tmp_path / "orbax")

    def test_folders_without_digests_say_where_to_get_them(self, orbax):
        make_older(orbax)
        assert f"has no digests; add them with: dbrx-convert seal {orbax}" in error_of(orbax, verify=True)
        assert "safetensors have no digests" in error_of(GOLDEN / "dense", verify=True)
        assert set(parameter_specs(open_folder(orbax).config)) < set(seal(orbax))
        logits(orbax, verify=True)

    def test_seal_checks_the_digests_of_an_older_manifest(self, orbax):
        make_older(orbax)
        edit_json(orbax / MANIFEST, lambda m: m.update(sha256={W1: "0" * 64}))
        with pytest.raises(CheckpointError, match=f"{W1}: its bytes are not what was written"):
            seal(orbax)

    def test_seal_counts_the_values_that_are_not_finite(self, orbax):
        chunk = orbax / PARAMS / STATE / W1 / "0.0"
        values = np.frombuffer(chunk.read_bytes(), np.float32).copy()
        good, values[5:8] = values.copy(), np.nan
        chunk.write_bytes(values.tobytes())
        edit_json(orbax / MANIFEST, lambda m: m.update(not_finite={"removed": 1, "lm_head": 2}))
        counts = []
        for content, arrays in ((values, False), (values, True), (good, True)):
            chunk.write_bytes(content.tobytes())
            seal(orbax, arrays)
            counts.append(json.loads((orbax / MANIFEST).read_text()).get("not_finite"))
        assert counts == [{"lm_head": 2}, {W1: 3}, None]

    @pytest.mark.parametrize("options", [{}, {"compress": True}, {"quantization": "int8"}])
    def test_resumed_conversion_has_the_same_manifest(self, tmp_path, options):
        """Killed after some arrays; one of the records is lost, and one array is without its folder."""

        class Killed(Exception):
            pass

        written = []

        def stop(num_bytes):
            written.append(num_bytes)
            if len(written) == 9:
                raise Killed

        arguments = {"dtype": "bfloat16", "workers": 1, **options}
        with pytest.raises(Killed):
            to_orbax(GOLDEN / "fused", tmp_path / "out", progress=stop, **arguments)
        incomplete = tmp_path / "out.incomplete"
        records = sorted((incomplete / "records").iterdir())
        assert len(records) >= 8
        records[0].write_text("")
        shutil.rmtree(incomplete / PARAMS / STATE / records[1].stem)
        to_orbax(GOLDEN / "fused", tmp_path / "out", **arguments)
        to_orbax(GOLDEN / "fused", tmp_path / "want", **arguments)
        assert (tmp_path / "out" / MANIFEST).read_text() == (tmp_path / "want" / MANIFEST).read_text()
        assert check_digests(open_folder(tmp_path / "out")) == []
        assert not (tmp_path / "out" / "records").exists()
