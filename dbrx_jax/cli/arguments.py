"""Arguments of the programs: parsing, help with examples, and mistakes told in one line."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import tyro

from dbrx_jax.console import print_status

T = TypeVar("T")
# An option that need not be given. The help shows no default: None would be no help.
Given = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
_positional: Any = tyro.conf.Positional[str]
POSITIONAL = _positional.__metadata__[0]
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


@dataclasses.dataclass(frozen=True)
class Program:
    """A program with commands, each a dataclass of its arguments with a method run.

    Attributes:
      name: of the program.
      description: a sentence.
      commands: by name.
      examples: arguments of each command, in lines; "" has none.
    """

    name: str
    description: str
    commands: Mapping[str, Any]
    examples: Mapping[str, Sequence[str]]

    def parse(self, arguments: Sequence[str]) -> Any:
        """Returns the command of these arguments.

        Exits with 0 after help, or with 2 and one line if the arguments are wrong.
        """
        if not arguments:
            self._fail(f"give a command: {', '.join(self.commands)}; {self.name} --help describes them")
        name, *rest = arguments
        if name in ("-h", "--help"):
            self._print_help(name)
        if name not in self.commands:
            is_option = name.startswith("-")
            kind, names = ("option", ["--help", "--version"]) if is_option else ("command", list(self.commands))
            self._fail(f"{name}: there is no such {kind}{_nearest(name, names)}; {self.name} --help lists them")
        command = self.commands[name]
        rest = _join_values(command, rest)
        self._check_names(name, rest)
        description = f"{inspect.cleandoc(command.__doc__)}\n\n{self._examples({name: self.examples[name]})}"
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                return tyro.cli(command, prog=f"{self.name} {name}", description=description, args=rest, config=CONFIG)
        except SystemExit as end:
            if end.code in (0, None):
                sys.stdout.flush()  # an error of writing shows here, not when Python exits
                raise
        self._fail(f"{name}: {one_line(printed.getvalue())}; {self.name} {name} --help lists the options")

    def _print_help(self, option: str) -> None:
        """Prints the help of the program and exits."""
        examples = self._examples({name: lines[:1] for name, lines in self.examples.items()})
        description = f"{self.description} --version prints the version.\n\n{examples}"
        commands = dict(self.commands)
        try:
            tyro.extras.subcommand_cli_from_dict(commands, prog=self.name, description=description, args=[option])
        finally:
            sys.stdout.flush()

    def _examples(self, lines: Mapping[str, Sequence[str]]) -> str:
        commands = [f"  {self.name} {name} {line}".rstrip() for name in lines for line in lines[name]]
        return "\n".join(["For example:", *commands])

    def _check_names(self, name: str, arguments: Sequence[str]) -> None:
        """Exits if an option is unknown."""
        options = _options(self.commands[name])
        for argument in arguments:
            option = argument.partition("=")[0].replace("_", "-")
            if option.startswith("--") and option not in (*options, "--help", "--"):
                self._fail(
                    f"{name}: {option}: there is no such option{_nearest(option, list(options))}; "
                    f"{self.name} {name} --help lists them"
                )

    def _fail(self, message: str) -> NoReturn:
        print_status(f"{self.name}: {message}")
        sys.exit(2)


def _options(command: Any) -> dict[str, dataclasses.Field]:
    """Returns the fields of a command that are options, not positional arguments, by their names with dashes."""
    fields = dataclasses.fields(command)
    named = [field for field in fields if POSITIONAL not in get_args(field.type)]
    return {"--" + field.name.replace("_", "-"): field for field in named}


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
    if parts and parts[0].startswith("Missing from "):
        return f"give {' and '.join(line for line in parts if line.isupper())}"
    text = " ".join(" ".join(parts).split()).replace(", 'None'", "").replace("'None', ", "").rstrip(".")
    for pattern, ours in MESSAGES:
        if (match := re.fullmatch(pattern, text)) is not None:
            return match.expand(ours)
    return text or "these arguments cannot be read"
