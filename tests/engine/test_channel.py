"""Tests of the channel between the processes of an engine, over sockets of one process."""

import os
import queue
import signal
import socket
import threading

import numpy as np
import pytest

from dbrx_jax.engine import channel
from dbrx_jax.engine.channel import Follower, Leader, decode, encode
from dbrx_jax.errors import DistributedError, LostProcessError


@pytest.fixture
def pair():
    """A leader, the followers 1 and 2, and a queue of the losses that the leader reports."""
    sockets = {number: socket.socketpair() for number in (1, 2)}
    leader, losses = Leader({number: ours for number, (ours, _) in sockets.items()}), queue.Queue()
    leader.watch(losses.put)
    followers = [Follower(theirs) for _, theirs in sockets.values()]
    yield leader, followers, losses
    leader.close(is_complete=True)
    for follower in followers:
        follower.close()


def test_message_has_the_names_dtypes_shapes_and_bits_of_its_arrays():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, (2, 3), dtype=np.uint32)
    arrays = [bits, bits.view(np.float32)[:, ::2], rng.random(5) < 0.5, np.array(-7, np.int64), np.zeros((0, 4))]
    table = np.zeros((2, 3, 500), np.int32)
    table[1, 2, 6] = 9
    arrays += [table, np.zeros(7, np.int32), np.zeros((0, 4), np.int32)]
    name, got = decode(encode("decode", arrays)[8:])
    assert name == "decode"
    assert len(got) == len(arrays)
    for a, b in zip(got, arrays, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert len(encode("decode", [table])) < 2 * 3 * 7 * 4 + 100  # without padding


def test_followers_get_all_messages_in_order_until_the_end(pair):
    leader, followers, losses = pair
    sent = [(f"call{i}", np.full((i + 1, 20_000), i)) for i in range(9)]  # more than the sockets' buffers hold
    got = [[], []]

    def read(number):
        got[number] = [(name, *arrays) for name, arrays in followers[number].messages()]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for name, array in sent:
        leader.send(name, [array])
    leader.close(is_complete=True)
    for thread in threads:
        thread.join(30)
    for messages in got:
        assert [name for name, _ in messages] == [name for name, _ in sent]
        for (_, a), (_, b) in zip(messages, sent, strict=True):
            np.testing.assert_array_equal(a, b)
    assert losses.empty()


def test_loss_of_a_follower_is_reported_at_once_and_ends_the_others(pair):
    leader, followers, losses = pair
    followers[1].close()
    assert str(losses.get(timeout=10)) == "process 2 was lost; see its errors, and start all again"
    with pytest.raises(LostProcessError, match="process 2 was lost"):
        leader.send("decode", [np.zeros(3)])
    leader.close(is_complete=True)  # which it is not
    with pytest.raises(LostProcessError, match="process 0 was lost, or ended before this one"):
        list(followers[0].messages())
    assert losses.empty()


def test_failed_leader_and_a_torn_message_are_a_loss(pair):
    leader, followers, _ = pair
    leader._connections[1].sendall(encode("decode", [np.zeros(30)])[:40])
    leader.close(is_complete=False)
    for follower in followers:
        with pytest.raises(LostProcessError):
            list(follower.messages())


def test_first_signal_of_a_follower_goes_to_process_0(pair, monkeypatch):
    _, followers, losses = pair
    passed = queue.Queue()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with followers[0].passing_signals():
        monkeypatch.setattr(channel.os, "kill", lambda *arguments: passed.put(arguments))
        signal.raise_signal(signal.SIGINT)
        assert passed.get(timeout=10) == (os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert passed.empty()
    assert losses.empty()


def test_only_processes_with_the_token_are_accepted(monkeypatch):
    monkeypatch.setattr(channel, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(channel, "HELLO_SECONDS", 0.2)
    token, strangers = bytes(range(32)), []
    with channel._listen("localhost") as listener:
        address = listener.getsockname()[:2]
        assert address[0] in ("127.0.0.1", "::1")
        for hello in (b"x" * 36, token[:-1], b""):
            strangers.append(socket.create_connection(address))
            strangers[-1].sendall(hello)
        friend = socket.create_connection(address)
        friend.sendall(token + (1).to_bytes(4, "little"))
        connections = channel._accept_all(listener, token, 1)
        assert list(connections) == [1]
        assert connections[1].getpeername() == friend.getsockname()
        with pytest.raises(DistributedError, match=r"^process 1 did not connect within 1 s$"):
            channel._accept_all(listener, token, 1)
    for connection in (*strangers, friend, *connections.values()):
        connection.close()


def test_unreachable_process_0_is_told():
    with channel._listen("localhost") as listener:
        host, port = listener.getsockname()[:2]
    with pytest.raises(DistributedError, match=rf"process 0 cannot be reached at {host}:{port} \(.*\); let the hosts"):
        channel._join(host, port, bytes(32))
