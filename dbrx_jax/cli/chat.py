"""Conversation with a model in a terminal."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

from dbrx_jax.console import print_status
from dbrx_jax.errors import DbrxError

HELP = """/system TEXT  set the system message and begin anew (no TEXT removes it)
/reset        begin anew
/help         show this
/exit         leave (so does Ctrl-D)
Ctrl-C        stop the answer"""


class Conversation:
    """Messages of a conversation, after an optional system message."""

    def __init__(self, system: str | None = None):
        self.system = system
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def add(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def reset(self) -> None:
        self.turns = []


def converse(conversation: Conversation, answer: Callable[[list[dict[str, str]]], Iterator[str]]) -> None:
    """Reads lines from the terminal and streams answers to it, until the end of the input.

    Args:
      answer: yields the pieces of the answer to these messages.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history in input()
    terminal = sys.stdin.isatty()
    if terminal:
        # A script may have started this with Ctrl-C ignored, as shells do in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print_status("Type a message, or /help.")
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            if terminal:
                print_status("")
            return
        except KeyboardInterrupt:
            print_status("\n/exit leaves.")
            continue
        line = line.strip()
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            _command(conversation, line)
        elif line:
            _turn(conversation, line, answer)


def _command(conversation: Conversation, line: str) -> None:
    """Runs a line that begins with a slash."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        print_status("The conversation begins anew.")
    elif name == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
        print_status("System message set." if conversation.system else "No system message.")
    else:
        print_status(HELP if name == "/help" else f"{name}: unknown; these are known:\n{HELP}")


def _turn(conversation: Conversation, line: str, answer: Callable[[list[dict[str, str]]], Iterator[str]]) -> None:
    """Adds a question and its answer, which the user may stop midway, to the conversation."""
    conversation.add("user", line)
    pieces: list[str] = []
    try:
        for piece in answer(conversation.messages):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print_status(" [stopped]")
    except DbrxError as error:
        print_status(f"dbrx-jax: {error}")
        conversation.turns.pop()  # the question is not part of the conversation
        return
    conversation.add("assistant", "".join(pieces))
