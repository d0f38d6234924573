"""Renders a checkpoint's chat template, an untrusted program, in a process of its own.

The process runs Jinja's sandbox with limited memory and time, because a sandboxed template can still repeat a string
until memory is full. It is started by the first rendering, and serves until this process ends.
"""

import atexit
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dbrx_jax.errors import TokenizerError
from dbrx_jax.text.template_sandbox.tracked_str import TRUSTED, TrackedStr

MAX_TEMPLATE = 1 << 18  # characters
MAX_TEXT = 16 << 20  # characters; a million tokens are some four million
MAX_BYTES = 128 << 20  # of a request or a reply
MEMORY = 1 << 30  # bytes
SECONDS = 10  # for one rendering
START_SECONDS = 60

# ChatML, for checkpoints that bring no template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
# The process finds template_sandbox by its folder: importing this package would bring JAX.
_PROGRAM = (
    "import json, sys; path, limits = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from template_sandbox.worker import serve; serve(*limits)"
)
_LENGTH = struct.Struct("!Q")  # before each message: its number of bytes


class RenderedText(NamedTuple):
    """A template's text, and runs [start, end) of its characters.

    Attributes:
      trusted: runs that come from the template and not from variables.
      generated: runs inside `{% generation %}`, the assistant's.
    """

    text: str
    trusted: list[tuple[int, int]]
    generated: list[tuple[int, int]]

    def tracked(self) -> TrackedStr:
        """Returns the text as a str that knows its trusted runs."""
        flags = bytearray(len(self.text))
        for start, end in self.trusted:
            flags[start:end] = bytes([TRUSTED]) * (end - start)
        return TrackedStr(self.text, bytes(flags))


def render(template: str, variables: Mapping[str, Any], special_tokens: Mapping[str, str | list[str]]) -> RenderedText:
    """Renders a template.

    Args:
      template: Jinja source.
      variables: JSON values; their text is not trusted.
      special_tokens: variables such as eos_token, whose text is trusted. Others of the same name replace them.

    Raises:
      TokenizerError: a variable is not JSON, or the template is invalid, refuses its input, or exceeds a limit.
    """
    reply = _ask({"template": template, "variables": variables, "special_tokens": special_tokens})
    trusted, generated = ([(start, end) for start, end in reply[name]] for name in ("trusted", "generated"))
    return RenderedText(reply["text"], trusted, generated)


def check_template(template: str) -> None:
    """Compiles a template; raises TokenizerError with the line of a syntax error."""
    _ask({"template": template})


class _WorkerError(TokenizerError):
    """The process ended, or ran out of memory."""


class _Worker:
    """The process that renders templates: one request at a time, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        """Returns the reply to a request; raises TokenizerError if it takes too much time or memory."""
        with self._lock:
            if self._running is not None:
                with suppress(_WorkerError):  # perhaps for what came before, so a new process tries again
                    return self._exchange(request, SECONDS)
            self._start()
            return self._exchange(request, SECONDS)

    def stop(self) -> str:
        """Ends the process, if it runs; returns how it ended, if it had before."""
        if self._running is None:
            return ""
        (process, connection), self._running = self._running, None
        connection.close()
        process.kill()
        _, errors = process.communicate()
        return (errors.decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"])[-1]

    def forget(self) -> None:
        """Leaves the process to the parent; called in a child that was forked, by the only thread there."""
        self._lock = threading.Lock()
        if self._running is not None:
            (process, connection), self._running = self._running, None
            connection.close()
            assert process.stderr is not None
            process.stderr.close()
            process.returncode = 0  # it is not a child of this process, which could not wait for it

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = [*sys.path, str(Path(__file__).parent)]
        arguments = json.dumps([path, [MEMORY, SECONDS, MAX_BYTES, MAX_TEXT]])
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, arguments],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is not for it
            )
        except OSError as error:
            ours.close()
            raise TokenizerError(f"the process that renders chat templates cannot start ({error.strerror})") from None
        finally:
            theirs.close()
        self._running = process, ours
        self._exchange(b'{"template": ""}', START_SECONDS)

    def _exchange(self, request: bytes, seconds: float) -> dict[str, Any]:
        assert self._running is not None
        process, connection = self._running
        deadline = time.monotonic() + seconds
        try:
            connection.settimeout(seconds)
            connection.sendall(_LENGTH.pack(len(request)) + request)
            (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))
            if length > MAX_BYTES:
                raise EOFError
            reply = json.loads(_receive(connection, length, deadline).decode("utf-8", "surrogatepass"))
        except TimeoutError:
            self.stop()
            raise TokenizerError(f"the chat template failed: it ran for more than {seconds} seconds") from None
        except (OSError, EOFError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)  # it may still be saying why
            limits = f"held to {MEMORY >> 20} MiB and {SECONDS} seconds"
            raise _WorkerError(f"the chat template failed: its process, {limits}, ended ({self.stop()})") from None
        except BaseException:  # Ctrl-C: the reply to this request must not be taken for the next one's
            self.stop()
            raise
        if reply.get("out_of_memory"):
            self.stop()
            raise _WorkerError(f"the chat template failed: {reply['error']}")
        return reply


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    if len(request["template"]) > MAX_TEMPLATE:
        raise TokenizerError(f"the chat template failed: it is longer than {MAX_TEMPLATE} characters")
    try:
        message = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizerError(f"the conversation holds what is not JSON ({error})") from None
    if len(message) > MAX_BYTES:
        raise TokenizerError(f"the conversation is over {MAX_BYTES >> 20} MiB; shorten it")
    reply = _worker.ask(message)
    if "line" in reply:
        raise TokenizerError(f"the chat template is not valid Jinja: line {reply['line']}: {reply['error']}")
    if "error" in reply:
        raise TokenizerError(f"the chat template failed: {reply['error']}")
    return reply


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    """Returns the next bytes of a connection; raises TimeoutError or EOFError."""
    received = bytearray()
    while len(received) < length:
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        part = connection.recv(min(length - len(received), 1 << 20))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=_worker.forget)
