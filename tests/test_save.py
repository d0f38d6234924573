"""Tests of save_pretrained, num_parameters and the keywords of from_pretrained."""

import contextlib
import inspect
import json
import shutil

import pytest
from upath import UPath

from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.verify import check_digests, compare
from dbrx_jax import DbrxConfig, DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.checkpoint.folder import PLAN
from dbrx_jax.checkpoint.keywords import OURS
from dbrx_jax.checkpoint.manifest import MANIFEST
from dbrx_jax.checkpoint.model_folder import ModelFolder
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.parameters import array_layouts, parameters_of
from dbrx_jax.demo import source_folder
from dbrx_jax.errors import CheckpointError
from dbrx_jax.generation_config import GenerationConfig
from tests.conftest import GOLDEN
from tests.quantization.test_quantization import assert_same_bits
from tests.sharding.test_mesh import mesh_of

DEMO = source_folder()


def load(path, mesh=None, **options):
    return DbrxForCausalLM.from_pretrained(path, mesh and mesh_of(mesh), **options)


def assert_same_model(a, b):
    assert (a.quantization, a.dtype, a.config) == (b.quantization, b.dtype, b.config)
    x, y = parameters_of(a), parameters_of(b)
    assert x.keys() == y.keys()
    for name in x:
        assert_same_bits(x[name], y[name])


@pytest.fixture
def stack_experts(monkeypatch):
    """A function that makes a layer's experts one array, as for kernels."""

    def stack():
        monkeypatch.setattr("dbrx_jax.sharding.partition.Partition.expert_arrays", lambda *_: 1)
        array_layouts.cache_clear()

    yield stack
    array_layouts.cache_clear()


@pytest.mark.parametrize(
    ("mesh", "stacked"),
    [(None, False), (None, True), ("expert=2,tensor=2", False), ("fsdp=2,expert=2", True), ("expert=4,tensor=2", True)],
)
def test_saved_model_has_the_bytes_of_a_conversion(tmp_path, monkeypatch, stack_experts, mesh, stacked):
    """Whatever the mesh, which pads the vocabulary, and whether experts are in arrays of their own or in one."""
    if stacked:
        stack_experts()
    monkeypatch.setattr("dbrx_jax.checkpoint.raw_arrays.CHUNK", 5000)  # chunks cut across shards
    to_orbax(GOLDEN / "fused", tmp_path / "want")
    load(GOLDEN / "fused", mesh).save_pretrained(tmp_path / "saved")
    saved, want = open_folder(tmp_path / "saved"), open_folder(tmp_path / "want")
    assert saved.records == want.records
    assert check_digests(saved) == []
    assert DbrxConfig.from_file(tmp_path / "saved") == want.config
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "want"}


@pytest.mark.parametrize(("quantization", "mesh"), [("int4", "expert=4,tensor=2"), ("fp8", None)])
def test_quantised_model_is_saved_to_the_same_bits(tmp_path, quantization, mesh):
    model = load(GOLDEN / "fused", mesh, quantization=quantization)
    model.save_pretrained(tmp_path / "orbax")
    again = load(tmp_path / "orbax", verify=True)
    assert_same_model(model, again)
    assert model.num_parameters() == again.num_parameters() == again.config.total_parameters == 927_840
    model.save_pretrained(str(tmp_path / "hf"), format="hf")
    assert list(compare(open_folder(tmp_path / "orbax"), open_folder(tmp_path / "hf"))) == []


@pytest.mark.parametrize("format", ["orbax", "hf"])
def test_saved_folder_has_all_that_generating_needs(tmp_path, format):
    shutil.copytree(DEMO, tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(
        '{"temperature": 0.5, "eos_token_id": 3, "transformers_version": "5"}'
    )
    model = load(tmp_path / "source")
    model.generation_config = GenerationConfig(eos_token_id=(2, 5), pad_token_id=7)
    model.save_pretrained(tmp_path / "saved", format)
    again = load(tmp_path / "saved")
    assert_same_model(model, again)
    assert again.generation_config == model.generation_config
    settings = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert settings == {"transformers_version": "5", "eos_token_id": [2, 5], "pad_token_id": 7}
    assert DbrxTokenizer.from_pretrained(tmp_path / "saved").encode("hello") == DbrxTokenizer.from_pretrained(
        DEMO
    ).encode("hello")
    shutil.rmtree(tmp_path / "source")
    model.save_pretrained(tmp_path / "bare", format)
    assert not {"tokenizer.json", "tokenizer_config.json"} & {path.name for path in (tmp_path / "bare").iterdir()}
    assert load(tmp_path / "bare").generation_config == model.generation_config


def test_saving_is_complete_or_nothing(tmp_path, models, monkeypatch):
    model = models("dense")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there: exists already"):
        model.save_pretrained(tmp_path / "there")
    with pytest.raises(CheckpointError, match="format: expected orbax or hf, got 'gguf'"):
        model.save_pretrained(tmp_path / "x", format="gguf")
    rows, calls = ModelFolder.stored_rows, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        return rows(*arguments)

    monkeypatch.setattr(ModelFolder, "stored_rows", fail)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(No space left on device\)"):
        model.save_pretrained(tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    state = tmp_path / "out.incomplete" / "params" / "state"
    next(state.glob("*/0*")).write_bytes(b"of another model")
    model.save_pretrained(tmp_path / "out")  # begins anew
    assert list(compare(open_folder(tmp_path / "out"), open_folder(GOLDEN / "dense"))) == []
    (tmp_path / "y.incomplete").mkdir()
    (tmp_path / "y.incomplete" / PLAN).write_text('{"kind": "to-orbax"}')
    with pytest.raises(CheckpointError, match="was begun with another kind"):  # hours of a conversion are kept
        model.save_pretrained(tmp_path / "y")


@pytest.mark.parametrize("format", ["orbax", "hf"])
def test_saving_shows_its_progress_where_loading_does(tmp_path, models, monkeypatch, capsys, format):
    monkeypatch.setattr("dbrx_jax.console.LINE_SECONDS", 0)
    model = models("fused")
    for number, shown in enumerate((True, None, False)):
        model.save_pretrained(tmp_path / str(number), format, progress=shown)
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("Saving: 0.0 of 0.0 GB, ") for line in lines)
        assert bool(lines) == (shown is True)  # stderr is no terminal here


@pytest.mark.parametrize("format", ["orbax", "hf"])
def test_progress_of_saving_adds_up_to_the_model(tmp_path, models, monkeypatch, format):
    calls, counts = [], []

    def progress(*arguments):
        calls.append(arguments)
        return contextlib.nullcontext(counts.append)

    monkeypatch.setattr("dbrx_jax.checkpoint.save.progress", progress)
    models("fused").save_pretrained(tmp_path / "out", format)
    ((label, num_bytes, shown),) = calls
    assert (label, shown) == ("Saving", None)
    assert len(counts) > 20
    assert sum(counts) == pytest.approx(num_bytes, rel=1e-3)


def test_model_is_saved_to_a_url(models):
    folder = UPath("memory://saved")
    models("dense").save_pretrained("memory://saved/model")
    assert_same_model(load("memory://saved/model", verify=True), models("dense"))
    assert not (folder / "model" / "records").exists()
    assert json.loads((folder / "model" / MANIFEST).read_text())["source"] == "a model in memory"
    folder.rmdir(recursive=True)


def test_only_blocks_of_rows_are_gathered(models, monkeypatch):
    """No array comes to the host as a whole, or keeps a copy there."""
    sizes = []
    monkeypatch.setattr("dbrx_jax.checkpoint.model_folder._slice", lambda x, begin, size: sizes.append(size) or x[:0])
    with pytest.raises(ValueError, match="broadcast"):
        ModelFolder(models("fused")).rows("lm_head", 3, 7)
    assert sizes == [(4, models("fused").config.d_model)]


def test_models_of_two_paths_share_programs(tmp_path):
    from dbrx_jax.model.graph import split_model

    shutil.copytree(GOLDEN / "dense", tmp_path / "copy")
    a, b = (load(path) for path in (GOLDEN / "dense", tmp_path / "copy"))
    assert a.checkpoint_path != b.checkpoint_path
    assert split_model(a).definition is split_model(b).definition


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("torch_dtype", "use dtype"),
        ("device_map", 'use mesh: mesh="expert=8" splits'),
        ("load_in_8bit", 'use quantization: quantization="int8"'),
        ("quantization_config", "use quantization"),
        ("attn_implementation", "use attention_implementation"),
        ("trust_remote_code", "no code of a checkpoint is run"),
        ("revision", "download another revision by itself"),
        ("quantisation", "did you mean quantization?"),
        ("tourch_dtype", "did you mean torch_dtype? Use dtype"),
        ("zzz", "it has mesh, dtype, quantization"),
    ],
)
def test_unknown_keyword_says_what_does_that(keyword, message):
    with pytest.raises(CheckpointError) as error:
        DbrxForCausalLM.from_pretrained(GOLDEN / "dense", **{keyword: 1})
    assert str(error.value).startswith(f"from_pretrained has no argument {keyword}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_keywords_are_those_of_the_signature():
    parameters = inspect.signature(DbrxForCausalLM.from_pretrained).parameters
    assert set(OURS) == set(parameters) - {"path", "unknown"}
