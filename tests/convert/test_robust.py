"""Slow tests of the converter: SIGKILL, a full file system, damaged input, and bounded memory."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.verify import compare
from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.checkpoint.folder import PLAN
from dbrx_jax.checkpoint.layouts import FUSED, expand
from dbrx_jax.checkpoint.manifest import MANIFEST
from dbrx_jax.checkpoint.open import open_folder
from dbrx_jax.errors import CheckpointError, DbrxError
from tests.commands import in_process
from tests.conftest import GOLDEN

# Processes that are killed leave their pipes to the collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
CONVERT = Path(sys.executable).parent / "dbrx-convert"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of some 200 MB, large enough to kill its conversion midway."""
    folder = tmp_path_factory.mktemp("source")
    config = {
        "model_type": "dbrx",
        "d_model": 512,
        "n_heads": 8,
        "n_layers": 6,
        "vocab_size": 4000,
        "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 640, "moe_num_experts": 16, "moe_top_k": 4},
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    names = {}
    for name, tensor in expand(FUSED, DbrxConfig.from_dict(config)).items():
        part = name.split(".")[2] if ".blocks." in name else "x"
        names.setdefault(part, {})[name] = rng.standard_normal(tensor.shape, np.float32)
    for part, tensors in names.items():
        save_file(tensors, folder / f"part-{part}.safetensors")
    return folder


def manifests_equal(a, b):
    return json.loads((a / MANIFEST).read_text()) == json.loads((b / MANIFEST).read_text())


@pytest.mark.parametrize("command", [["to-orbax", "--dtype", "bfloat16"], ["to-hf", "--max-shard-size", "40MB"]])
def test_killed_conversion_resumes_to_an_identical_result(source, tmp_path, command):
    """Restarts each conversion after random kills until it finishes; eight kills in all."""
    name, *options = command

    def start(destination):
        return subprocess.Popen([CONVERT, name, source, destination, *options], stderr=subprocess.PIPE, text=True)

    started = time.monotonic()
    reference = start(tmp_path / "want")
    assert reference.wait() == 0, reference.stderr.read()
    duration = time.monotonic() - started
    rng, kills, trial = random.Random(0), 0, 0
    while kills < 8:
        trial += 1
        destination = tmp_path / "out"
        for attempt in range(6):
            process = start(destination)
            try:
                process.wait(rng.uniform(0.2, 0.9) * duration if attempt < 5 else None)  # the last may finish
                assert process.returncode == 0, process.stderr.read()
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                if destination.exists():  # killed after the conversion was complete
                    break
                incomplete = destination.with_name("out.incomplete")
                if (incomplete / PLAN).exists():
                    with pytest.raises(DbrxError):
                        DbrxForCausalLM.from_pretrained(incomplete)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "want"], trial
        a, b = ({str(p.relative_to(d)) for p in d.rglob("*")} for d in (destination, tmp_path / "want"))
        assert a == b
        assert list(compare(open_folder(destination), open_folder(tmp_path / "want"))) == []
        if name == "to-orbax":
            assert manifests_equal(destination, tmp_path / "want")
        shutil.rmtree(destination)


def test_resume_rejects_a_changed_source(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    command = [CONVERT, "to-orbax", copy, tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "out.incomplete").glob("params/state/*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "out").exists():
        pytest.fail("the conversion was over before it could be killed")
    os.utime(copy / "part-0.safetensors", ns=(1, 1))
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "was begun with another source; remove it to begin anew" in again.stderr.splitlines()[-1]
    shutil.rmtree(tmp_path / "out.incomplete")
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_only_one_of_concurrent_conversions_succeeds(source, tmp_path):
    command = [CONVERT, "to-orbax", source, tmp_path / "out"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    codes = [p.wait() for p in processes]
    lines = [p.stderr.read().splitlines()[-1] for p in processes]
    assert codes.count(0) == 1, lines
    assert all(
        "another conversion is at work" in s or "exists already" in s for s, c in zip(lines, codes, strict=True) if c
    )
    assert list(compare(open_folder(tmp_path / "out"), open_folder(source))) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="making a small file system needs root")
@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_full_file_system_is_reported_and_conversion_resumes(source, tmp_path, command):
    """The disk is too small at first, then another file fills it during the conversion."""
    mount = tmp_path / "mount"
    mount.mkdir()
    size = open_folder(source).size
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", mount], check=True)
    try:
        arguments = [CONVERT, command, source, mount / "out"]
        result = subprocess.run(arguments, capture_output=True, text=True)
        assert result.returncode == 2
        assert "are free and the checkpoint needs" in result.stderr.splitlines()[-1]
        assert not list(mount.iterdir())
        subprocess.run(["mount", "-o", f"remount,size={size * 11 // 10}", mount], check=True)
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        while not (mount / "out.incomplete").exists():
            time.sleep(0.002)
        with (mount / "filler").open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, size // 2)
        assert process.wait() == 2
        assert "cannot be written (No space left on device); run the same" in process.stderr.read().splitlines()[-1]
        assert not (mount / "out").exists()
        (mount / "filler").unlink()
        assert subprocess.run(arguments, capture_output=True).returncode == 0
        assert list(compare(open_folder(mount / "out"), open_folder(source))) == []
    finally:
        subprocess.run(["umount", mount], check=True)


def test_conversion_memory_is_bounded(tmp_path, source):
    """Bounds the growth of anonymous memory while 470 MB are converted in ways that touch every byte."""
    code = """
import sys, threading, time
from dbrx_convert.to_orbax import to_orbax
from dbrx_convert.to_hf import to_hf
from orbax.checkpoint import v1
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) << 10
base = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous()); time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
to_orbax(sys.argv[1], sys.argv[2] + "/cast", dtype="bfloat16")
to_orbax(sys.argv[1], sys.argv[2] + "/same")
to_hf(sys.argv[2] + "/cast", sys.argv[2] + "/back", dtype="float32")
print(peak - base)
"""
    result = subprocess.run([sys.executable, "-c", code, source, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert open_folder(source).size > 350 << 20
    assert int(result.stdout) < 200 << 20


def damage_cases():
    """Yields 300 kinds and seeds of damage to golden/dense."""
    rng = random.Random(0)
    for index in range(300):
        yield index, rng.choice(("bytes", "header", "index", "config", "length")), rng.randrange(1 << 30)


def damage_checkpoint(folder, kind, seed):
    rng = random.Random(seed)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    if kind == "length":
        data[:8] = rng.choice((0, 1, length - 1, length + 8, len(data), 1 << 27, 1 << 40, (1 << 64) - 1)).to_bytes(
            8, "little"
        )
    elif kind == "bytes":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(8, 8 + length)] = rng.randrange(256)
    elif kind == "header":
        header = json.loads(data[8 : 8 + length])
        tensor_names = [n for n in header if n != "__metadata__"]
        entry = header[rng.choice(tensor_names)]
        change_number = rng.randrange(7)
        if change_number == 0:
            entry["shape"] = rng.choice(([], [0], [1 << 62, 4], [-1, 3], entry["shape"][::-1], "x", [1.5], None))
        elif change_number == 1:
            entry["dtype"] = rng.choice(("I64", "BOOL", "F64", "F8_E4M3", "U32", "BF16", "", 5, None))
        elif change_number == 2:
            entry["data_offsets"] = rng.choice(
                ([0, 0], [8, 4], [0, 1 << 60], [-8, 0], [0], "x", entry["data_offsets"] + [1])
            )
        elif change_number == 3:
            header["../../x"] = header.pop(rng.choice(tensor_names))
        elif change_number == 4:
            del header[rng.choice(tensor_names)]
        elif change_number == 5:
            header[rng.choice(tensor_names)] = rng.choice((5, [], "x", None, {}))
        else:
            header["__metadata__"] = {"a": 5}
        text = json.dumps(header).encode()
        data = bytearray(len(text).to_bytes(8, "little") + text) + data[8 + length :]
    elif kind == "index":
        name = "lm_head.weight"
        file_name = rng.choice(
            (
                "../x.safetensors",
                "/etc/passwd",
                "a.bin",
                5,
                None,
                "",
                "model.safetensors/",
                "\0.safetensors",
                "x" * 5000,
            )
        )
        weight_map = {n: "model.safetensors" for n in open_folder(folder).stored}
        index = rng.choice(
            (
                {"weight_map": {**weight_map, name: file_name}},
                {"weight_map": {**weight_map, "extra": "model.safetensors"}},
                {"weight_map": {n: f for n, f in weight_map.items() if n != name}},
                {"weight_map": [name]},
                {"weight_map": {}},
                {"weight_map": weight_map, "metadata": {"total_size": rng.choice((0, -1, 1 << 70, "x"))}},
                [],
                5,
            )
        )
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((folder / "config.json").read_text())
        key = rng.choice(
            ("d_model", "n_heads", "n_layers", "vocab_size", "attn_config", "ffn_config", "model_type", "torch_dtype")
        )
        config[key] = rng.choice(
            (0, -1, 1, 7, 10**9, 10**400, 1e308, float("inf"), "x", None, [], {"kv_n_heads": 10**30}, True)
        )
        (folder / "config.json").write_text(json.dumps(config))
    path.write_bytes(data)


def test_damaged_source_fails_quickly_in_one_line_with_little_memory(tmp_path):
    resource.getrusage(resource.RUSAGE_SELF)
    num_rejected = 0
    for index, kind, seed in damage_cases():
        folder = tmp_path / str(index)
        shutil.copytree(GOLDEN / "dense", folder)
        damage_checkpoint(folder, kind, seed)
        started = time.monotonic()
        memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            to_orbax(folder, folder / "out")
        except DbrxError as error:
            num_rejected += 1
            assert "\n" not in str(error), (kind, seed)
            assert not (folder / "out").exists()
            assert not (folder / "out.incomplete").exists(), (kind, seed, error)
        else:  # a harmless change, such as another name in the metadata
            assert open_folder(folder / "out").size == open_folder(folder).size
        assert time.monotonic() - started < 5, (kind, seed)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < 300 << 10, (kind, seed)
        shutil.rmtree(folder)
    assert num_rejected > 200


def test_command_reports_damaged_source_in_one_line(tmp_path):
    """Every tenth damage exits with status 0, or status 2 and one line."""
    for index, kind, seed in list(damage_cases())[::10]:
        folder = tmp_path / str(index)
        shutil.copytree(GOLDEN / "dense", folder)
        damage_checkpoint(folder, kind, seed)
        done = in_process("dbrx-convert", "to-orbax", folder, folder / "out")
        assert done.returncode in (0, 2), (kind, seed, done.stderr)
        assert "Traceback" not in done.stderr
        if done.returncode == 2:
            assert len(done.stderr.splitlines()) == 1, done.stderr


def test_source_truncated_during_conversion_is_rejected(tmp_path, monkeypatch):
    from dbrx_convert import to_orbax as module

    for dtype in ("float32", "bfloat16"):  # copied by the system, and through memory
        folder = tmp_path / dtype
        shutil.copytree(GOLDEN / "dense", folder)
        write_arrays = module.write_arrays

        def truncate_then_write(*arguments, folder=folder, write_arrays=write_arrays):
            os.truncate(folder / "model.safetensors", 100_000)
            return write_arrays(*arguments)

        monkeypatch.setattr(module, "write_arrays", truncate_then_write)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: has become shorter while it was read"):
            to_orbax(folder, folder / "out", dtype=dtype)
        monkeypatch.undo()
        assert not (folder / "out").exists()


def test_links_out_of_the_folder_and_pipes_are_rejected(tmp_path):
    shutil.copytree(GOLDEN / "dense", tmp_path / "outside")
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(GOLDEN / "dense" / "config.json", folder)
    (folder / "model.safetensors").symlink_to(tmp_path / "outside" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        open_folder(folder)
    (folder / "model.safetensors").unlink()
    (tmp_path / "secret").write_text("x")
    shutil.copy(GOLDEN / "dense" / "model.safetensors", folder)
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: is a link out of the folder"):
        to_orbax(folder, tmp_path / "out")
    assert not list(tmp_path.rglob("out/special_tokens_map.json"))
    (folder / "special_tokens_map.json").unlink()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_folder(folder)
    # The hub's cache: a snapshot of links into blobs/ beside it.
    hub = tmp_path / "models--x" / "snapshots" / "abc"
    hub.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    shutil.copy(GOLDEN / "dense" / "config.json", hub)
    shutil.copy(GOLDEN / "dense" / "model.safetensors", tmp_path / "models--x" / "blobs" / "123")
    (hub / "model.safetensors").symlink_to("../../blobs/123")
    assert open_folder(hub).config.moe_num_experts == 1
