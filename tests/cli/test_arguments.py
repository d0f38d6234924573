"""Tests of how command lines are read: help, version, values, and mistakes told in one line."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from dbrx_convert.cli import PROGRAM as CONVERT
from dbrx_jax.cli.arguments import one_line
from dbrx_jax.cli.commands import PROGRAM
from tests.cli.test_before_load import assert_reported
from tests.cli.test_cli import BIN, command
from tests.commands import in_process

ROOT = Path(__file__).parents[2]


def run(arguments):
    """Runs dbrx-jax, or dbrx-convert if the first argument is "convert"."""
    if arguments[:1] == ("convert",):
        return in_process("dbrx-convert", *arguments[1:])
    return in_process("dbrx-jax", *arguments)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((), ("give a command: generate, chat, serve, plan, info",)),
        (("genrate",), ("genrate: there is no such command, did you mean generate?",)),
        (("--versoin",), ("--versoin: there is no such option, did you mean --version?",)),
        (("generate", "--max-token", "3"), ("--max-token: there is no such option, did you mean --max-new-tokens?",)),
        (("generate", "--quantize", "int8"), ("did you mean --quantization?",)),
        (("plan", "--btach=3"), ("--btach: there is no such option, did you mean --batch?",)),
        (("generate", "--top-k", "x"), ("--top-k: expected a whole number, got 'x'",)),
        (("generate", "--top-p", "x"), ("--top-p: expected a number, got 'x'",)),
        (("generate", "--batch-size", "1.5"), ("--batch-size: expected a whole number, got '1.5'",)),
        (("generate", "--prompt"), ("--prompt: needs a value",)),
        (("generate", "--prompt", "--chat"), ("--prompt: needs a value",)),
        (("generate", "--dtype", "int7"), ("--dtype: expected one of ", "'bfloat16'", "got 'int7'")),
        (("generate", "a", "b", "c"), ("generate: b, c: not expected; put a text of several words in quotes",)),
        (("generate", "--checkpoint", "a"), ("--checkpoint: there is no such option",)),
        (("convert",), ("give a command: to-orbax, to-hf, verify, inspect, seal; dbrx-convert --help",)),
        (("convert", "to-orbx", "a"), ("to-orbx: there is no such command, did you mean to-orbax?",)),
        (("convert", "to-orbax", "a", "b", "--quantisation", "int8"), ("did you mean --quantization?",)),
        (("convert", "to-orbax", "a"), ("to-orbax: give DST; dbrx-convert to-orbax --help lists the options",)),
        (("convert", "to-orbax"), ("to-orbax: give SRC and DST; ",)),
        (("convert", "to-hf", "a", "b", "--workers", "x"), ("--workers: expected a whole number, got 'x'",)),
    ],
)
def test_mistakes_are_one_line(arguments, fragments):
    assert_reported(run(arguments), *fragments)


@pytest.mark.parametrize("program", [PROGRAM, CONVERT], ids=["dbrx-jax", "dbrx-convert"])
def test_examples_of_the_help_are_commands(program):
    for name, lines in program.examples.items():
        for line in lines:
            parsed = program.parse([name, *shlex.split(line)])
            assert isinstance(parsed, program.commands[name])


def test_unknown_message_of_the_parser_is_one_line():
    box = "╭─ Title ───╮\n│ Two words │\n│ wrapped.  │\n│ ───────── │\n│ Advice    │\n╰───────────╯\n"
    assert one_line(box) == "Two words wrapped"
    assert one_line("") == "these arguments cannot be read"


def test_values_may_begin_with_a_dash():
    assert PROGRAM.parse(["generate", "--prompt", "-x"]).prompt == "-x"
    assert PROGRAM.parse(["generate", "--prompt", "--- a", "--chat"]).prompt == "--- a"
    assert PROGRAM.parse(["generate", "--prompt=--file"]).prompt == "--file"
    assert PROGRAM.parse(["chat", "--system", "- be brief"]).system == "- be brief"
    assert PROGRAM.parse(["generate", "--frequency-penalty", "-1.5", "--max_new_tokens", "7"]).given_options() == {
        "frequency_penalty": -1.5,
        "max_new_tokens": 7,
    }


def test_text_in_place_of_a_checkpoint_is_explained():
    done = in_process("dbrx-jax", "generate", 'The "list" is')
    assert_reported(done, 'The "list" is: there is no such folder', r'did you mean --prompt "The \"list\" is"?')
    assert_reported(in_process("dbrx-jax", "generate", ROOT), "give either --prompt TEXT or --file")
    done = in_process("dbrx-jax", "generate", "/nowhere", "--prompt", "x")
    assert_reported(done, "/nowhere: there is no such folder")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--help",), ("generate", "chat", "info", "--version", 'dbrx-jax generate --prompt "A list is"')),
        (("generate", "--help"), ("CHECKPOINT", "--prompt", "--temperature", "OUTPUT.incomplete", "For example")),
        (("chat", "--help"), ("--system", "For example")),
        (("plan", "-h"), ("MODEL", "--on", "For example")),
        (("convert", "--help"), ("to-orbax", "to-hf", "verify", "inspect", "seal", "--version", "For example")),
        (("convert", "to-orbax", "--help"), ("SRC", "DST", "--dtype", "--quantization int4")),
        (("convert", "to-hf", "--help"), ("--max-shard-size 2GB",)),
        (("convert", "verify", "--help"), ("For example",)),
    ],
)
def test_help_has_options_and_examples(arguments, fragments, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = run(arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(fragment in done.stdout for fragment in fragments)
    assert "\x1b" not in done.stdout
    assert "None" not in done.stdout or arguments[0] == "plan"
    assert max(map(len, done.stdout.splitlines())) <= 82  # a line of usage


@pytest.mark.parametrize("module", ["dbrx_jax.cli.main", "dbrx_convert.main"])
def test_help_and_version_import_no_jax(module):
    code = (
        "import sys\n"
        f"from {module} import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        "heavy = {'jax', 'flax', 'numpy', 'orbax', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    commands = {"dbrx_jax.cli.main": ("generate", "chat"), "dbrx_convert.main": ("to-orbax", "verify")}[module]
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in commands)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


PROGRAMS = pytest.mark.parametrize("program", ["dbrx-jax", "dbrx-convert"])


@PROGRAMS
def test_version_is_that_of_the_package(program):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert command(program, "--version").stdout == f"{program} {version}\n"


@PROGRAMS
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_to_a_closed_pipe_is_quiet(program, option):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([BIN / program, option], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@PROGRAMS
def test_help_to_a_full_disk_is_one_line(program):
    with open("/dev/full", "w") as full:
        done = subprocess.run([BIN / program, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, f"{program}: the output cannot be written: No space left on device\n")


@PROGRAMS
def test_interrupt_while_modules_are_imported_is_quiet(program, tmp_path):
    """A module that the program imports is replaced by one that waits."""
    (tmp_path / "tyro.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][program]
    module, _, function = target.partition(":")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[0] = {program!r}\n"
        f"from {module} import {function}\n{function}()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, f"{program}: interrupted\n")


def test_info_prints_versions_and_devices():
    facts = json.loads(in_process("dbrx-jax", "info", "--json").stdout)
    assert any(v.startswith("jax ") for v in facts["versions"])
    assert facts["devices"] == [f"{i}: cpu" for i in range(8)]  # conftest.py asks for them
    assert "CPUs" in in_process("dbrx-jax", "info").stdout
