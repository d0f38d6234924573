"""Tests that mistakes are reported before weights are read: those of this checkpoint cannot be."""

import json
import shutil

import pytest
from upath import UPath

from tests.commands import in_process


@pytest.fixture
def damaged(source, tmp_path):
    """A checkpoint whose weights are damaged."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(source, folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_reported(done, *fragments):
    """Asserts one line on stderr with these fragments, nothing on stdout, and exit status 2."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


def test_damaged_weights_are_reported_without_another_mistake(damaged):
    done = in_process("dbrx-jax", "generate", damaged, "--prompt", "abc", "--max-new-tokens", 3)
    assert_reported(done, "model.safetensors")
    done = in_process("dbrx-jax", "chat", damaged)
    assert_reported(done, "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-p", 7), "--top-p: expected a number from 0 to 1, got 7.0"),
        (("--top-p", "0.5"), "--top-p draws at random; give --temperature above 0"),
        (("--temperature", "0", "--min-p", "0.5"), "--min-p draws at random"),
        (("--temperature", "-1"), "--temperature: expected a number above 0, got -1.0; 0 is greedy"),
        (("--temperature", "nan"), "--temperature: expected"),
        (("--temperature", "0.0001"), "--temperature: expected at least 0.001, got 0.0001; 0 is greedy"),
        (("--max-new-tokens", 0), "--max-new-tokens: expected a whole number above 0, got 0"),
        (("--max-new-tokens", 999), "--max-new-tokens: 999 with a prompt of 3 tokens is beyond the model's 128"),
        (("--seed", -1), "--seed: expected a whole number from 0 to 4294967295, got -1"),
        (("--repetition-penalty", 0), "--repetition-penalty: expected a number above 0, got 0.0"),
        (("--no-repeat-ngram-size", -1), "--no-repeat-ngram-size: expected a whole number of at least 0"),
        (("--max-time", 0), "--max-time: expected a number above 0"),
        (("--stop", ""), "--stop: expected texts that are not empty"),
        (("--quantization", "int3"), "quantization: expected"),
        (("--mesh", "nowhere"), "nowhere"),
        (("--output", "out.jsonl"), "--output goes with --file"),
        (("--logprobs",), "--logprobs goes with --file"),
        (("--file", "p.jsonl"), "give either --prompt TEXT or --file"),
    ],
)
def test_options_of_generate(damaged, options, message):
    assert_reported(in_process("dbrx-jax", "generate", damaged, "--prompt", "abc", *options), message)


def test_memory(source, monkeypatch):
    """The weights and the cache are compared with the memory that is free; no weight is read."""
    monkeypatch.setattr("dbrx_jax.planning.memory_check.available_memory", lambda: 100_000)
    monkeypatch.setattr("dbrx_jax.api.DbrxForCausalLM.from_pretrained", None)
    done = in_process("dbrx-jax", "generate", source, "--prompt", "abc")
    assert_reported(done, "memory: this process needs ", "(weights 0.5 MB, cache ", "for 1 row of 128 positions")
    done = in_process(
        "dbrx-jax", "generate", source, "--prompt", "abc", "--quantization", "int8", "--dtype", "bfloat16"
    )
    assert_reported(done, "(weights 0.1 MB, ")


def test_empty_and_long_prompts(damaged):
    assert_reported(in_process("dbrx-jax", "generate", damaged, "--prompt", ""), "the prompt is empty")
    done = in_process("dbrx-jax", "generate", damaged, "--prompt", "long" * 40, "--max-new-tokens", 2)
    assert_reported(done, "a prompt of 160 tokens fills the model's 128 positions; shorten it")


def test_checkpoint_at_a_url(damaged):
    bucket = UPath("memory://before_load")
    bucket.mkdir()
    for file in damaged.iterdir():
        (bucket / file.name).write_bytes(file.read_bytes())
    assert_reported(in_process("dbrx-jax", "generate", bucket, "--prompt", ""), "the prompt is empty")
    assert_reported(in_process("dbrx-jax", "generate", bucket, "--prompt", "abc"), "model.safetensors: not a whole")


def test_tokenizer_template_and_configuration(damaged):
    def generate(*options):
        return in_process("dbrx-jax", "generate", damaged, "--prompt", "abc", "--max-new-tokens", 3, *options)

    (damaged / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    assert_reported(generate("--chat"), "the chat template failed: no users")
    assert_reported(in_process("dbrx-jax", "chat", damaged), "the chat template failed: no users")
    (damaged / "generation_config.json").write_text("[]")
    assert_reported(generate(), "generation_config.json: expected a JSON object")
    (damaged / "generation_config.json").unlink()
    (damaged / "vocab.json").write_text("{")
    assert_reported(generate(), "vocab.json: not valid JSON")
    edit(damaged / "config.json", n_heads=3)
    assert_reported(generate(), "n_heads: expected a divisor of d_model 64")


def test_prompts_file(damaged, tmp_path):
    prompts = tmp_path / "prompts.jsonl"

    def generate():
        return in_process("dbrx-jax", "generate", damaged, "--file", prompts, "--max-new-tokens", 3)

    assert_reported(generate(), "prompts.jsonl: cannot be read (No such file or directory)")
    prompts.write_text("\n\n")
    assert_reported(generate(), "prompts.jsonl: holds no prompts")
    prompts.write_text('{"prompt": 5}\n[]\n')
    assert_reported(generate(), "prompts.jsonl, line 1: expected a text")
    prompts.write_text(json.dumps("long" * 40))
    assert_reported(generate(), "prompts.jsonl, line 1: a prompt of 160 tokens fills")
    prompts.write_text('"abc"\n[]\n')  # one row is good: only its weights are missing
    lines = generate().stderr.splitlines()
    assert "prompts.jsonl: 1 rows get an error for a completion; line 2: expected a text" in lines[0]
    assert "model.safetensors" in lines[1]


def test_output(damaged, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"abc"\n')

    def generate(output, file=prompts):
        options = ("--file", file, "--output", output, "--max-new-tokens", 3)
        return in_process("dbrx-jax", "generate", damaged, *options)

    assert_reported(generate(prompts), "would overwrite the prompts of --file")
    (tmp_path / "link").symlink_to(prompts)
    assert_reported(generate(tmp_path / "link"), "would overwrite the prompts of --file")
    (tmp_path / "x.incomplete").write_text('"abc"\n')
    assert_reported(generate(tmp_path / "x", tmp_path / "x.incomplete"), "would overwrite the prompts of --file")
    assert_reported(generate(tmp_path), "is a folder; name a file")
    assert_reported(generate(tmp_path / "none" / "out"), "there is no such folder")
    (tmp_path / "done").write_text("")
    assert_reported(generate(tmp_path / "done"), "done: exists already; remove it, or name another file")
    assert prompts.read_text() == '"abc"\n'
    assert_reported(generate(tmp_path / "out"), "model.safetensors")
    names = {"checkpoint", "prompts.jsonl", "link", "x.incomplete", "done"}
    assert {path.name for path in tmp_path.iterdir()} == names  # nothing is left of a run without rows


def test_options_of_chat(damaged):
    assert_reported(in_process("dbrx-jax", "chat", damaged, "--top-p", 7), "--top-p: expected a number from 0 to 1")
    done = in_process("dbrx-jax", "chat", damaged, "--temperature", "0", "--top-k", 5)
    assert_reported(done, "--top-k draws at random")
