"""Tests of an engine and of the server on two processes of two CPU devices each."""

import json
import os
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

from dbrx_jax import DbrxTokenizer
from dbrx_jax.generation_config import GenerationConfig
from tests.conftest import GOLDEN, write_byte_vocabulary
from tests.engine.test_engine import alone, prompt_of
from tests.processes import Processes, free_address, run_flags

pytestmark = pytest.mark.slow
WORKER = (sys.executable, Path(__file__).with_name("engine_worker.py"))
SERVE = (Path(sys.executable).parent / "dbrx-jax", "serve")
PROPOSED = "vllm:spec_decode_num_draft_tokens_total"
OPTIONS = [
    {},
    {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "suppress_tokens": [3]},
]


def worker(folder, task, requests=()):
    """Starts the workers; requests are pairs of a prompt and options."""
    file = folder / "requests.jsonl"
    rows = ({"prompt": prompt, "config": config, "seed": i} for i, (prompt, config) in enumerate(requests))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Processes(folder, 2, 2, *WORKER, free_address(), 2, "{i}", task, file)


def assert_one_line(text, *fragments):
    assert len(text.splitlines()) == 1, text
    for fragment in fragments:
        assert fragment in text


def test_requests_get_the_tokens_of_one_device(model, tmp_path):
    prompts = [prompt_of(i, length) for i, length in enumerate((3, 145, 300))]
    configs = [{"eos_token_id": 400, "max_new_tokens": 6 + i, **given} for i, given in enumerate(OPTIONS)]
    with worker(tmp_path, "plain", zip(prompts, configs, strict=True)) as run:
        assert run.statuses() == [0, 0], run.stderr(0) + run.stderr(1)
        got = [json.loads(line) for line in run.stdout(0).splitlines()]
        assert (run.stderr(0), run.stdout(1), run.stderr(1)) == ("", "", "")
    assert len(got) == len(prompts)
    for i, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        want = [tokens for tokens, _ in alone(model, prompt, GenerationConfig.from_dict(config), seed=i)]
        assert got[i] == want, config


def test_different_options_are_refused(tmp_path):
    with worker(tmp_path, "options") as run:
        assert run.statuses() == [2, 2]
        for i in range(2):
            assert_one_line(run.stderr(i), "the engine's options: process 1 has others than process 0")


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_ends_the_other_while_it_decodes(killed, tmp_path):
    with worker(tmp_path, "stream", [([1, 2, 3], {"eos_token_id": 400, "max_new_tokens": 500})]) as run:
        run.wait_for_output("\n")
        run.processes[killed].kill()
        begin = time.monotonic()
        statuses = run.statuses(30)
        assert time.monotonic() - begin < 20
        assert statuses[killed] == -signal.SIGKILL
        assert statuses[1 - killed] in (os.EX_TEMPFAIL, -signal.SIGABRT)  # JAX may notice first
        assert_one_line(run.stderr(1 - killed), "start all again")


def test_error_of_process_0_ends_the_other(tmp_path):
    with worker(tmp_path, "fail", [([1, 2, 3], {"max_new_tokens": 5})]) as run:
        statuses = run.statuses(60)
        assert statuses[0] == 2
        assert statuses[1] in (os.EX_TEMPFAIL, -signal.SIGABRT)
        assert "ZeroDivisionError" in run.stderr(0)
        assert run.stderr(0).splitlines()[-1] == "worker: the engine failed"
        assert_one_line(run.stderr(1), "process 0 was lost, or ended before this one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of golden/fused with a vocabulary of single bytes."""
    path = tmp_path_factory.mktemp("processes") / "fused"
    shutil.copytree(GOLDEN / "fused", path, ignore=shutil.ignore_patterns("*.npz"))
    write_byte_vocabulary(path)
    return path


def serve(folder, tmp_path, *more):
    options = ("--port", 0, "--mesh", "expert=2,tensor=2", "--max-rows", 2, "--cache-gb", 0.02, "--no-warmup", *more)
    return Processes(tmp_path, 2, 2, *SERVE, folder, *options, *run_flags(2))


def url_of(run):
    """Waits until the server takes requests; returns its URL."""
    end = time.monotonic() + 240
    while "Serving fused" not in run.stderr(0):
        assert time.monotonic() < end, run.stderr(0) + run.stderr(1)
        assert run.processes[0].poll() is None, run.stderr(0) + run.stderr(1)
        time.sleep(0.2)
    return run.stderr(0).partition(" at ")[2].partition(" ")[0]


def ask(url, **body):
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def greedy(model, tokenizer, text, count):
    ids = tokenizer.encode(text)
    out = model.generate([ids], max_new_tokens=count, eos_token_id=[260, 262])
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_process_0_answers_and_sigterm_of_the_other_ends_both_in_order(folder, model, tmp_path):
    """Greedy texts, with proposals that are verified, a constraint, and scores of a prompt."""
    tokenizer, repeated = DbrxTokenizer.from_pretrained(folder), "one two three " * 6
    ids = tokenizer.encode("hello you")
    with serve(folder, tmp_path, "--speculation", 3) as run:
        url = url_of(run)
        for text, count in (("hello you", 8), (repeated, 40)):
            answer = ask(url, prompt=text, max_tokens=count, temperature=0)
            assert answer["choices"][0]["text"] == greedy(model, tokenizer, text, count)
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=30) as response:
            metrics = response.read().decode()
        proposed = next(line for line in metrics.splitlines() if line.startswith(PROPOSED))
        assert float(proposed.split()[-1]) > 0
        chosen = ask(url, prompt="hello you", guided_choice=["yes", "quite so"], max_tokens=9, temperature=0)
        assert chosen["choices"][0]["text"] in ("yes", "quite so")
        scored = ask(url, prompt="hello you", max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
        logits = np.asarray(model([ids]))[0]
        want = [float(jax.nn.log_softmax(row)[token]) for row, token in zip(logits[:-1], ids[1:], strict=True)]
        np.testing.assert_allclose(scored["token_logprobs"][1:], want, rtol=0, atol=1e-4)
        run.processes[1].terminate()
        assert run.statuses(60) == [0, 0], run.stderr(0) + run.stderr(1)
        assert "mesh expert=2,tensor=2" in run.stderr(0)
        assert (run.stdout(1), run.stderr(1)) == ("", "")


def test_idle_server_ends_when_the_other_process_is_killed(folder, tmp_path):
    with serve(folder, tmp_path) as run:
        url_of(run)
        lines = len(run.stderr(0).splitlines())
        run.processes[1].kill()
        begin = time.monotonic()
        assert run.processes[0].wait(30) == os.EX_TEMPFAIL
        assert time.monotonic() - begin < 15
        time.sleep(0.5)
        assert_one_line("\n".join(run.stderr(0).splitlines()[lines:]), "dbrx-jax: process 1 was lost")
