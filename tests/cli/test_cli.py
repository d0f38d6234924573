"""Tests of the command lines: standard output, standard error and exit status."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dbrx_jax.cli.chat import Conversation, converse
from tests.cli.test_before_load import edit
from tests.commands import in_process
from tests.conftest import GOLDEN

BIN = Path(sys.executable).parent


def command(name, *arguments, stdin="", env=None):
    return subprocess.run(
        [BIN / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=300,
        env={**os.environ, **(env or {})},
    )


def fails(result, *fragments):
    """Asserts one line on stderr with these fragments, nothing on stdout, and exit status 2."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    """An Orbax checkpoint of golden/dense with a vocabulary of single bytes."""
    destination = tmp_path_factory.mktemp("orbax") / "dense"
    done = command("dbrx-convert", "to-orbax", source, destination)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == f"{source}: DBRX of 123,072 parameters, fused layout"
    assert lines[1].startswith(f"{destination}: converted 0.000492 GB in ")
    assert len(lines) == 2
    return destination


class TestGenerate:
    def test_generate_writes_text_to_stdout_and_rates_to_stderr(self, checkpoint):
        done = command("dbrx-jax", "generate", checkpoint, "--prompt", "abc", "--max-new-tokens", 6)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\n")
        lines = [line for line in done.stderr.splitlines() if not line.startswith("Compiling for ")]  # if it takes long
        assert lines[0].startswith(f"Loaded {checkpoint} (0.1M parameters, float32) in ")
        assert lines[1].startswith("prefill 3 tokens, ")
        assert "; decode 5 tokens, " in lines[1]
        assert len(lines) == 2

    def test_generate_repeats_samples_of_a_seed(self, checkpoint):
        arguments = ("generate", checkpoint, "--prompt", "abc", "--max-new-tokens", 8, "--temperature", 1.5, "--seed")
        a, b, c = (command("dbrx-jax", *arguments, seed).stdout for seed in (1, 1, 2))
        assert a == b != c

    def test_settings_of_the_checkpoint_apply(self, source, tmp_path, models):
        """They need the tokenizer too; the user's own words win."""
        folder = tmp_path / "checkpoint"
        shutil.copytree(source, folder)
        settings = {"stop_strings": ["BA"], "max_new_tokens": 9, "eos_token_id": 262, "output_scores": True}
        settings |= {"logit_bias": {"65": 1000}, "bad_words_ids": [[65, 65]], "sequence_bias": [[[65, 66], 1000]]}
        (folder / "generation_config.json").write_text(json.dumps(settings))

        def generate(*options):
            done = in_process("dbrx-jax", "generate", folder, "--prompt", "abc", *options)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert generate() == "A\n"
        assert generate("--stop", "x") == "ABABABABA\n"
        assert generate("--stop", "x", "--max-new-tokens", 4) == "ABAB\n"
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('"abc"\n{"prompt": "abc", "stop": "x", "max_new_tokens": 3}\n')
        done = in_process("dbrx-jax", "generate", folder, "--file", prompts)
        assert [json.loads(line)["completion"] for line in done.stdout.splitlines()] == ["A", "ABA"]
        edit(folder / "generation_config.json", top_k="x")
        fails(in_process("dbrx-jax", "generate", folder, "--prompt", "abc"), "generation_config.json: top_k: expected")

    def test_verify_finds_a_flipped_bit(self, checkpoint, source, tmp_path):
        folder = tmp_path / "checkpoint"
        shutil.copytree(checkpoint, folder)
        chunk = folder / "params/state/blocks.0.attention.out/0.0.0"
        data = bytearray(chunk.read_bytes())
        data[101] ^= 1
        chunk.write_bytes(data)
        arguments = ("generate", folder, "--prompt", "abc", "--max-new-tokens", 2)
        assert in_process("dbrx-jax", *arguments).returncode == 0
        fails(in_process("dbrx-jax", *arguments, "--verify"), "blocks.0.attention.out")
        fails(in_process("dbrx-jax", "chat", folder, "--verify"), "blocks.0.attention.out")
        done = in_process("dbrx-jax", "generate", source, "--prompt", "abc", "--verify")
        fails(done, "safetensors have no digests to verify")

    def test_damaged_weights_end_in_one_line(self, source, tmp_path):
        from safetensors.numpy import load_file, save_file

        folder = tmp_path / "checkpoint"
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"][3, 2] = float("nan")
        save_file(tensors, folder / "model.safetensors")
        done = in_process("dbrx-jax", "generate", folder, "--prompt", "abc", "--max-new-tokens", 2)
        assert (done.returncode, done.stdout) == (2, "")
        line = done.stderr.splitlines()[-1]
        assert "the logits of new token 1 are not finite; look for damaged weights" in line


class TestConvert:
    def test_convert_rejects_invalid_arguments(self, tmp_path, fused_copy):
        fails(in_process("dbrx-convert", "to-orbax", "/nowhere", tmp_path / "o"), "/nowhere: there is no such folder")
        (fused_copy / "model-00001-of-00013.safetensors").unlink()
        fails(in_process("dbrx-convert", "to-orbax", fused_copy, tmp_path / "o"), "there is no such file")
        assert not (tmp_path / "o").exists()
        assert in_process("dbrx-convert").returncode == 2

    def test_to_hf_verify_and_inspect_a_round_trip(self, checkpoint, tmp_path):
        done = command("dbrx-convert", "to-hf", checkpoint, tmp_path / "hf", "--max-shard-size", "100KB")
        assert done.returncode == 0, done.stderr
        same_model = command("dbrx-convert", "verify", checkpoint, tmp_path / "hf")
        assert (same_model.returncode, same_model.stdout) == (
            0,
            "every parameter is equal (23); so are configuration, tokenizer, template and generation settings\n",
        )
        facts = json.loads(command("dbrx-convert", "inspect", tmp_path / "hf", "--json").stdout)
        assert facts["problems"] == []
        assert facts["kind"] == "fused layout"
        other_model = command("dbrx-convert", "verify", checkpoint, GOLDEN / "unnormalised_mqa", "--json")
        assert other_model.returncode == 1
        assert {d["kind"] for d in json.loads(other_model.stdout)} == {"setting", "shape", "missing"}
        fails(
            in_process("dbrx-convert", "verify", tmp_path / "hf"),
            "safetensors have no digests; dbrx-convert to-orbax makes",
        )
        fails(
            in_process("dbrx-convert", "verify", checkpoint, checkpoint, "--logits"), "give two checkpoints and --text"
        )
        fails(in_process("dbrx-convert", "to-hf", checkpoint, tmp_path / "x", "--max-shard-size", "big"), "such as 5GB")
        fails(in_process("dbrx-convert", "inspect", tmp_path / "nothing"), "there is no such folder")

    def test_to_orbax_warns_of_values_that_are_not_finite(self, tmp_path):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(GOLDEN / "dense" / "model.safetensors")
        tensors["lm_head.weight"][3, 2] = float("inf")
        (tmp_path / "s").mkdir()
        save_file(tensors, tmp_path / "s" / "model.safetensors")
        (tmp_path / "s" / "config.json").write_text((GOLDEN / "dense" / "config.json").read_text())
        done = command("dbrx-convert", "to-orbax", tmp_path / "s", tmp_path / "o")
        assert done.returncode == 0
        assert "warning: lm_head: 1 values are not finite" in done.stderr.splitlines()[-2]
        assert json.loads((tmp_path / "o" / "dbrx_jax.json").read_text())["not_finite"] == {"lm_head": 1}

    def test_to_orbax_warns_of_conflicting_rope_theta(self, tmp_path):
        source = tmp_path / "s"
        shutil.copytree(GOLDEN / "dense", source)
        data = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(data | {"rope_parameters": {"rope_theta": 10000.0}}))
        done = command("dbrx-convert", "to-orbax", source, tmp_path / "o")
        assert done.returncode == 0
        lines = [line for line in done.stderr.splitlines() if "warning" in line]
        assert len(lines) == 1
        assert lines[0].startswith("dbrx-convert: warning: config.json gives rope_theta 500000.0 in attn_config")


class TestConversation:
    def run(self, monkeypatch, lines, answer):
        entered = iter(lines)

        def read(_):
            line = next(entered, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        conversation = Conversation("Be brief.")
        converse(conversation, answer)
        return conversation

    def test_reset_and_system_commands_change_the_messages(self, monkeypatch, capsys):
        sent = []

        def answer(messages):
            sent.append([m["content"] for m in messages])
            yield "so "
            yield "so"

        conversation = self.run(monkeypatch, ["a", "", "b", "/reset", "c", "/system Be long.", "d", "/frob"], answer)
        assert sent == [["Be brief.", "a"], ["Be brief.", "a", "so so", "b"], ["Be brief.", "c"], ["Be long.", "d"]]
        assert conversation.messages[-1] == {"role": "assistant", "content": "so so"}
        captured = capsys.readouterr()
        assert captured.out == "so so\n" * 4
        assert "/frob: unknown" in captured.err

    def test_interrupt_stops_the_answer_and_not_the_program(self, monkeypatch, capsys):
        def answer(messages):
            yield "half"
            raise KeyboardInterrupt

        conversation = self.run(monkeypatch, ["a"], answer)
        assert conversation.messages[-1] == {"role": "assistant", "content": "half"}
        assert "[stopped]" in capsys.readouterr().err

    def test_failed_answer_is_reported_and_its_question_removed(self, monkeypatch, capsys):
        from dbrx_jax.errors import GenerationError

        def answer(messages):
            raise GenerationError("too long")
            yield

        conversation = self.run(monkeypatch, ["a"], answer)
        assert conversation.turns == []
        assert capsys.readouterr().err == "dbrx-jax: too long\n"


class Terminal:
    """A process on a new pseudo-terminal."""

    def __init__(self, *arguments, term="dumb"):
        self.fd, slave = pty.openpty()
        env = {**os.environ, "TERM": term, "COLUMNS": "80", "NO_COLOR": ""}
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(list(map(str, arguments)), env=env, start_new_session=True, **streams)
        os.close(slave)
        self.text = ""

    def read_until(self, marker, interrupt=False, seconds=120):
        """Reads output until `marker`; with `interrupt` sends Ctrl-C now and every 2 s until then.

        Between readline's prompt and its wait for keys Python sees a signal with the next key only.
        """
        deadline, next_interrupt = time.monotonic() + seconds, time.monotonic()
        while marker not in self.text:
            assert time.monotonic() < deadline, f"no {marker!r} in {self.text!r}"
            if interrupt and time.monotonic() >= next_interrupt:
                next_interrupt += 2
                self.process.send_signal(signal.SIGINT)
            self.read()
        before, _, self.text = self.text.partition(marker)
        return before

    def read(self):
        if select.select([self.fd], [], [], 0.2)[0]:
            self.text += os.read(self.fd, 4096).decode(errors="replace")

    def type(self, text):
        os.write(self.fd, text.encode())

    def exit_status(self):
        status = self.process.wait(60)
        os.close(self.fd)
        return status


def test_prompt_is_shown_dimly_on_a_terminal(checkpoint):
    arguments = ("--prompt", "ab\x1b[2Jc", "--max-new-tokens", "3")
    generate = Terminal(BIN / "dbrx-jax", "generate", checkpoint, *arguments, term="xterm")
    generate.read_until("\x1b[2mab\ufffd[2Jc\x1b[0m")
    generate.read_until("prefill 7 tokens")
    assert generate.exit_status() == 0


def test_chat_answers_on_a_terminal(checkpoint):
    """A conversation; Ctrl-C at the prompt does not exit."""
    chat = Terminal(BIN / "dbrx-jax", "chat", checkpoint, "--temperature", "0", "--max-new-tokens", "100000")
    chat.read_until("Type a message")
    chat.read_until("> ")
    chat.type("/system Be.\n")
    chat.read_until("System message set.")
    chat.read_until("> ")
    chat.type("hello\n")
    chat.read_until("[prefill")
    chat.read_until("> ")
    chat.read_until("/exit leaves.", interrupt=True)
    chat.type("/exit\n")
    assert chat.exit_status() == 0


def test_chat_interrupt_stops_an_answer_midway(tmp_path):
    """The program continues: the next message gets an answer."""
    # At this temperature a stop token is unlikely among the first tokens.
    chat = Terminal(BIN / "dbrx-jax", "chat", "--temperature", "5", "--seed", "1", "--max-new-tokens", "900")
    chat.read_until("> ")
    chat.type("What is a word?\n")
    chat.read_until("What is a word?")
    while len(chat.text) < 40:  # part of the answer has arrived
        chat.read()
    assert "[prefill" not in chat.read_until("[stopped]", interrupt=True)
    chat.read_until("> ")
    chat.type("Hello!\n")
    chat.read_until("[prefill")
    chat.type("/exit\n")
    assert chat.exit_status() == 0
