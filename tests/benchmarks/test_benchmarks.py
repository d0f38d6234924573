"""Tests of the benchmark harness: ratios, roofline bounds, workers, and runs on a tiny model without peers."""

import dataclasses
import gzip
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, profile, report, roofline
from benchmarks.__main__ import main
from benchmarks.checkpoints import checkpoint, write_random
from benchmarks.engines import PEERS, Subject, ours, peer, started
from benchmarks.load import direct_rate, read_rate
from benchmarks.record import BenchmarkError
from benchmarks.workers import serve
from dbrx_jax.checkpoint.huggingface import HuggingFaceFolder
from dbrx_jax.config import DbrxConfig
from tests.conftest import GOLDEN

TINY = DbrxConfig(
    d_model=24,
    n_heads=4,
    kv_n_heads=2,
    n_layers=2,
    max_seq_len=256,
    vocab_size=64,
    clip_qkv=8.0,
    rope_theta=5e5,
    ffn_hidden_size=20,
    moe_num_experts=5,
    moe_top_k=2,
)
SHALLOW = dataclasses.replace(TINY, n_layers=1)  # compiles quickly
MACHINE = {"device": "cpu", "bandwidth": 2e9, "float32": 3e9, "bfloat16": 5e9}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random checkpoint of one layer."""
    folder = tmp_path_factory.mktemp("benchmarks") / "tiny"
    write_random(SHALLOW, folder)
    with pytest.MonkeyPatch.context() as patch:  # the workers share what they compile
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder.parent / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield folder


def run(monkeypatch, *arguments):
    """Runs `python -m benchmarks` with these arguments and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code


# Alternation and ratios.


def test_alternate_measures_each_engine_every_round_after_warm_up():
    calls = []
    engines = [Subject(name, "", "", Path(), "") for name in ("dbrx_jax", "other")]

    def measure(engine, round_number):
        calls.append((engine.name, round_number))
        return {"tokens_per_second": 10.0 * round_number + (engine.name == "other")}

    rounds = compare.alternate(engines, measure, 2)
    assert calls == [(name, round_number) for round_number in (0, 1, 2) for name in ("dbrx_jax", "other")]
    assert rounds == [
        {"dbrx_jax": {"tokens_per_second": 10.0}, "other": {"tokens_per_second": 11.0}},
        {"dbrx_jax": {"tokens_per_second": 20.0}, "other": {"tokens_per_second": 21.0}},
    ]


def test_summary_ratios_are_per_round_and_above_one_when_ours_is_better():
    values = [(10.0, 5.0, 1.0, 4.0), (30.0, 10.0, 2.0, 2.0), (20.0, 20.0, 8.0, 4.0)]
    rounds = [
        {
            "dbrx_jax": {"tokens_per_second": a, "total_median_seconds": c},
            "peer": {"tokens_per_second": b, "total_median_seconds": d},
        }
        for a, b, c, d in values
    ]
    summary = compare.summary(rounds)
    assert summary["dbrx_jax"]["tokens_per_second"] == {"median": 20.0, "min": 10.0, "max": 30.0}
    assert summary["peer"]["total_median_seconds"] == {"median": 4.0, "min": 2.0, "max": 4.0}
    assert summary["ratio"]["tokens_per_second"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert summary["ratio"]["total_median_seconds"] == {"median": 1.0, "min": 0.5, "max": 4.0}
    assert "ratio" not in compare.summary([{"dbrx_jax": r["dbrx_jax"]} for r in rounds])


class FixedReplyEngine:
    """An engine whose worker always replies with the given logits and tokens."""

    def __init__(self, name, logits, greedy=(1, 2)):
        self.name, self.reply = name, {"logits": logits, "greedy": list(greedy)}

    def ask(self, do, **arguments):
        assert do == "check"
        return self.reply


@pytest.mark.parametrize(("dtype", "near", "far"), [("float32", 0.003, 0.005), ("bfloat16", 0.3, 0.5), ("int4", 1, 3)])
def test_check_same_rejects_different_logits(dtype, near, far):
    ours_engine = FixedReplyEngine("dbrx_jax", [1.0, -4.0])
    check = compare.check_same(ours_engine, FixedReplyEngine("p", [1.0 + near, -4.0], (1, 3)), [1], dtype)
    assert check["largest_difference"] == pytest.approx(near)
    assert (check["largest_logit"], check["greedy_tokens"]) == (4.0, f"1 of {compare.CHECKED_TOKENS}")
    with pytest.raises(BenchmarkError, match=rf"^p: logits differ by up to {far} .* another computation"):
        compare.check_same(ours_engine, FixedReplyEngine("p", [1.0 + far, -4.0]), [1], dtype)
    with pytest.raises(BenchmarkError, match="differ by up to nan"):
        compare.check_same(ours_engine, FixedReplyEngine("p", [math.nan, -4.0]), [1], dtype)
    with pytest.raises(BenchmarkError, match="gives 3 logits, and dbrx_jax 2"):
        compare.check_same(ours_engine, FixedReplyEngine("p", [1.0, -4.0, 0.0]), [1], dtype)


# Rooflines, against bounds computed by hand.

ATTENTION = 2 * (24 * (24 + 2 * 12) + 24 * 24)  # weights of both layers
EXPERT = 3 * 24 * 20
SMALL = 2 * (5 * 24 + 2 * 24) + 24  # routers and norms
HEAD = 64 * 24


def test_decode_bound_counts_active_experts_other_weights_and_live_cache():
    cache = 2 * 2 * 12 * 50  # layers, keys and values, two heads of 6, positions
    batch_1 = roofline.decode_bound(TINY, MACHINE, "float32", 1, 50)
    assert batch_1.read == 4 * (ATTENTION + 2 * 2 * EXPERT + SMALL + HEAD + cache)
    experts = 5 * (1 - (1 - 2 / 5) ** 3)
    batch_3 = roofline.decode_bound(TINY, MACHINE, "bfloat16", 3, 50)
    assert batch_3.read == pytest.approx(2 * (ATTENTION + 2 * experts * EXPERT + SMALL + HEAD + 3 * cache), abs=1)
    assert batch_3.tokens_per_second == pytest.approx(3 * 2e9 / batch_3.read)


def test_prefill_bound_counts_active_weights_causal_attention_and_one_head():
    weights = ATTENTION + 2 * 2 * EXPERT + SMALL
    expected = 2 * 100 * weights + 2 * 100 * 100 * 2 * 24 + 2 * HEAD
    bound = roofline.prefill_bound(TINY, MACHINE, "float32", 100)
    assert bound.flops == expected
    assert bound.seconds == pytest.approx(expected / 3e9)
    assert roofline.prefill_bound(TINY, MACHINE, "bfloat16", 100).seconds == pytest.approx(expected / 5e9)


def test_decode_bound_is_the_slower_of_memory_and_compute():
    slow = MACHINE | {"float32": 1e3, "bfloat16": 1e3}
    bound = roofline.decode_bound(TINY, slow, "bfloat16", 1, 50)
    assert bound.seconds == bound.flops / 1e3 > bound.read / 2e9


def test_user_interval_reproduces_the_announced_load():
    # One token reads 72.9 GB at 26.8 TB/s; 2000 tokens take 72.0 GFLOP each at 7.9 PFLOP/s.
    assert roofline.announced_share() == pytest.approx(256 * 73.1e9 / 26.8e12 + 2000 * 70.5e9 / 7.91e15, rel=0.02)
    seconds = roofline.user_seconds(TINY, MACHINE, "float32", 100, 20)
    step = roofline.decode_bound(TINY, MACHINE, "float32", 1, 110).seconds
    assert seconds == pytest.approx(roofline.prefill_bound(TINY, MACHINE, "float32", 100).seconds + 20 * step)
    assert roofline.interval(TINY, MACHINE, "float32", 100, 20) == seconds / roofline.announced_share()


# Workers.


def test_serve_users_queues_users_behind_the_running_batch(monkeypatch):
    """Four users, one every 10 s, two at a time, of whom each batch takes 1 s to the first token and 25 in all."""
    now = [0.0]
    batches = []

    class SlowEngine(serve.Engine):
        def generate(self, prompts, tokens):
            batches.append([p[0] for p in prompts])
            now[0] += 25
            return serve.Generated([[0]] * len(prompts), now[0] - 24, now[0])

    monkeypatch.setattr(serve.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(serve.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    latencies = serve.users(SlowEngine(), [[0], [1], [2], [3]], 1, 10.0, 2)
    # 0 begins at 0; at 25, 1 and 2 wait; at 50, 3 does.
    assert batches == [[0], [1, 2], [3]]
    assert latencies == {"seconds": 75.0, "first": [1.0, 16.0, 6.0, 21.0], "total": [25.0, 40.0, 30.0, 45.0]}


@pytest.mark.slow
def test_worker_logits_match_the_oracle_and_errors_are_reported(tiny, expected):
    case = expected["unnormalised_mqa"]
    prompt = case["tokens"][0].tolist()
    with started(ours(GOLDEN / "unnormalised_mqa", "float32")) as engine:
        loaded = engine.load()
        assert loaded["versions"]["dbrx-jax"]
        assert loaded["seconds"] > 0
        reply = engine.ask("check", prompt=prompt, tokens=4)
        np.testing.assert_allclose(reply["logits"], case["logits"][0, -1], atol=1e-4)
        assert reply["greedy"] == case["greedy"][0, :4].tolist()
        with pytest.raises(BenchmarkError, match=r"^dbrx_jax: GenerationError: .*beyond the model's 128 positions"):
            engine.ask("decode", prompts=[prompt], tokens=1000)
        assert engine.ask("check", prompt=prompt, tokens=4) == reply  # the worker survives the error


def test_dead_worker_is_reported_in_one_line(tiny):
    with (
        started(Subject("gone", sys.executable, "benchmarks.workers.missing", tiny, "float32")) as engine,
        pytest.raises(BenchmarkError, match=r"^gone: the worker ended \(.*No module named benchmarks"),
    ):
        engine.load()


# Whole runs.


@pytest.fixture
def fixed_rates(monkeypatch):
    """Replaces the measurement of the machine by fixed rates."""
    monkeypatch.setattr("benchmarks.options.measure_apart", lambda: MACHINE)


def test_decode_and_prefill_benchmarks_write_results(tiny, fixed_rates, monkeypatch, tmp_path, capsys):
    options = ("--model", tiny, "--dtype", "float32", "--rounds", 2, "--prompt", 8)
    assert run(monkeypatch, "decode", *options, "--batch", 2, "--tokens", 5, "--output", tmp_path / "d.json") == 0
    decode = json.loads((tmp_path / "d.json").read_text())
    assert (decode["benchmark"], decode["model"], decode["against"]) == ("decode", "tiny", None)
    assert (decode["batch"], decode["prompt"], decode["tokens"], len(decode["rounds"])) == (2, 8, 5, 2)
    speeds = [r["dbrx_jax"]["tokens_per_second"] for r in decode["rounds"]]
    assert decode["summary"]["dbrx_jax"]["tokens_per_second"]["median"] == pytest.approx(sum(speeds) / 2)
    bound = roofline.decode_bound(SHALLOW, MACHINE, "float32", 2, 10)
    assert decode["roofline"]["tokens_per_second"] == pytest.approx(bound.tokens_per_second)
    out = capsys.readouterr().out
    assert "decode: tiny, float32, batch 2, prompt 8, tokens 5" in out
    assert f"{speeds[0] / 2 + speeds[1] / 2:,.0f} tokens/s" in out

    assert run(monkeypatch, "prefill", *options, "--output", tmp_path / "p.json") == 0
    prefill = json.loads((tmp_path / "p.json").read_text())
    assert prefill["summary"]["dbrx_jax"]["tokens_per_second"]["min"] > 0
    assert prefill["engines"]["dbrx_jax"]["jax"] == prefill["versions"]["jax"]


@pytest.mark.slow
def test_decode_benchmark_compares_int8_with_bfloat16(tiny, fixed_rates, monkeypatch, tmp_path, capsys):
    options = ("--dtype", "int8", "--against", "bfloat16", "--rounds", 1, "--prompt", 8, "--tokens", 2)
    assert run(monkeypatch, "decode", "--model", tiny, *options, "--output", tmp_path / "d.json") == 0
    result = json.loads((tmp_path / "d.json").read_text())
    (speeds,) = result["rounds"]
    ratio = speeds["dbrx_jax"]["tokens_per_second"] / speeds["bfloat16"]["tokens_per_second"]
    assert result["summary"]["ratio"]["tokens_per_second"]["median"] == pytest.approx(ratio)
    assert 0 < result["check"]["largest_difference"] < 0.2 * result["check"]["largest_logit"]  # not the same weights
    int8_line, bfloat16_line = (line for line in capsys.readouterr().out.splitlines() if "tokens/s (" in line)
    assert ("of the roofline" in int8_line, "of the roofline" in bfloat16_line) == (True, False)


def test_invalid_arguments_are_reported_in_one_line(tiny, fixed_rates, monkeypatch, tmp_path, capsys):
    for variable in ("DBRX_TRANSFORMERS_PYTHON", "DBRX_LLAMA_PYTHON"):
        monkeypatch.delenv(variable, raising=False)
    model = ("--model", tiny)
    for arguments, message in (
        (("decode", *model, "--rounds", 0), "--rounds: expected a whole number above 0, got 0"),
        (("decode", *model, "--tokens", 250), "has 256 positions, and 315 are asked for"),
        (("decode", "--model", "tiny"), "no configuration is called 'tiny'"),
        (
            ("prefill", *model, "--prompt", 8, "--against", "transformers"),
            "with --against-python or DBRX_TRANSFORMERS_PYTHON",
        ),
        (("load", *model, "--against", "llama.cpp", "--against-python", tmp_path), "is not an interpreter"),
        (("decode", *model, "--dtype", "int8", "--against", "transformers"), "has no int8 for DBRX; choose float32"),
        (("decode", *model, "--tokens", 5, "--against", "bfloat16"), "--against bfloat16: is what --dtype says"),
        (("convert", "--folder", tmp_path, "--layers", 0), "--layers: expected a whole number above 0, got 0"),
    ):
        assert run(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("benchmarks: ")
        assert error.count("\n") == 1


def test_failed_gguf_conversion_is_reported_in_one_line(tiny, tmp_path):
    assert "gguf" in PEERS["llama.cpp"].install
    bare_python = tmp_path / "python"  # without any installed package
    bare_python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare_python.chmod(0o755)
    with pytest.raises(BenchmarkError, match=r"tiny\.gguf: .*No module named 'gguf'"):
        peer("llama.cpp", bare_python, "float32", tiny, tmp_path / "tiny.gguf")


def test_random_checkpoint_is_written_once_with_the_expected_statistics(tiny, monkeypatch, tmp_path):
    for name, tensor in HuggingFaceFolder.open(tiny).stored.items():
        weight = np.float32(tensor.rows(0, tensor.shape[0]))
        assert tensor.dtype == "bfloat16", name
        if weight.ndim == 1:
            assert (weight == 1).all(), name
        else:
            assert weight.std() == pytest.approx(0.02, rel=0.15), name
    monkeypatch.setattr("benchmarks.checkpoints.config_names", lambda: ["tiny"])
    monkeypatch.setattr("benchmarks.checkpoints.DbrxConfig.from_name", lambda name: SHALLOW)
    folder = checkpoint("tiny", tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"mine")
    assert (checkpoint("tiny", tmp_path) / "model.safetensors").read_bytes() == b"mine"


def test_read_rates_are_positive(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    assert read_rate([tmp_path / "a"]) > 1e6
    rate = direct_rate([tmp_path / "a"])
    assert rate is None or rate > 1e3


def test_profile_sums_trace_events_by_kind_of_operation(tmp_path):
    names = (
        "multiply_reduce_fusion.12",
        "multiply_reduce_fusion.7.clone",
        "while",
        "$cli.py:3 main",
        "np.asarray(jax.Array)",
    )
    operations = [{"ph": "X", "name": name, "dur": 64e3 * (i + 1)} for i, name in enumerate(names)]
    trace = json.dumps({"traceEvents": [*operations, {"ph": "M", "name": "process_name"}]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "host.trace.json.gz").write_bytes(gzip.compress(trace.encode()))
    totals = profile.by_kind(profile.events(tmp_path))
    scale = 1 / profile.TOKENS
    assert totals == [("multiply_reduce_fusion", 3 * 64 * scale, 2 * scale), ("while", 3 * 64 * scale, scale)]


# The page.


def sample_result(against, ours_speed, peer_speed, **more):
    figures = {"dbrx_jax": ours_speed} | ({against: peer_speed} if against else {})
    return {
        "benchmark": "decode",
        "date": "2026-11-21",
        "machine": "a machine",
        "python": "3.11.7",
        "versions": {"jax": "0.10.2"},
        "load_before": 0.1,
        "measured": MACHINE,
        "model": "bench",
        "dtype": "float32",
        "against": against,
        "batch": 8,
        "prompt": 64,
        "tokens": 32,
        "roofline": {"tokens_per_second": 100.0},
        "engines": {"dbrx_jax": {"jax": "0.10.2"}, "peer": {"torch": "2.13.0"}},
        "summary": compare.summary([{name: {"tokens_per_second": v} for name, v in figures.items()}]),
        **more,
    }


CONVERTED = {
    "date": "2026-11-20",
    "machine": "another",
    "python": "3.12.0",
    "versions": {"jax": "0.12.0"},
    "checkpoint": {"layers": 1, "experts": 16, "gigabytes": 8.98},
    "rounds": [
        {
            "cp": {"seconds": 34.95, "gb_per_second": 0.257, "ratio_to_cp": 1.0},
            "to-orbax": {"seconds": 15.8, "rss_anon_bytes": 107208704, "gb_per_second": 0.568, "ratio_to_cp": 2.209},
        }
    ],
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    files = {
        "b": sample_result("transformers", 50.0, 25.0),
        "a": sample_result(None, 60.0, None, dtype="bfloat16", batch=1),
        "convert": CONVERTED,
        "first_token": {"runs": {}},  # written by another script
        "slices": [],
    }
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def test_report_page_lists_every_result_in_order(results):
    text = report.page(report.read_results(results), ["decode.svg"])
    float32 = "| bench | float32 | 8 | 64 + 32 | 0.10.2 | 100 | 50 tokens/s (50%) | transformers: 25 tokens/s (25%) |"
    assert f"{float32} **2.00** (2.00 to 2.00) | 1 |" in text
    bfloat16 = "| bench | bfloat16 | 1 | 64 + 32 | 0.10.2 | 100 | 60 tokens/s (60%) |  |  | 1 |"
    assert text.index(float32) < text.index(bfloat16)
    assert "| 8.98 GB | 1 | to-orbax | 0.57 GB/s | 2.21 | 107 MB | 2 |" in text
    assert "| 1 | 2026-11-21 | a machine | jax 0.10.2; torch 2.13.0 | 2.0 GB/s; 3 and 5 GFLOP/s | 0.1 |" in text
    assert "| 2 | 2026-11-20 | another | python 3.12.0, jax 0.12.0 |  |  |" in text
    assert "## Prompts\n\nNot measured yet." in text
    assert "![Decoding](benchmarks/decode.svg)" in text
    (results / "a.json").write_text("{")
    with pytest.raises(BenchmarkError, match=r"a\.json: not JSON"):
        report.read_results(results)


def test_report_is_reproducible(results, monkeypatch, tmp_path):
    reports = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert run(monkeypatch, "report", "--results", results, "--docs", tmp_path / name) == 0
        reports.append({f.name: f.read_bytes() for f in sorted((tmp_path / name).rglob("*.*"))})
    assert reports[0] == reports[1]
    assert set(reports[0]) == {"benchmarks.md", "decode.svg"}
    assert len(reports[0]["decode.svg"]) < 60_000
    assert b"bench, float32, batch 8" in reports[0]["decode.svg"]
