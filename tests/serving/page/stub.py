"""A small server with the chat page, which streams what a test tells it to."""

import asyncio
import json
import threading
from importlib import resources

from dbrx_jax.serving.page import content_security_policy

HTML = resources.files("dbrx_jax.serving").joinpath("page/index.html").read_text(encoding="utf-8")
WAIT = object()  # in a reply: until the test releases it, or the client goes away
CUT = object()  # in a reply: the connection breaks
END = object()  # in a reply: it ends without a reason


class Stub:
    """An ASGI application with the page and the two routes that it uses.

    Attributes:
      replies: one for each request of an answer, in order: (status, error, headers) or a list of pieces of text, WAIT,
        CUT, END, and events as dictionaries or bytes. "ok" is the answer when there are none left.
      bodies: of the requests for answers.
      keys: the header Authorization of every request to the API.
      key: the API key that requests need.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.replies, self.bodies, self.keys, self.key = [], [], [], None
        self.released, self.gone = threading.Event(), threading.Event()

    async def __call__(self, scope, receive, send):
        path = scope["path"]
        if path == "/":
            headers = [
                (b"content-type", b"text/html; charset=utf-8"),
                (b"content-security-policy", content_security_policy(HTML).encode()),
            ]
            return await _respond(send, 200, HTML.encode(), headers)
        key = dict(scope["headers"]).get(b"authorization", b"").decode()
        self.keys.append(key)
        if self.key and key != f"Bearer {self.key}":
            return await _error(send, 401, "give an API key")
        if path == "/v1/models":
            return await _respond(send, 200, json.dumps({"object": "list", "data": [{"id": "dbrx-test"}]}).encode())
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(json.loads(body))
        reply = self.replies.pop(0) if self.replies else ["ok"]
        if isinstance(reply, tuple):
            return await _error(send, *reply)
        await self._stream(reply, receive, send)

    async def _stream(self, pieces, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await _event(send, _choice({"role": "assistant", "content": ""}))
        for piece in pieces:
            if piece is CUT:
                raise ConnectionAbortedError
            if piece is END:
                return await send({"type": "http.response.body"})
            if piece is WAIT:
                if await self._wait(receive):
                    return
            else:
                await _event(send, _choice({"content": piece}) if isinstance(piece, str) else piece)
                await asyncio.sleep(0.002)
        await _event(send, _choice({}, "stop"))
        await _event(send, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 42}})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _wait(self, receive):
        """Returns once the test goes on; True if the client has gone."""
        while not self.released.is_set():
            try:
                message = await asyncio.wait_for(receive(), 0.02)
            except TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                self.gone.set()
                return True
        return False


def _choice(delta, finish=None):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None}


async def _event(send, value):
    body = value if isinstance(value, bytes) else f"data: {json.dumps(value)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _error(send, status, message, headers=()):
    await _respond(
        send, status, json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode(), headers
    )


async def _respond(send, status, body, headers=()):
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
