"""Runs the application on a socket until a signal, or the engine's end."""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dbrx_jax.console import one_line, print_status
from dbrx_jax.errors import ConfigError
from dbrx_jax.serving.head_limit import HeadLimit
from dbrx_jax.serving.state import State
from dbrx_jax.sharding.distributed import explain_loss

TICK = 0.1  # seconds between looks at the engine and the requests
CLOSE_SECONDS = 5  # for answers that are complete but not yet sent
KEEP_ALIVE_SECONDS = 75  # longer than most proxies keep an unused connection
INTERRUPTED = 130
OPEN_FILES = 65_536  # each connection is one


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket with this address, which does not listen yet.

    Raises:
      ConfigError: the address is not this machine's, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError):
        raise ConfigError(f"--host {host}: is no address of this machine") from None
    # With the protocol: asyncio turns Nagle's algorithm off only on sockets that have it, and with it every small part
    # of an answer waits 40 ms for the one before.
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _not_usable(host, port, error) from None
    return bound


def _not_usable(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"--port {port}: cannot be used on {host} ({error.strerror}); give another")


def url_of(bound: socket.socket) -> str:
    """Returns the URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: FastAPI, bound: socket.socket, drain_seconds: float) -> int:
    """Serves the application until SIGTERM or Ctrl-C; returns the exit status.

    After a signal, new requests are refused and those that run have `drain_seconds` to end. A second Ctrl-C ends the
    process at once. The status is 0, or 1 if the engine failed.

    Raises:
      ConfigError: another process listens on the socket's port, since the socket was bound.
    """
    try:
        bound.listen()
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _not_usable(host, port, error) from None
    _allow_more_files()
    # The model and the modules stay. A full collection that looked at them held all requests up for half a second.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        app,
        http=HeadLimit,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    server = _Server(config, app.state.server, drain_seconds)
    asyncio.run(server.serve_until_drained(bound))
    return server.status


def _allow_more_files() -> None:
    """Raises the process's limit of open files, which is often below the requests that may wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Server(uvicorn.Server):
    """uvicorn's server, which goes on after a signal until its requests have ended.

    Attributes:
      status: of the process.
    """

    def __init__(self, config: uvicorn.Config, state: State, drain_seconds: float):
        super().__init__(config)
        self._state, self._drain_seconds, self.status = state, drain_seconds, 0

    async def serve_until_drained(self, bound: socket.socket) -> None:
        watch = asyncio.create_task(self._watch())
        try:
            await self.serve([bound])
        finally:
            watch.cancel()
            self._state.workers.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; called by a signal."""
        if self._state.draining and sig == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, b"dbrx-jax: interrupted\n")  # print would fail if it was interrupted itself
            os._exit(INTERRUPTED)  # the engine's thread may be in the middle of a step
        self._state.draining = True

    async def _watch(self) -> None:
        """Ends the server when it has drained, or when the engine has failed."""
        state = self._state
        while not state.draining and state.engine.error is None:
            await asyncio.sleep(TICK)
        if state.engine.error is not None:
            self._fail()
            return
        if state.in_flight:
            seconds = f"{self._drain_seconds:g} seconds"
            print_status(f"Requests have {seconds} to end; running: {state.in_flight}; Ctrl-C ends them now")
        deadline = time.monotonic() + self._drain_seconds
        while state.in_flight and time.monotonic() < deadline and state.engine.error is None:
            await asyncio.sleep(TICK)
        if state.engine.error is not None:
            self._fail()
            return
        # What still runs ends with an error that its client sees.
        await asyncio.to_thread(state.engine.close)
        self.should_exit = True

    def _fail(self) -> None:
        error = self._state.engine.error
        if error is not None and explain_loss(error) is None:  # the loss of a process has a line of its own
            print_status(f"The engine failed: {one_line(repr(error))}")
        self.status = 1
        self.should_exit = True
