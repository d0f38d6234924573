"""Tests of checkpoints at URLs, on fsspec's memory and local file systems."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

import dbrx_jax.demo
from dbrx_convert.to_hf import to_hf
from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.verify import compare
from dbrx_jax import DbrxForCausalLM, DbrxTokenizer
from dbrx_jax.checkpoint.folder import PLAN
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.checkpoint.raw_arrays import writing
from dbrx_jax.errors import CheckpointError
from tests.conftest import GOLDEN


def file_names(folder):
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


@pytest.fixture
def bucket():
    folder = UPath("memory://bucket")
    yield folder
    if folder.exists():
        folder.rmdir(recursive=True)


def upload(source, target):
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return str(target)


def test_remote_round_trip_matches_local_conversion(bucket, tmp_path):
    source = upload(GOLDEN / "fused", bucket / "source")
    to_orbax(source, str(bucket / "orbax"))
    to_orbax(GOLDEN / "fused", tmp_path / "orbax")
    remote, local = open_folder(bucket / "orbax"), open_folder(tmp_path / "orbax")
    assert list(compare(remote, local)) == []
    assert remote.manifest == local.manifest
    assert file_names(bucket / "orbax") == file_names(tmp_path / "orbax")
    to_hf(str(bucket / "orbax"), str(bucket / "back"), max_shard_size=100_000)
    assert list(compare(open_folder(bucket / "back"), open_folder(GOLDEN / "fused"))) == []
    assert not (bucket / "back" / PLAN).exists()


def test_remote_checkpoint_loads_and_generates(bucket):
    to_orbax(GOLDEN / "fused", str(bucket / "orbax"))
    expected = DbrxForCausalLM.from_pretrained(GOLDEN / "fused")
    model = DbrxForCausalLM.from_pretrained(str(bucket / "orbax"))
    ids = [[5, 6, 7]]
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=4), expected.generate(ids, max_new_tokens=4))


def test_tokenizer_loads_from_a_url(bucket):
    demo_folder = Path(dbrx_jax.demo.__file__).parent / "checkpoint"
    path = upload(demo_folder, bucket / "demo")
    assert DbrxTokenizer.from_pretrained(path).encode("hello") == DbrxTokenizer.from_pretrained(demo_folder).encode(
        "hello"
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("convert", [to_orbax, to_hf])
def test_interrupted_remote_conversion_resumes(bucket, convert):
    def stop(_):
        raise Interrupted

    destination = bucket / "there"
    for _ in range(3):
        with pytest.raises(Interrupted):
            convert(GOLDEN / "fused", str(destination), workers=1, progress=stop)
        with pytest.raises(CheckpointError, match="not finished"):
            open_folder(destination)
    with pytest.raises(CheckpointError, match="begun with another dtype"):
        convert(GOLDEN / "fused", str(destination), dtype="bfloat16")
    convert(GOLDEN / "fused", str(destination))
    assert list(compare(open_folder(destination), open_folder(GOLDEN / "fused"))) == []
    with pytest.raises(CheckpointError, match="exists already"):
        convert(GOLDEN / "fused", str(destination))


def test_incomplete_file_is_not_created(bucket):
    bucket.mkdir()

    def fail():
        with writing(bucket / "x") as f:
            f.write(b"half")
            raise Interrupted

    with pytest.raises(Interrupted):
        fail()
    assert not (bucket / "x").exists()


def test_truncated_file_is_rejected(bucket):
    source = upload(GOLDEN / "dense", bucket / "source")
    file = next(iter(sorted((bucket / "source").glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_folder(source)


def test_invalid_locations_are_rejected(bucket, tmp_path):
    with pytest.raises(CheckpointError, match="no such kind of location"):
        open_folder("nosuch://bucket/x")
    with pytest.raises(CheckpointError, match="no such folder"):
        open_folder(str(bucket / "nothing"))
    with pytest.raises(CheckpointError, match="local folders only"):
        to_orbax(GOLDEN / "fused", str(bucket / "x"), compress=True)
    assert not (bucket / "x").exists()


def test_command_line_accepts_urls(tmp_path):
    def command(*arguments):
        program = [sys.executable, "-c", "from dbrx_convert.main import main; main()"]
        return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, timeout=120)

    converted = command("to-orbax", f"file://{GOLDEN / 'fused'}", f"file://{tmp_path}/orbax")
    assert converted.returncode == 0, converted.stderr
    inspected = command("inspect", "--json", f"file://{tmp_path}/orbax")
    assert json.loads(inspected.stdout)["kind"] == "Orbax", inspected.stderr
    assert command("verify", tmp_path / "orbax", GOLDEN / "fused").returncode == 0
