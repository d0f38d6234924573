"""Tests of results files of generate --file: what is kept, and who may write."""

import json
import os
import resource
import signal

import pytest

from dbrx_jax.cli.output import ResumableOutput, open_output
from dbrx_jax.errors import GenerationError


def test_full_disk_keeps_whole_lines(tmp_path):
    output = ResumableOutput(tmp_path / "out", {"prompts": "x"})
    output.write([{"a": 1}, {"b": 2}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))  # the third line fits in part
    try:
        with pytest.raises(GenerationError, match=r"out\.incomplete: cannot be written"):
            output.write([{"c": "c" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "out.incomplete").read_text() == '{"a": 1}\n{"b": 2}\n'
    output.write([{"d": 4}])
    output.finish()
    output.close()
    assert (tmp_path / "out").read_text() == '{"a": 1}\n{"b": 2}\n{"d": 4}\n'
    assert os.listdir(tmp_path) == ["out"]


def test_file_that_another_process_writes_is_refused(tmp_path):
    first = ResumableOutput(tmp_path / "out", {"prompts": "x"})
    first.write([{"a": 1}])
    with pytest.raises(GenerationError, match="another process is writing it"):
        ResumableOutput(tmp_path / "out", {"prompts": "x"})
    assert (tmp_path / "out.incomplete").read_text() == '{"a": 1}\n'
    first.close()


def test_process_that_is_refused_leaves_the_identity_of_the_rows(tmp_path, monkeypatch):
    """It sees no rows yet, and comes to the lock after another process with other prompts."""
    first = ResumableOutput(tmp_path / "out", {"prompts": "x"})
    with pytest.raises(GenerationError, match="another process is writing it"):
        ResumableOutput(tmp_path / "out", {"prompts": "y"})
    first.write([{"a": 1}])
    first.close()
    assert json.loads((tmp_path / "out.incomplete.json").read_text()) == {"prompts": "x"}


def test_results_that_were_completed_meanwhile_are_kept(tmp_path):
    output = open_output(tmp_path / "out", {"prompts": "x"})
    output.write([{"a": 1}])
    (tmp_path / "out").write_text("complete")
    with pytest.raises(GenerationError, match="out: exists already"):
        open_output(tmp_path / "out", {"prompts": "x"})
    with pytest.raises(GenerationError, match="out: exists already"):
        output.finish()
    output.close()
    assert (tmp_path / "out").read_text() == "complete"
    assert (tmp_path / "out.incomplete").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("damage", [b'{"c": 3', b"{\n", b"\0\0\0", b"3\n", b'\xff\n{"c": 3}\n'])
def test_lines_from_a_damaged_one_on_are_cut_off(tmp_path, damage):
    first = ResumableOutput(tmp_path / "out", {"prompts": "x"})
    first.write([{"a": 1}, {"error": "\ud800 é"}])
    first.close()
    whole = (tmp_path / "out.incomplete").read_bytes()
    (tmp_path / "out.incomplete").write_bytes(whole + damage)
    again = ResumableOutput(tmp_path / "out", {"prompts": "x"})
    assert (again.num_done, again.num_errors) == (2, 1)
    again.close()
    assert (tmp_path / "out.incomplete").read_bytes() == whole


def test_run_without_rows_leaves_nothing(tmp_path):
    output = ResumableOutput(tmp_path / "out", {"prompts": "x"})
    assert output.explain(7) is None
    output.close()
    assert os.listdir(tmp_path) == []
