"""Channel of an engine's processes: process 0 sends the others what to run, and each notices at once if one is lost.

It is a TCP connection from each of the others to process 0, on a free port of the host where JAX's coordinator is.
Messages are arrays and nothing else, so a message runs no code. A process proves with a random token, which the mesh
carries, that it belongs to the run.
"""

import contextlib
import hmac
import json
import math
import os
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from dbrx_jax.errors import DistributedError, LostProcessError
from dbrx_jax.sharding.distributed import check_same
from dbrx_jax.sharding.native_log import ADVICE, PROCESS_0_LOST
from dbrx_jax.sharding.partition import Partition

TOKEN_BYTES = 32
CONNECT_SECONDS = 60.0  # that process 0 waits for the others
HELLO_SECONDS = 5.0  # that a connection has to prove itself
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SIZE, NUMBER = struct.Struct("<Q"), struct.Struct("<I")
END = "end"  # name of the last message
STOP = b"s"  # what the others send: process 0 should end the run

Message = tuple[str, list[np.ndarray]]


def encode(name: str, arrays: Sequence[np.ndarray]) -> bytes:
    """Returns a message: its size, that of its header, the header, and the arrays' bytes without padding."""
    parts = [_without_padding(array) for array in arrays]
    described = [(a.dtype.str, a.shape, part.shape) for a, part in zip(arrays, parts, strict=True)]
    header = json.dumps([name, described]).encode()
    body = b"".join(part.tobytes() for part in parts)
    return b"".join((SIZE.pack(NUMBER.size + len(header) + len(body)), NUMBER.pack(len(header)), header, body))


def decode(message: bytes) -> Message:
    """Returns the name and the arrays of a message without its size."""
    (length,) = NUMBER.unpack_from(message)
    offset = NUMBER.size + length
    name, described = json.loads(message[NUMBER.size : offset])
    arrays = []
    for dtype, shape, part_shape in described:
        part = np.frombuffer(message, dtype, math.prod(part_shape), offset).reshape(part_shape)
        offset += part.nbytes
        array = part
        if part_shape != shape:
            array = np.zeros(shape, dtype)
            array[..., : part_shape[-1]] = part
        arrays.append(array)
    return name, arrays


def _without_padding(array: np.ndarray) -> np.ndarray:
    """Returns integers without the zeros at the ends of all rows: most of a table of blocks, or of a row's tokens."""
    if array.dtype.kind not in "iu" or not array.ndim:
        return array
    used = np.flatnonzero(array.any(axis=tuple(range(array.ndim - 1))))
    return array[..., : used[-1] + 1 if len(used) else 0]


class Leader:
    """Process 0's side of the channel.

    Args:
      connections: to the other processes, by their number.
    """

    def __init__(self, connections: dict[int, socket.socket]):
        self._connections = connections
        self._lock, self._is_over = threading.Lock(), False

    def watch(self, on_loss: Callable[[LostProcessError], None]) -> None:
        """Calls a function, in a thread of its own, when the first process is lost; passes on signals of the others."""
        for number in self._connections:
            threading.Thread(target=self._watch, args=(number, on_loss), daemon=True).start()

    def send(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Sends a message to all other processes.

        Raises:
          LostProcessError: one is gone.
        """
        message = encode(name, arrays)
        for number, connection in self._connections.items():
            try:
                connection.sendall(message)
            except OSError:
                raise _lost(number) from None

    def close(self, *, is_complete: bool) -> None:
        """Ends the channel; the others take it for the loss of process 0 unless all is complete."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
        if is_complete and not was_over:
            with contextlib.suppress(LostProcessError):
                self.send(END, [])
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR if is_complete else socket.SHUT_RDWR)

    def _watch(self, number: int, on_loss: Callable[[LostProcessError], None]) -> None:
        """Waits for what another process sends, or for its end."""
        with self._connections[number] as connection, contextlib.suppress(OSError):
            while connection.recv(1):
                if not self._is_over:
                    os.kill(os.getpid(), signal.SIGTERM)
        with self._lock:
            is_first, self._is_over = not self._is_over, True
        if is_first:
            on_loss(_lost(number))


def _lost(number: int) -> LostProcessError:
    return LostProcessError(f"process {number} was lost; {ADVICE}")


class Follower:
    """The side of the channel of a process other than 0."""

    def __init__(self, connection: socket.socket):
        self._connection, self._file = connection, connection.makefile("rb")

    def messages(self) -> Iterator[Message]:
        """Yields what process 0 sends, until it ends the channel.

        Raises:
          LostProcessError: process 0 is gone.
        """
        while True:
            (size,) = SIZE.unpack(self._read(SIZE.size))
            name, arrays = decode(self._read(size))
            if name == END:
                return
            yield name, arrays

    def _read(self, size: int) -> bytes:
        data = b""
        with contextlib.suppress(OSError):
            data = self._file.read(size)
        if len(data) < size:
            raise LostProcessError(PROCESS_0_LOST)
        return data

    @contextlib.contextmanager
    def passing_signals(self) -> Iterator[None]:
        """Passes the first SIGTERM or Ctrl-C of a `with` block to process 0, as SIGTERM; a second ends this process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, handler in handlers.items():
                signal.signal(number, handler)

        def send(number: int, frame: object) -> None:
            restore()
            with contextlib.suppress(OSError):
                self._connection.sendall(STOP)

        for number in handlers:
            signal.signal(number, send)
        try:
            yield
        finally:
            restore()

    def close(self) -> None:
        self._file.close()
        self._connection.close()


def connect(partition: Partition, options: str) -> Leader | Follower | None:
    """Connects the processes of a mesh, each of which must call this; returns None if there is one.

    Args:
      options: of the engine, which must be the same.

    Raises:
      DistributedError: options differ, a process did not come, or process 0 cannot be reached.
    """
    if partition.mesh is None or not partition.mesh.is_multi_process:
        return None
    from jax.experimental.multihost_utils import broadcast_one_to_all

    check_same("the engine's options", options)
    host = _coordinator_host()
    if jax.process_index() > 0:
        secret = broadcast_one_to_all(np.zeros(TOKEN_BYTES + NUMBER.size, np.uint8)).tobytes()
        return Follower(_join(host, NUMBER.unpack_from(secret, TOKEN_BYTES)[0], secret[:TOKEN_BYTES]))
    token = secrets.token_bytes(TOKEN_BYTES)
    with _listen(host) as listener:
        secret = token + NUMBER.pack(listener.getsockname()[1])
        broadcast_one_to_all(np.frombuffer(secret, np.uint8))
        return Leader(_accept_all(listener, token, jax.process_count() - 1))


def _coordinator_host() -> str:
    """Returns the host of process 0, as the others have reached it before."""
    from jax._src.distributed import global_state  # JAX has no public name for it

    return (global_state.coordinator_address or "localhost:0").rpartition(":")[0].strip("[]")


def _listen(host: str) -> socket.socket:
    """Returns a socket that listens on a free port: of this machine alone if the coordinator is there, else of all."""
    if host in LOOPBACK:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept_all(listener: socket.socket, token: bytes, count: int) -> dict[int, socket.socket]:
    """Returns the connections to processes 1 to `count`."""
    connections: dict[int, socket.socket] = {}
    end = time.monotonic() + CONNECT_SECONDS
    while len(connections) < count:
        try:
            listener.settimeout(max(0.01, end - time.monotonic()))
            connection, _ = listener.accept()
        except TimeoutError:
            missing = min(set(range(1, count + 1)) - connections.keys())
            raise DistributedError(f"process {missing} did not connect within {CONNECT_SECONDS:g} s") from None
        number = _number_of(connection, token)
        if number is None:  # a stranger
            connection.close()
        else:
            connections[number] = _prepared(connection)
    return connections


def _number_of(connection: socket.socket, token: bytes) -> int | None:
    """Returns the number of the process that connected, or None if it does not know the token."""
    hello = b""
    connection.settimeout(HELLO_SECONDS)
    try:
        while part := connection.recv(TOKEN_BYTES + NUMBER.size - len(hello)):
            hello += part
    except OSError:
        return None
    is_known = len(hello) == TOKEN_BYTES + NUMBER.size and hmac.compare_digest(hello[:TOKEN_BYTES], token)
    return NUMBER.unpack_from(hello, TOKEN_BYTES)[0] if is_known else None


def _join(host: str, port: int, token: bytes) -> socket.socket:
    """Returns a connection to process 0."""
    try:
        connection = socket.create_connection((host, port), CONNECT_SECONDS)
        connection.sendall(token + NUMBER.pack(jax.process_index()))
    except OSError as error:
        raise DistributedError(
            f"process 0 cannot be reached at {host}:{port} ({error}); let the hosts reach each other on every port"
        ) from None
    return _prepared(connection)


def _prepared(connection: socket.socket) -> socket.socket:
    """Returns a connection that waits as long as it takes, and sends at once."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection
