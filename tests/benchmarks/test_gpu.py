"""Tests of the time-limited GPU benchmark, at a toy size on the CPU."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.check import MAX_ERROR, MODEL_ERROR, WrongResult
from benchmarks.gpu.serve import SHARES
from benchmarks.gpu.sizes import TOY

# Its many programs run once, so most of the time is for compiling.
ENVIRONMENT = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.mark.slow
def test_gpu_benchmark_runs_at_toy_size(tmp_path):
    """Runs every part of the benchmark except the peer."""
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["toy"] is True
    errors = [row["error"] for name in ("check-experts", "check-attention") for row in results[name]]
    assert len(errors) == 3 * 2 + 4 + 4
    assert max(errors) < MAX_ERROR
    (model,) = results["check-model"]
    assert 0 < model["error"] < MODEL_ERROR
    for precision, cases in TOY.decode.items():
        rates = [row for row in results[f"decode-{precision}"] if "tokens_per_second" in row]
        assert [(row["batch"], row["context"]) for row in rates] == list(cases)
        assert all(0 < row["of_measured_roofline"] < 1 for row in rates)
    assert all(0 < results[f"prefill-{p}"][1]["of_measured_roofline"] < 1 for p in ("int4", "bfloat16"))
    (load,) = (row for row in results["load-int4"] if "users" in row)
    assert load["users"] == TOY.users
    assert load["tokens_per_second"] > 0
    assert 0 < load["of_measured_roofline"] < 1
    at_once, *rates, end = results["serve"][2:]
    assert at_once["all_wait"]
    assert at_once["users_per_second"] == pytest.approx(at_once["tokens_per_second"] / TOY.steps, rel=1e-3)
    assert [row["users_per_second"] for row in rates] == [
        pytest.approx(share * at_once["users_per_second"], rel=2e-2) for share in SHARES
    ]
    assert end["compilations_after_warmup"] == 0


@pytest.mark.slow
def test_gpu_benchmark_skips_parts_when_time_runs_out(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--seconds", "17", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["load-int4"] == [{"skipped": "no time was left"}]


def test_wrong_kernel_result_ends_the_gpu_benchmark(tmp_path, monkeypatch, capsys):
    """A failed check exits with a distinct status and writes its result."""

    def failing_check(size):
        yield {"what": "right", "error": 0.001}
        raise WrongResult("experts: 0.5 of the largest value away from the reference")

    monkeypatch.setitem(gpu.PARTS, "check-experts", gpu.Part(9, failing_check))
    output = tmp_path / "gpu.json"
    with pytest.raises(SystemExit) as exit_info:
        gpu.run_part("check-experts", TOY, output)
    assert exit_info.value.code == gpu.WRONG
    rows = json.loads(output.read_text())["check-experts"]
    assert rows[0] == {"what": "right", "error": 0.001}
    assert rows[1]["failed"].startswith("experts: 0.5")
