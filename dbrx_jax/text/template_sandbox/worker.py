"""The loop of the process that renders chat templates: requests and replies on a socket, its standard input."""

import json
import resource
import signal
import socket
import struct
from io import BufferedRWPair
from typing import Any

from jinja2 import TemplateSyntaxError

from .environment import compile_template
from .tracked_str import GENERATED, TRUSTED, runs, trusted

LENGTH = struct.Struct("!Q")  # before each message: its number of bytes


def serve(memory: int, seconds: int, max_bytes: int, max_text: int) -> None:
    """Answers requests until the other side closes the socket.

    A request is {"template", "variables", "special_tokens"}; one without variables asks for a check of the template.
    A reply has "text", and its runs of characters [[start, end], …] that are "trusted" and "generated". Or it has
    "error", and "line" if that is a syntax error, "out_of_memory" if the process should not be used again.

    Args:
      memory: address space in bytes.
      seconds: time of one rendering. The other side keeps it; if that is gone, an alarm ends the process.
      max_bytes: size of a message.
      max_text: characters of a rendered text.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with socket.socket(fileno=0) as connection, connection.makefile("rwb") as stream:
        while (request := _read(stream, max_bytes)) is not None:
            signal.alarm(seconds + 1)
            _write(stream, _reply(request, memory, max_bytes, max_text))
            signal.alarm(0)


def _reply(request: bytes, memory: int, max_bytes: int, max_text: int) -> bytes:
    try:
        reply = _encode(_render(request, max_text))
        return reply if len(reply) <= max_bytes else _encode({"error": f"its reply is over {max_bytes} bytes"})
    except TemplateSyntaxError as error:
        return _encode({"error": _one_line(error), "line": error.lineno})
    except MemoryError:
        return _encode({"error": f"it needed more than {memory >> 20} MiB", "out_of_memory": True})
    except Exception as error:  # the template may raise anything
        return _encode({"error": _one_line(error)})


def _render(request: bytes, max_text: int) -> dict[str, Any]:
    job = json.loads(request.decode("utf-8", "surrogatepass"))
    template = compile_template(job["template"])
    if "variables" not in job:
        return {}
    special = {name: _trust(value) for name, value in job["special_tokens"].items()}
    text = template.render(special | job["variables"])
    if len(text) > max_text:
        raise ValueError(f"its text is over {max_text} characters")
    return {"text": text, "trusted": runs(text, TRUSTED), "generated": runs(text, GENERATED)}


def _trust(value: str | list[str]) -> str | list[str]:
    return trusted(value) if isinstance(value, str) else [trusted(text) for text in value]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _encode(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _read(stream: BufferedRWPair, max_bytes: int) -> bytes | None:
    """Returns the next message; None at the end, or if it is longer than the other side may send."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    message = stream.read(length) if length <= max_bytes else b""
    return message if len(message) == length else None


def _write(stream: BufferedRWPair, message: bytes) -> None:
    stream.write(LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()
