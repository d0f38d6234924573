"""Access to the server: API keys, and the names by which a server without keys may be called."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dbrx_jax.serving.errors import ApiError

# Without a key: probes have none, and the page asks its user for one.
OPEN_PATHS = ("/health", "/")
SALT = "dbrx_jax.salt"  # in an ASGI scope: a digest of the request's API key, which keeps keys' prefixes apart
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class ApiKeys:
    """Middleware that lets only requests with an API key pass, as `Authorization: Bearer KEY`.

    Args:
      keys: without any, all requests pass.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._digests or scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        # Every key is compared, each in constant time: the time tells nothing about them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == b"bearer" and any(matches):
            scope[SALT] = digest.hex()
            return await self._app(scope, receive, send)
        message = "this API key is not known" if given else "give an API key, as Authorization: Bearer KEY"
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)


class Hosts:
    """Middleware that lets only requests to certain host names pass.

    A web page can make its own name mean this machine (DNS rebinding), and then ask a server here as if it were its
    own. Its requests carry that name.

    Args:
      hosts: names without ports; without any, all requests pass.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._hosts or scope["type"] != "http" or _host(Headers(scope=scope)) in self._hosts:
            return await self._app(scope, receive, send)
        message = f"this server is called {', '.join(sorted(self._hosts))}; with API keys it has any name"
        await ApiError(403, message, code="unknown_host").response()(scope, receive, send)


def _host(headers: Headers) -> str:
    """Returns the name in the header Host, without its port and brackets."""
    host = headers.get("host", "").lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
