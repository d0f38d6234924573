"""Arguments of the command dbrx-jax: parsing, and mistakes told in one line."""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import tyro

from dbrx_jax.cli.chat import Chat
from dbrx_jax.cli.generate import Generate
from dbrx_jax.cli.plan import Plan
from dbrx_jax.console import print_status

PROGRAM = "dbrx-jax"
DESCRIPTION = "DBRX in JAX. --version prints the version."
EXAMPLES = {
    "generate": (
        '--prompt "A list is"',
        '/path/to/dbrx --prompt "What is a list?" --chat --temperature 0.7',
        "/path/to/dbrx --file prompts.jsonl --output results.jsonl",
    ),
    "chat": ("", '/path/to/dbrx --system "Answer in one sentence."'),
    "plan": ("132b-instruct --on h100-1 --dtype int4", "/path/to/dbrx --on v5e-64 --batch 64"),
    "info": ("",),
}


@dataclasses.dataclass(frozen=True)
class Info:
    """Show versions, devices and memory."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from dbrx_jax.cli.info import collect

        facts = collect()
        if self.json:
            print(json.dumps(facts, indent=2))
            return
        for key, value in facts.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"{key:<10}{line}")


COMMANDS: dict[str, Any] = {"generate": Generate, "chat": Chat, "plan": Plan, "info": Info}
CONFIG = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
BOX = "─-+╭╮╰╯├┤"  # of which tyro draws lines
# tyro's words for frequent mistakes, and ours.
MESSAGES = (
    (
        r"Error parsing (\S+): no type matching INT could be .* from \['(.*?)'\].*",
        r"\1: expected a whole number, got '\2'",
    ),
    (r"Error parsing (\S+): invalid literal for int\(\).*: '(.*?)'", r"\1: expected a whole number, got '\2'"),
    (r"Error parsing (\S+): no type matching FLOAT could be .* from \['(.*?)'\].*", r"\1: expected a number, got '\2'"),
    (r"Error parsing (\S+): could not convert string to float: '(.*?)'", r"\1: expected a number, got '\2'"),
    (r"Missing value for argument '(\S+)'.*", r"\1: needs a value"),
    (r"invalid choice (.*) for argument '(\S+)'. Expected one of \((.*)\)", r"\2: expected one of \3, got \1"),
    (r"Unrecognized options: (.*)", r"\1: not expected; put a text of several words in quotes"),
)


def parse(arguments: Sequence[str]) -> Any:
    """Returns the command of these arguments, an object with the method run.

    Exits with 0 after help, or with 2 and one line if the arguments are wrong.
    """
    if not arguments:
        _fail(f"give a command: {', '.join(COMMANDS)}; {PROGRAM} --help describes them")
    name, *rest = arguments
    if name in ("-h", "--help"):
        description = f"{DESCRIPTION}\n\n{_examples({name: lines[:1] for name, lines in EXAMPLES.items()})}"
        try:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=PROGRAM, description=description, args=[name])
        finally:
            sys.stdout.flush()
    if name not in COMMANDS:
        kind, names = ("option", ["--help", "--version"]) if name.startswith("-") else ("command", list(COMMANDS))
        _fail(f"{name}: there is no such {kind}{_nearest(name, names)}; {PROGRAM} --help lists them")
    command = COMMANDS[name]
    rest = _join_values(command, rest)
    _check_names(name, rest)
    description = f"{command.__doc__}\n\n{_examples({name: EXAMPLES[name]})}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(command, prog=f"{PROGRAM} {name}", description=description, args=rest, config=CONFIG)
    except SystemExit as end:
        if end.code in (0, None):
            sys.stdout.flush()  # an error of writing shows here, not when Python exits
            raise
    _fail(f"{name}: {one_line(printed.getvalue())}; {PROGRAM} {name} --help lists the options")


def _examples(lines: Mapping[str, Sequence[str]]) -> str:
    commands = [f"  {PROGRAM} {name} {line}".rstrip() for name in lines for line in lines[name]]
    return "\n".join(["For example:", *commands])


def _options(command: Any) -> dict[str, dataclasses.Field]:
    return {"--" + field.name.replace("_", "-"): field for field in dataclasses.fields(command)}


def _join_values(command: Any, arguments: Sequence[str]) -> list[str]:
    """Joins an option and a value that begins with a dash, as in --prompt "-x", to --prompt=-x."""
    options, joined, rest = _options(command), [], list(arguments)
    while rest:
        argument = rest.pop(0)
        takes_value = argument in options and options[argument].default is None
        if takes_value and rest and rest[0].startswith("-") and rest[0] not in options:
            argument = f"{argument}={rest.pop(0)}"
        joined.append(argument)
    return joined


def _check_names(name: str, arguments: Sequence[str]) -> None:
    """Exits if an option is unknown."""
    options = _options(COMMANDS[name])
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in (*options, "--help", "--"):
            _fail(
                f"{name}: {option}: there is no such option{_nearest(option, list(options))}; "
                f"{PROGRAM} {name} --help lists them"
            )


def _nearest(word: str, words: list[str]) -> str:
    nearest = difflib.get_close_matches(word, words, 1, 0.7)
    return f", did you mean {nearest[0]}?" if nearest else ""


def one_line(message: str) -> str:
    """Returns the first part of tyro's message in a box, in one line."""
    lines = [line.strip(" │|") for line in message.splitlines()[1:]]
    parts = []
    for line in lines:
        if line and not line.strip(BOX):  # the line before its advice
            break
        parts.append(line)
    text = " ".join(" ".join(parts).split()).replace(", 'None'", "").replace("'None', ", "").rstrip(".")
    for pattern, ours in MESSAGES:
        if (match := re.fullmatch(pattern, text)) is not None:
            return match.expand(ours)
    return text or "these arguments cannot be read"


def _fail(message: str) -> NoReturn:
    print_status(f"{PROGRAM}: {message}")
    sys.exit(2)
