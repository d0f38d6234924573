"""Tests of the folder that a checkpoint is written in: what ends a run late, and folders of unknown runs."""

import os
import shutil

import pytest

from dbrx_convert.to_hf import to_hf
from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.verify import compare
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.work_folder import work_folder
from dbrx_jax.errors import CheckpointError
from tests.conftest import GOLDEN


class Killed(BaseException):
    pass


@pytest.fixture
def killed_at_the_end(monkeypatch):
    """A function that runs a conversion, killed while its bytes go to the disk, which may take minutes."""

    def stop():
        raise Killed

    def run(convert, source, destination):
        with monkeypatch.context() as patch:
            patch.setattr(os, "sync", stop)
            with pytest.raises(Killed):
                convert(source, destination)

    return run


@pytest.mark.parametrize("convert", [to_orbax, to_hf])
def test_run_killed_at_its_end_resumes_and_writes_nothing_again(convert, killed_at_the_end, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("written again")

    killed_at_the_end(convert, GOLDEN / "dense", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("dbrx_jax.checkpoint.write_orbax._Writer._write_plain", fail)
        patch.setattr("dbrx_jax.checkpoint.write_huggingface._write_shard", fail)
        convert(GOLDEN / "dense", tmp_path / "out")
    assert list(compare(open_folder(tmp_path / "out"), open_folder(GOLDEN / "dense"))) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_of_another_source_are_not_taken_for_this_one(killed_at_the_end, tmp_path):
    shutil.copytree(GOLDEN / "dense", tmp_path / "source", copy_function=shutil.copyfile)  # with times of their own
    killed_at_the_end(to_hf, GOLDEN / "dense", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out\.incomplete: was begun with another source; remove it"):
        to_hf(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("resume", [True, False])
def test_folder_of_an_unknown_run_is_refused_and_kept(resume, tmp_path):
    folder = tmp_path / "out.incomplete"
    folder.mkdir()
    (folder / "model.safetensors").write_text("of another model")
    with pytest.raises(CheckpointError, match=r"out\.incomplete: holds files, and no conversion\.json says of what"):
        work_folder(tmp_path / "out", {"kind": "x"}, 0, resume).__enter__()
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("left", [[], ["conversion.part"]])
def test_run_killed_before_it_wrote_its_plan_begins_anew(left, tmp_path):
    (tmp_path / "out.incomplete").mkdir()
    for name in left:
        (tmp_path / "out.incomplete" / name).write_text('{"ki')
    with work_folder(tmp_path / "out", {"kind": "x"}, 0) as folder:
        assert [file.name for file in folder.iterdir()] == ["conversion.json"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("convert", [to_orbax, to_hf])
@pytest.mark.parametrize("workers", [0, -1])
def test_number_of_threads_is_checked_before_anything_is_written(convert, workers, tmp_path):
    with pytest.raises(CheckpointError, match=f"workers: expected a whole number above 0, got {workers}"):
        convert(GOLDEN / "dense", tmp_path / "out", workers=workers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("resume", "advice"), [(True, "; run the same command again to continue"), (False, "")])
def test_error_says_to_continue_only_what_does(resume, advice, tmp_path):
    with pytest.raises(CheckpointError) as error, work_folder(tmp_path / "out", {"kind": "x"}, 0, resume):
        raise OSError(28, "No space left on device")
    assert str(error.value) == f"{tmp_path / 'out'}: cannot be written (No space left on device){advice}"
