"""Tests of generate --file: results, options and errors of rows, and what is left when it is interrupted."""

import json
import shutil
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dbrx_jax.cli.file_run import derive_seed
from dbrx_jax.cli.output import ResumableOutput
from dbrx_jax.cli.rates import Rates, row_progress
from dbrx_jax.engine.engine import Engine
from dbrx_jax.engine.programs import Programs
from dbrx_jax.errors import NotFiniteError
from dbrx_jax.generation.stream import TokenStream
from tests.cli.test_cli import BIN
from tests.commands import in_process
from tests.generation.test_generate import count_compilations


@pytest.fixture
def run(source, tmp_path):
    """A function that writes rows to a prompts file and completes it to the output."""
    prompts, own = tmp_path / "prompts.jsonl", source

    def run(rows, *options, output="out.jsonl", source=own):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        prompts.write_bytes(b"\n".join(lines) + b"\n")
        return in_process("dbrx-jax", "generate", source, "--file", prompts, "--output", tmp_path / output, *options)

    return run


@pytest.fixture
def damaged(source, tmp_path_factory):
    """A function that makes a copy of the checkpoint with a NaN in one row of a tensor."""

    def damage(name, row):
        folder = tmp_path_factory.mktemp("damaged") / "checkpoint"
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[name][row, 2] = float("nan")
        save_file(tensors, folder / "model.safetensors")
        return folder

    return damage


def results(tmp_path, name="out.jsonl"):
    return [json.loads(line) for line in (tmp_path / name).read_bytes().splitlines()]


def interrupt_at(monkeypatch, number, error=KeyboardInterrupt):
    """Raises an error where this number of results, and perhaps a few more, have been written."""
    written = []

    def write(output, results, original=ResumableOutput.write):
        for result in results:
            if len(written) == number:
                raise error
            original(output, [result])
            written.append(result)

    monkeypatch.setattr(ResumableOutput, "write", write)


def fail_after_results(monkeypatch, error):
    """Makes a decode step fail once results have been written."""
    steps, is_written = [], threading.Event()

    def write(output, results, original=ResumableOutput.write):
        original(output, results)
        is_written.set()

    def decode(programs, *arguments, original=Programs.decode):
        steps.append(arguments)
        if len(steps) == 8:
            assert is_written.wait(60)
            raise error
        return original(programs, *arguments)

    monkeypatch.setattr(ResumableOutput, "write", write)
    monkeypatch.setattr(Programs, "decode", decode)


class TestResults:
    def test_rows_have_their_own_options(self, run, tmp_path, models):
        rows = [
            {"prompt": "abc", "id": 7},
            {"prompt": "abc", "max_new_tokens": 3, "n": None},
            {"prompt": "xy", "temperature": 1.5, "top_k": 20, "seed": 9, "max_new_tokens": 6},
            {"prompt": "abc", "stop": "a"},
        ]
        done = run(rows, "--max-new-tokens", 5, "--token-ids", "--logprobs", "--batch-size", 1)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        first, short, sampled, stopped = results(tmp_path)
        assert (first["id"], short["n"], stopped["stop"]) == (7, None, "a")

        def expected(prompt, **options):
            options |= {"return_dict_in_generate": True, "output_logprobs": True, "eos_token_id": [260, 262]}
            return models("dense").generate([list(prompt)], **options)

        for result, prompt, options in (
            (first, b"abc", {"max_new_tokens": 5}),
            (short, b"abc", {"max_new_tokens": 3}),
            (sampled, b"xy", {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5, "top_k": 20, "seed": [9]}),
        ):
            answer = expected(prompt, **options)
            ids = answer.sequences[0, len(prompt) :].tolist()
            assert result["token_ids"] == ids
            assert result["completion"] == bytes(i for i in ids if i < 256).decode(errors="replace")
            assert result["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
            assert result["finish_reason"] == ("stop" if ids[-1] in (260, 262) else "length")
            np.testing.assert_allclose(result["logprobs"], answer.logprobs[0], atol=2e-5)

    def test_bad_rows_get_an_error_and_the_rest_a_completion(self, run, tmp_path):
        rows = [
            {"prompt": "abc"},
            b"{",
            {"id": 3, "prompt": 5},
            {"prompt": "long" * 40},
            {"prompt": "abc", "temperature": -1, "error": "of an earlier run"},
            {"prompt": "abc", "top_p": 0.5},
            {"messages": [{"role": "user"}]},
            b'"\xff"',
            {"prompt": "abc", "max_new_token": 2},
            {"prompt": "abc", "error": "of an earlier run"},
        ]
        done = run(rows, "--max-new-tokens", 5, "--batch-size", 3)
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert "prompts.jsonl: 8 rows get an error for a completion; line 2: not JSON" in lines[0]
        assert lines[-1] == "8 of 10 rows have an error"
        found = results(tmp_path)
        assert found[0]["completion"] == found[-1]["completion"] != ""
        assert "error" not in found[0]
        assert "error" not in found[-1]
        fragments = (
            "line 2: not JSON",
            "line 3: expected a text",
            "line 4: a prompt of 160 tokens fills the model's 128 positions; shorten it",
            "line 5: temperature: expected a number above 0, got -1; 0 is greedy",
            "line 6: top_p draws at random; give temperature above 0",
            "line 7: the chat template failed",
            "line 8: not JSON",
            "line 9: max_new_token: there is no such option; did you mean max_new_tokens?",
        )
        for result, fragment in zip(found[1:-1], fragments, strict=True):
            assert fragment in result["error"]
            assert "completion" not in result
        assert found[2]["id"] == 3

    def test_rows_take_every_option_of_the_configuration(self, run, tmp_path, models):
        first = models("dense").generate([list(b"abc")], max_new_tokens=1)[0, -1].item()
        rows = [
            {"prompt": "abc", "suppress_tokens": [first], "logit_bias": {"65": 1000}, "max_length": 6},
            {"prompt": "abc", "do_sample": True, "epsilon_cutoff": 0.5, "seed": 1, "max_new_tokens": 3},
            {"prompt": "abc", "num_beams": 3},
            {"prompt": "abc", "max_tokens": 3},
            {"prompt": "abc", "stop": "a", "stop_strings": ["b"]},
            {"prompt": "abc", "temperature": 0, "do_sample": True},
            {"prompt": "abc", "max_new_tokens": 2, "num_beams": 1, "n": 7, "output_scores": True},
            {"prompt": "abc", "logit_bias": {"3000": 1}},
        ]
        assert run(rows, "--max-new-tokens", 5).returncode == 1
        biased, sampled, *errors, plain, outside = results(tmp_path)
        assert (biased["completion"], biased["finish_reason"]) == ("AAA", "length")
        assert sampled["usage"]["completion_tokens"] == 3
        assert plain["usage"]["completion_tokens"] == 2
        fragments = (
            "line 3: num_beams: beam search is not implemented",
            "line 4: max_tokens: its name here is max_new_tokens",
            "line 5: stop and stop_strings are the same option",
            "line 6: temperature: expected a number above 0, got 0; 0 is greedy",
            "line 8: logit_bias: expected ids below",
        )
        for result, fragment in zip([*errors, outside], fragments, strict=True):
            assert fragment in result["error"]

    def test_lengths_do_not_depend_on_the_batch(self, run, tmp_path):
        """The default number of new tokens, cut to what fits the model, and lengths are of each row's own prompt."""
        rows = [{"prompt": "a" * n, "logit_bias": {"65": 1000}} for n in (3, 100)]
        end = {"logit_bias": {"262": 1000}, "min_length": 105, "max_new_tokens": 20}  # 262 ends a row
        rows += [{"prompt": "a" * n, **end} for n in (90, 95, 100)]
        for size in (1, 3):
            assert run(rows, "--batch-size", size, output=f"{size}").returncode == 0
        assert results(tmp_path, "1") == results(tmp_path, "3")
        assert [r["usage"]["completion_tokens"] for r in results(tmp_path, "3")] == [125, 28, 16, 11, 6]

    def test_error_of_a_batch_is_of_the_row_that_has_it(self, run, tmp_path, monkeypatch):
        original = TokenStream.__next__

        def fail(stream):
            if stream.prompt_lengths.max() > 3:
                raise NotFiniteError("row 0: its logits are not finite")
            return original(stream)

        monkeypatch.setattr(TokenStream, "__next__", fail)
        done = run(["abc", "abcd", "abc"], "--max-new-tokens", 2)
        assert done.returncode == 1
        assert [r.get("error") for r in results(tmp_path)] == [None, "line 2: its logits are not finite", None]

    def test_first_batch_without_finite_logits_ends_the_command(self, run, tmp_path, monkeypatch):
        streams = []

        def fail(stream):
            streams.append(stream)
            raise NotFiniteError("row 0: the logits of new token 1 are not finite")

        monkeypatch.setattr(TokenStream, "__next__", fail)
        done = run(["abc", "a"], "--max-new-tokens", 2)
        assert done.returncode == 2
        line = "dbrx-jax: line 1: the logits of new token 1 are not finite"
        assert done.stderr.splitlines()[-1] == line
        assert len(streams) == 3  # both rows, then each alone
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]

    def test_rows_without_finite_logits_get_an_error(self, run, tmp_path, damaged):
        rows = [{"prompt": "abd", **TWO}, "abc", "abd", *["ab"] * 4]
        done = run(rows, "--max-new-tokens", 2, "--batch-size", 8, source=damaged("transformer.wte.weight", ord("d")))
        assert done.returncode == 1
        *first, second, third = results(tmp_path)[:4]
        message = "the logits of new token 1 are not finite; look for damaged weights with dbrx-convert"
        assert [result["error"].partition(" inspect")[0] for result in (*first, third)] == [
            f"line 1: {message}", f"line 1: {message}", f"line 3: {message}"
        ]  # fmt: skip
        assert {result["usage"]["completion_tokens"] for result in (second, *results(tmp_path)[4:])} == {2}

    @pytest.mark.parametrize("size", [3, 8])
    def test_model_without_finite_logits_ends_the_command(self, run, tmp_path, damaged, size):
        rows = [{"prompt": "abc", **TWO}, "a", "[", "b", "a", "b", {"prompt": "c", "max_new_tokens": 1}]
        options = ("--max-new-tokens", 2, "--batch-size", size)
        done = run(rows, *options, source=damaged("lm_head.weight", 3))
        assert done.returncode == 2
        line = "dbrx-jax: line 1: the logits of new token 1 are not finite; look for"
        assert done.stderr.splitlines()[-1].startswith(line)
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]

    def test_memory_that_runs_out_ends_the_command_and_says_what_fits(self, run, tmp_path, monkeypatch):
        fail_after_results(monkeypatch, RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes."))
        done = run(ROWS, *OPTIONS)
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith("dbrx-jax: generating 3 rows of up to 128 tokens: out of memory: 0.12 GB more did")
        assert last.endswith("; it would fit with an int8 cache, or 1 row")
        assert "Traceback" not in done.stderr
        assert 0 < len(results(tmp_path, "out.jsonl.incomplete")) < 8

    def test_several_completions_of_a_row(self, run, tmp_path):
        rows = ["abc", {"prompt": "xy", "num_return_sequences": 1, "index": "own"}, "abc"]
        options = ("--temperature", 2, "--seed", 3, "--num-return-sequences", 2, "--max-new-tokens", 8)
        assert run(rows, *options, "--batch-size", 3).returncode == 0
        found = results(tmp_path)
        assert [(r["prompt"], r.get("index")) for r in found] == [
            ("abc", 0), ("abc", 1), ("xy", "own"), ("abc", 0), ("abc", 1)
        ]  # fmt: skip
        assert len({r["completion"] for r in found if r["prompt"] == "abc"}) == 4

    def test_samples_do_not_depend_on_the_batch_size(self, run, tmp_path):
        options = ("--temperature", 1.5, "--seed", 4, "--max-new-tokens", 6)
        for size in (1, 3):
            assert run(["abc"] * 5, *options, "--batch-size", size, output=f"{size}").returncode == 0
        assert results(tmp_path, "1") == results(tmp_path, "3")
        assert len({r["completion"] for r in results(tmp_path, "1")}) > 1

    def test_smaller_batch_compiles_nothing(self, run, monkeypatch):
        options = ("--max-new-tokens", 6, "--batch-size", 3)
        assert run(["abc", "abcdefgh", "ab"], *options).returncode == 0
        rows = ["abc", "abcdefgh", "ab", "x", {"prompt": "xy", "max_new_tokens": 3}]
        assert count_compilations(lambda: run(rows, *options, output="second")) == 0

    def test_stdin_and_stdout(self, source):
        arguments = ("generate", source, "--file", "-", "--output", "-", "--max-new-tokens", 2)
        done = in_process("dbrx-jax", *arguments, stdin='"abc"\n\n{"prompt": "é", "id": "ü"}'.encode())
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [r["prompt"] for r in found] == ["abc", "é"]
        assert found[1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2}

    def test_full_device_is_one_line(self, run):
        done = run(["abc"], "--max-new-tokens", 2, output="/dev/full")
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == "dbrx-jax: /dev/full: cannot be written (No space left on device)"

    def test_progress_shows_rows_rate_and_time_left(self, run):
        done = run(["abc"] * 7, "--max-new-tokens", 4, "--batch-size", 3)
        lines = [line for line in done.stderr.splitlines() if " rows, " in line]
        done = [int(line.split(" of 7 rows")[0]) for line in lines]
        assert done == sorted(set(done))
        assert done[-1] == 7
        assert all("tokens/s" in line and line.endswith(" s left") for line in lines)
        assert lines[-1].endswith(", 0 s left")

    def test_progress_is_lines_on_a_terminal_that_cannot_redraw(self, monkeypatch, capsys):
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take stderr for a terminal
        with row_progress(400, Rates(), bar=True) as advance:
            advance(80)
        assert capsys.readouterr().err == "80 of 400 rows\n"


TWO = {"temperature": 1, "num_return_sequences": 2}
ROWS = tuple({"prompt": "abc"[: 1 + i % 3], "id": i} for i in range(8))
OPTIONS = ("--temperature", "1.5", "--seed", "5", "--max-new-tokens", "5", "--batch-size", "3")


class TestInterrupted:
    def test_same_command_goes_on_behind_finished_rows(self, run, tmp_path, monkeypatch):
        assert run(ROWS, *OPTIONS, output="whole").returncode == 0
        incomplete = tmp_path / "out.jsonl.incomplete"
        with monkeypatch.context() as patch:
            interrupt_at(patch, 3)
            done = run(ROWS, *OPTIONS)
        assert done.returncode == 130
        assert f"{incomplete} holds 3 of 8 rows; the same command goes on behind them" in done.stderr
        assert not (tmp_path / "out.jsonl").exists()
        with incomplete.open("a") as file:
            file.write('{"prompt": "a", "comple')  # a run that was killed while it wrote
        submitted = []
        original = Engine.submit
        monkeypatch.setattr(Engine, "submit", lambda engine, r: (submitted.append(r.seed), original(engine, r))[1])
        assert run(ROWS, *OPTIONS).returncode == 0
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole").read_bytes()
        assert submitted == [[derive_seed(5, line, 0)] for line in range(4, 9)]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl", "whole"]

    def test_run_goes_on_between_the_completions_of_a_row(self, run, tmp_path, monkeypatch):
        options = (*OPTIONS, "--num-return-sequences", "2", "--batch-size", "8")
        assert run(ROWS, *options, output="whole").returncode == 0
        with monkeypatch.context() as patch:
            interrupt_at(patch, 3)
            assert run(ROWS, *options).returncode == 130
        assert len(results(tmp_path, "out.jsonl.incomplete")) == 3
        assert run(ROWS, *options).returncode == 0
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole").read_bytes()

    def test_errors_of_an_earlier_run_count(self, run, tmp_path, monkeypatch):
        rows = [[], *ROWS]
        with monkeypatch.context() as patch:
            interrupt_at(patch, 3)
            assert run(rows, *OPTIONS).returncode == 130
        done = run(rows, *OPTIONS)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "1 of 9 rows have an error"

    def test_unforeseen_error_keeps_finished_rows(self, run, tmp_path, monkeypatch):
        fail_after_results(monkeypatch, RuntimeError("of the device"))
        with pytest.raises(RuntimeError, match="of the device"):
            run(ROWS, *OPTIONS)
        ids = [r["id"] for r in results(tmp_path, "out.jsonl.incomplete")]
        assert 0 < len(ids) < 8
        assert ids == list(range(len(ids)))

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            (["other"], (), "is from a run with other prompts; give the same, or remove"),
            (ROWS, ("--temperature", "1.4"), "other temperature (1.5, and now 1.4)"),
            (ROWS, ("--logprobs",), "other logprobs (False, and now True)"),
        ],
    )
    def test_rows_of_other_prompts_or_options_are_not_mixed(self, run, tmp_path, monkeypatch, rows, options, message):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 3)
            run(ROWS, *OPTIONS)
        before = (tmp_path / "out.jsonl.incomplete").read_bytes()
        done = run(rows, *OPTIONS, *options)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert (tmp_path / "out.jsonl.incomplete").read_bytes() == before

    def test_incomplete_file_of_an_unknown_run_is_refused(self, run, tmp_path):
        (tmp_path / "out.jsonl.incomplete").write_text("mine\n")
        done = run(["abc"], "--max-new-tokens", 2)
        assert done.returncode == 2
        assert "is of an unknown run; remove it" in done.stderr
        assert (tmp_path / "out.jsonl.incomplete").read_text() == "mine\n"

    @pytest.mark.parametrize(
        "kind",
        [
            signal.SIGTERM,
            pytest.param(signal.SIGINT, marks=pytest.mark.slow),
            pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        ],
    )
    def test_killed_run_leaves_its_rows(self, source, tmp_path, kind):
        prompts, out = tmp_path / "p", tmp_path / "out.jsonl"
        prompts.write_text('"abc"\n' * 20_000)
        options = ("--file", prompts, "--output", out, "--max-new-tokens", "3", "--batch-size", "2")
        process = subprocess.Popen([BIN / "dbrx-jax", "generate", source, *options], stderr=subprocess.DEVNULL)
        incomplete = tmp_path / "out.jsonl.incomplete"
        end = time.monotonic() + 120
        while not incomplete.exists() or incomplete.stat().st_size < 1000:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(kind)
        assert process.wait(60) != 0
        lines = incomplete.read_bytes().split(b"\n")
        assert {json.loads(line)["prompt"] for line in lines[:-1]} == {"abc"}

    def test_name_that_was_taken_meanwhile_is_one_line(self, run, tmp_path, monkeypatch):
        original = TokenStream.__next__
        folder = tmp_path / "out.jsonl"
        monkeypatch.setattr(TokenStream, "__next__", lambda s: (folder.mkdir(exist_ok=True), original(s))[1])
        done = run(["abc"], "--max-new-tokens", 2)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == f"dbrx-jax: {folder}: cannot be written (Is a directory)"
        assert len(results(tmp_path, "out.jsonl.incomplete")) == 1

    def test_output_that_is_a_loop_of_links_is_replaced(self, run, tmp_path):
        (tmp_path / "out.jsonl").symlink_to("out.jsonl")
        assert run(["abc"], "--max-new-tokens", 2).returncode == 0
        assert [row["prompt"] for row in results(tmp_path)] == ["abc"]
