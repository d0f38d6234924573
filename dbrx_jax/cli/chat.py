"""The command dbrx-jax chat: a conversation with a model in a terminal."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator

from dbrx_jax.cli.arguments import Given
from dbrx_jax.cli.generate import stream_completion
from dbrx_jax.cli.generation_options import merge
from dbrx_jax.cli.load import load_weights, open_checkpoint
from dbrx_jax.cli.options import Options
from dbrx_jax.cli.rates import Rates
from dbrx_jax.console import print_status
from dbrx_jax.errors import DbrxError, GenerationError

# Positions of a conversation's cache, at most the model's. One length for all turns shares the compiled programs.
CACHE_LENGTH = 4096
TEMPERATURE = 0.6  # where neither the user nor the checkpoint samples

HELP = """/system TEXT  set the system message and begin anew (no TEXT removes it)
/reset        begin anew
/help         show this
/exit         leave (so does Ctrl-D)
Ctrl-C        stop the answer"""


@dataclasses.dataclass(frozen=True)
class Chat(Options):
    """Chat with a model.

    Without CHECKPOINT the included demo is used.
    """

    system: Given[str] = None
    """System message of the conversation."""
    temperature: Given[float] = None
    """0 is greedy; above 0 samples, more at random the higher. The checkpoint's if it samples by default, else 0.6."""

    def run(self) -> None:
        given = self.given_options()
        checkpoint = open_checkpoint(self)
        if "do_sample" not in given and not checkpoint.generation.do_sample:
            given |= {"do_sample": True, "temperature": TEMPERATURE}
        options = merge(checkpoint.generation, given).replace({"num_return_sequences": None})
        conversation = Conversation(self.system)
        # A template that fails does so with the first message too.
        checkpoint.tokenizer.apply_chat_template(
            [*conversation.messages, {"role": "user", "content": "Hi"}], add_generation_prompt=True
        )
        positions = min(CACHE_LENGTH, checkpoint.config.max_seq_len)
        model = load_weights(checkpoint, self, 1, positions)

        def answer(messages: list[dict[str, str]]) -> Iterator[str]:
            ids = checkpoint.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            remaining = checkpoint.config.max_seq_len - len(ids)
            if remaining < 1:
                raise GenerationError(
                    f"the conversation fills the model's {checkpoint.config.max_seq_len} tokens; /reset begins anew"
                )
            # As the conversation grows, fewer new tokens fit than the user asked for.
            config, rates = checkpoint.with_limits(options, len(ids), given={}), Rates()
            yield from stream_completion(self, model, checkpoint.tokenizer, ids, config, rates, positions)
            print_status(f"\n[{rates.summary()}]")

        converse(conversation, answer)


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
