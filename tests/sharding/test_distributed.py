"""Tests of several processes connected by gloo: results equal to one process, and shutdown when one is lost."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dbrx_convert.to_orbax import to_orbax
from dbrx_jax import DbrxTokenizer
from dbrx_jax.cli.commands import PROGRAM
from dbrx_jax.cli.file_run import derive_seed
from dbrx_jax.cli.output import ResumableOutput
from dbrx_jax.errors import DistributedError
from dbrx_jax.sharding.distributed import _check, is_connection_error, start
from dbrx_jax.sharding.native_log import ENDING, FATAL, MARK, NOISE, explain
from tests.commands import in_process
from tests.conftest import GOLDEN, write_byte_vocabulary
from tests.processes import Processes, free_address, run_flags

ROOT = Path(__file__).parents[2]
GENERATE = (Path(sys.executable).parent / "dbrx-jax", "generate")
EXAMPLE = (sys.executable, ROOT / "examples" / "sharded_generate.py")
WORKER = (sys.executable, ROOT / "tests" / "sharding" / "distributed_worker.py")
PROMPTS = ("abc", "x", "hello you")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A copy of golden/fused with a vocabulary of single bytes."""
    path = tmp_path_factory.mktemp("distributed") / "fused"
    shutil.copytree(GOLDEN / "fused", path, ignore=shutil.ignore_patterns("*.npz"))
    write_byte_vocabulary(path)
    (path.parent / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture(scope="session")
def orbax(folder):
    destination = folder.with_name("orbax")
    to_orbax(folder, destination)
    return destination


@pytest.fixture
def completions(folder, models):
    """A function that generates with one process on one device."""

    def generate(**options):
        tokenizer = DbrxTokenizer.from_pretrained(folder)
        batch = tokenizer.pad([tokenizer.encode(prompt) for prompt in PROMPTS])
        rows = models("fused").generate(**batch, max_new_tokens=12, eos_token_id=[260, 262], **options)
        new = rows[:, batch["input_ids"].shape[1] :]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in new]

    return generate


def read_completions(text):
    return [json.loads(line)["completion"] for line in text.splitlines()]


@pytest.mark.slow
def test_two_processes_match_one_from_orbax(orbax, completions, tmp_path):
    """The command with an Orbax checkpoint; only process 0 prints and writes."""
    out = tmp_path / "{i}.jsonl"
    options = ("--file", orbax.with_name("prompts.jsonl"), "--output", out, "--max-new-tokens", 12)
    with Processes(tmp_path, 2, 1, *GENERATE, orbax, *options, "--mesh", "expert=2", *run_flags(2)) as run:
        assert run.statuses() == [0, 0], run.stderr(0)
        assert read_completions((tmp_path / "0.jsonl").read_text()) == completions()
        assert not (tmp_path / "1.jsonl").exists()
        assert run.stdout(0) + run.stdout(1) + run.stderr(1) == ""
        lines = [
            line for line in run.stderr(0).splitlines() if not line.startswith("Compiling for ")
        ]  # if it takes long
        assert lines[0].startswith(f"Loaded {orbax} (0.9M parameters, float32) in ")
        assert len(lines) == 2


@pytest.mark.slow
def test_two_processes_go_on_behind_the_rows_of_an_earlier_run(folder, completions, tmp_path):
    """Process 0 alone has them, and submits the rest to the engine."""
    prompts, out = folder.with_name("prompts.jsonl"), tmp_path / "{i}.jsonl"
    options = ("--file", str(prompts), "--max-new-tokens", "12", "--batch-size", "2")
    identity = {"prompts": hashlib.sha256(prompts.read_bytes()).hexdigest()}
    earlier = ResumableOutput(
        tmp_path / "0.jsonl", identity | PROGRAM.parse(["generate", str(folder), *options]).result_options()
    )
    earlier.write([{"completion": "kept"}])
    earlier.close()
    command = (*GENERATE, folder, *options, "--output", out, "--mesh", "expert=2", *run_flags(2))
    with Processes(tmp_path, 2, 1, *command) as run:
        assert run.statuses() == [0, 0], run.stderr(0)
    assert read_completions((tmp_path / "0.jsonl").read_text()) == ["kept", *completions()[1:]]


@pytest.mark.slow
def test_rows_with_any_options_get_the_results_of_one_process(folder, tmp_path):
    """On the engine, with more rows than run at once and two that cannot be used."""
    rows = [
        {"prompt": "abc"},
        {"prompt": "hello you " * 14, "temperature": 0.8, "seed": 5},
        {"prompt": ""},
        {"prompt": "x", "temperature": 1.0, "num_return_sequences": 3},
        {"prompt": "zz", "max_new_tokens": 0},
        {"prompt": "say", "repetition_penalty": 1.3, "stop": ["e", "t"]},
        *({"prompt": "word " * i, "max_new_tokens": 3 + i} for i in (1, 2, 9, 5)),
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--file", prompts, "--max-new-tokens", 12, "--batch-size", 3, "--seed", 7, "--token-ids")
    one = in_process("dbrx-jax", "generate", folder, *options, "--output", tmp_path / "one.jsonl")
    assert one.returncode == 1, one.stderr
    command = (*GENERATE, folder, *options, "--output", tmp_path / "{i}.jsonl", "--mesh", "expert=2", *run_flags(2))
    with Processes(tmp_path, 2, 1, *command) as run:
        assert run.statuses() == [1, 1], run.stderr(0) + run.stderr(1)
        assert run.stderr(0).splitlines()[-1] == "2 of 12 rows have an error"
        assert run.stdout(0) + run.stdout(1) + run.stderr(1) == ""
    got, want = (path.read_text().splitlines() for path in (tmp_path / "0.jsonl", tmp_path / "one.jsonl"))
    assert len(want) == 12
    assert got == want
    assert not (tmp_path / "1.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "mesh"), [(4, 2, "data=2,expert=2,tensor=2")])
def test_processes_match_one_from_hugging_face(processes, devices, mesh, folder, completions, tmp_path):
    """The command samples and the example decodes greedily, from a Hugging Face folder."""
    options = ("--max-new-tokens", 12, "--mesh", mesh)
    sampled = ("--file", folder.with_name("prompts.jsonl"), "--temperature", 0.9, "--top-p", 0.95, "--seed", 7)
    with Processes(tmp_path, processes, devices, *GENERATE, folder, *sampled, *options, *run_flags(processes)) as run:
        assert run.statuses() == [0] * processes, run.stderr(0)
        seeds = [derive_seed(7, line, 0) for line in range(1, len(PROMPTS) + 1)]
        assert read_completions(run.stdout(0)) == completions(do_sample=True, temperature=0.9, top_p=0.95, seed=seeds)
        assert "".join(map(run.stdout, range(1, processes))) == ""
    with Processes(
        tmp_path, processes, devices, *EXAMPLE, folder, "--prompt", *PROMPTS, *options, *run_flags(processes)
    ) as run:
        assert run.statuses() == [0] * processes, run.stderr(0)
        assert read_completions(run.stdout(0)) == completions()
        assert "".join(run.stdout(i) + run.stderr(i) for i in range(1, processes)) == ""


def worker(folder, count, devices, *task, start_seconds=60, lost_seconds=60):
    return Processes(folder, count, devices, *WORKER, free_address(), count, "{i}", start_seconds, lost_seconds, *task)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2"])
def test_library_matches_one_device_on_two_processes(mesh, tmp_path):
    with worker(tmp_path, 2, 4, "library", mesh, lost_seconds=120) as run:
        assert run.statuses(500) == [0, 0], run.stderr(0) + run.stderr(1)
        assert (run.stdout(0), run.stdout(1)) == ("fine\n", "")


@pytest.mark.slow
def test_model_of_two_processes_is_saved(tmp_path):
    with worker(tmp_path, 2, 2, "save", "expert=2,tensor=2", tmp_path, lost_seconds=120) as run:
        assert run.statuses(500) == [0, 0], run.stderr(0) + run.stderr(1)
        assert (run.stdout(0), run.stdout(1)) == ("fine\n", "")


def assert_one_line(text, program, *fragments):
    assert len(text.splitlines()) == 1, text
    assert text.startswith(f"{program}: ")
    for fragment in fragments:
        assert fragment in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ended", "count", "number", "status"),
    [(1, 2, signal.SIGTERM, -signal.SIGTERM), (0, 2, signal.SIGINT, 130), (2, 4, signal.SIGKILL, -signal.SIGKILL)],
)
def test_end_of_a_process_ends_the_others_during_generation(ended, count, number, status, folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"abc"\n' * 4000)
    options = ("--file", prompts, "--mesh", f"expert={count}", "--max-new-tokens", 50, "--batch-size", 4)
    with Processes(tmp_path, count, 1, *GENERATE, folder, *options, *run_flags(count)) as run:
        run.wait_for_output("completion")
        run.processes[ended].send_signal(number)
        begin = time.monotonic()
        statuses = run.statuses(65)
        assert time.monotonic() - begin < 20
        assert statuses[ended] == status
        for i in set(range(count)) - {ended}:
            assert statuses[i] in (os.EX_TEMPFAIL, -signal.SIGABRT)  # JAX may notice first
            assert_one_line(run.stderr(i).splitlines()[-1], "dbrx-jax", "start all again")
            assert len(run.stderr(i).splitlines()) == 1 or i == 0


@pytest.mark.slow
def test_results_that_cannot_be_written_end_all(folder, tmp_path):
    prompts, out = folder.with_name("prompts.jsonl"), "/dev/full"
    options = ("--file", prompts, "--output", out, "--max-new-tokens", 12, "--batch-size", 2, "--mesh", "expert=2")
    with Processes(tmp_path, 2, 1, *GENERATE, folder, *options, *run_flags(2)) as run:
        assert run.statuses() == [2, os.EX_TEMPFAIL]
        line = "dbrx-jax: /dev/full: cannot be written (No space left on device)"
        assert run.stderr(0).splitlines()[-1] == line
        assert_one_line(run.stderr(1), "dbrx-jax", "process 0 was lost, or ended before this one; see its errors")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_process_is_lost_after_the_timeout(stopped, tmp_path):
    with worker(tmp_path, 2, 1, "talk", lost_seconds=10) as run:
        run.wait_for_output("running")
        run.processes[stopped].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert run.processes[1 - stopped].wait(30) != 0
        assert time.monotonic() - begin < 25  # the machine may be busy
        time.sleep(0.5)
        assert_one_line(run.stderr(1 - stopped), "distributed_worker.py", f"process {stopped} was lost")


@pytest.mark.slow
def test_sigterm_ends_a_process(tmp_path):
    with worker(tmp_path, 2, 1, "talk") as run:
        run.wait_for_output("running")
        run.processes[1].terminate()
        statuses = run.statuses(20)
    assert statuses == [os.EX_TEMPFAIL, -signal.SIGTERM]


@pytest.mark.slow
@pytest.mark.parametrize("present", [0, 1])
def test_missing_process_is_reported_after_the_start_timeout(present, tmp_path):
    with worker(tmp_path, 2, 1, "talk", start_seconds=8) as run:
        run.processes[1 - present].kill()
        begin = time.monotonic()
        assert run.processes[present].wait(60) != 0
        assert time.monotonic() - begin < 8 + 30  # includes the time to start
        time.sleep(0.5)
        assert_one_line(run.stderr(present), "distributed_worker.py", "not every process came within 8 s")


@pytest.mark.slow
def test_error_of_one_process_ends_all(folder, tmp_path):
    with worker(tmp_path, 2, 1, "fail", lost_seconds=30) as run:
        statuses = run.statuses(45)
        assert statuses[1] == 2
        assert statuses[0] != 0
        assert_one_line(run.stderr(1), "worker", "a mistake of one process alone")
        assert_one_line(run.stderr(0), "distributed_worker.py", "start all again")
    (tmp_path / "0.jsonl").write_text('"abc"\n')
    (tmp_path / "1.jsonl").write_text('"abd"\n')
    options = ("--file", tmp_path / "{i}.jsonl", "--mesh", "expert=2")
    with Processes(tmp_path, 2, 1, *GENERATE, folder, *options, *run_flags(2)) as run:
        assert run.statuses() == [2, 2]
        for i in range(2):
            assert_one_line(run.stderr(i), "dbrx-jax", "options and prompts: process 1 has others than process 0")


def test_invalid_process_arguments_are_rejected(monkeypatch):
    for arguments, message in (
        (("somewhere", 2, 0), "expected HOST:PORT"),
        (("a:1", 0, 0), "processes: expected a whole number above 0, got 0"),
        (("a:1", 2, 2), "process id: expected a number from 0 to 1, got 2"),
        ((None, None, -1), "process id: expected a number from 0, got -1"),
    ):
        with pytest.raises(DistributedError) as error:
            _check(*arguments)
        assert message in str(error.value)
    with pytest.raises(DistributedError), start("somewhere"):
        pass


def test_command_rejects_incomplete_distributed_options(folder):
    for options, message in (
        (("--distributed",), "--distributed needs --mesh"),
        (("--processes", "2"), "go with --distributed"),
    ):
        done = subprocess.run([*GENERATE, folder, "--prompt", "x", *options], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert_one_line(done.stderr, "dbrx-jax", message)


class TestNativeLog:
    """Tests on lines that jax 0.10.2 writes."""

    def test_explain_maps_log_to_cause(self):
        fatal = f"F1121 13:22:23.623586   21806 client.h:80] {FATAL} detected fatal errors. absl::Status: "
        for text, cause in (
            (f"{fatal}DEADLINE_EXCEEDED\nRPC: /xla.coordination.CoordinationService/RegisterTask", "came within 9 s"),
            (f"{fatal}UNAVAILABLE: Task 13 heartbeat timeout. This", "process 13 was lost, not heard of for up to 7 s"),
            (f"{fatal}The following tasks are unhealthy (stopped sending heartbeats):\n4\nThe", "process 4 was lost"),
            (f"{fatal}Failed to send RPC to coordination service. Either", "process 0 was lost"),
            (f"{fatal}DEADLINE_EXCEEDED\nRPC: /xla.coordination.CoordinationService/Heartbeat", "process 0 was lost"),
            (f"{fatal}something else", "another process was lost"),
            (f"{MARK}it broke\n{fatal}something else", "it broke"),
        ):
            assert cause in explain(text, "9", "7")
            assert "\n" not in explain(text, "9", "7")
        assert explain("E1121 13:22:23.6 2 coordination_service.cc:1549] whatever", "9", "7") is None
        assert explain(f"{MARK}it broke\n", "9", "7") == "it broke"

    def test_shutdown_and_noise_lines_are_recognised(self):
        for line in (
            "E1121 13:22:23.622643   21823 coordination_service.cc:1520] [28] Shutdown barrier",
            "E1121 13:22:23.623936   21834 coordination_service_agent.cc:289] Polled an error",
            "F1121 13:22:23.623586   21806 client.h:80] Terminating process",
            "W1121 13:55:40.599376   30693 preemption_sync_manager.cc:147] Failed to retrieve preemption notice",
        ):
            assert ENDING.match(line)
        assert not ENDING.match("E1121 13:22:23.622643   21823 bfc_allocator.cc:1] out of memory")
        assert NOISE.match("E1121 13:28:57.116434   23548 add_port.cc:83] Failed to add port to server: No address")


@pytest.mark.parametrize(
    ("error", "broke"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:2956"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed: remote process exited"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("gloo.json: no such file"), False),
        (DistributedError("UNAVAILABLE: gloo"), False),
    ],
)
def test_broken_connection_errors_are_recognised(error, broke):
    assert is_connection_error(error) is broke
