"""The bytes of one WebSocket, with both ends and the moment in the test's hands."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gpumanager.upstream.tunnel import GOODBYE_S, LINGER_S, PIECE_BYTES, Relay
from tests.support.websockets import BINARY, CLOSE, Peer, frame

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Both:
    """A relay between two socket pairs."""

    def __init__(self, stack: ExitStack) -> None:
        near, self.client = socket.socketpair()
        far, self.consumer = socket.socketpair()
        for sock in (near, far, self.client, self.consumer):
            sock.setblocking(False)
            stack.callback(sock.close)
        self.counted = {"client": 0, "consumer": 0}
        self.relay = Relay((near, b""), (far, b""), memoryview(bytearray(PIECE_BYTES)), self.count)

    def count(self, name: str, size: int) -> None:
        self.counted[name] += size


@pytest.fixture
def both() -> Iterator[Both]:
    with ExitStack() as stack:
        yield Both(stack)


def fill(sock: socket.socket, data: bytes) -> int:
    """Send as much as it takes; how much that was."""
    sent = 0
    try:
        while sent < len(data):
            sent += sock.send(data[sent:])
    except BlockingIOError:
        pass
    return sent


def drain(sock: socket.socket) -> bytes:
    """All that there is to read now."""
    found = b""
    try:
        while data := sock.recv(1_000_000):
            found += data
    except BlockingIOError:
        pass
    return found


def test_no_more_than_a_piece_waits_for_an_end_that_takes_nothing(both: Both) -> None:
    relay, message = both.relay, frame(bytes(range(256)) * 20_000, BINARY)
    client, consumer = relay.client, relay.consumer
    sent = 0
    while taken := fill(both.consumer, message[sent:]):
        sent += taken
        relay.serve(consumer, READ, 0.0)
        assert len(client.out) <= PIECE_BYTES
    assert client.out
    assert sent < len(message)
    assert consumer.wanted(client) == 0  # nothing more is read for it
    assert client.wanted(consumer) == READ | WRITE
    got = b""
    while len(got) < len(message):
        got += drain(both.client)
        relay.serve(client, WRITE, 0.0)
        relay.serve(consumer, READ, 0.0)
        sent += fill(both.consumer, message[sent:])
    assert got == message
    assert both.counted == {"client": 0, "consumer": len(message)}
    assert not relay.over


def test_an_end_has_a_while_after_the_other_and_less_after_both_said_so(both: Both) -> None:
    relay = both.relay
    both.client.shutdown(socket.SHUT_WR)
    relay.serve(relay.client, READ, 100.0)
    assert (relay.deadline, relay.over) == (100.0 + LINGER_S, False)
    assert both.consumer.recv(1) == b""
    both.consumer.close()
    relay.serve(relay.consumer, READ, 101.0)
    assert relay.over
    assert relay.reason == "the client ended it"


def test_after_a_close_from_both_sides_it_is_over_soon(both: Both) -> None:
    relay = both.relay
    both.client.send(frame(b"", CLOSE, masked=True))
    relay.serve(relay.client, READ, 100.0)
    both.consumer.send(frame(b"", CLOSE))
    both.consumer.close()
    for _ in range(2):  # the frame, then the end
        relay.serve(relay.consumer, READ, 100.0)
    assert relay.deadline == 100.0 + GOODBYE_S
    assert drain(both.client) == frame(b"", CLOSE)


def test_nobody_is_told_of_the_end_twice(both: Both) -> None:
    """Behind a close frame of the peer's own there may be none."""
    relay = both.relay
    both.consumer.send(frame(b"\x03\xe8", CLOSE))
    relay.serve(relay.consumer, READ, 0.0)
    relay.part("for a test", 0.0)
    assert drain(both.client) == frame(b"\x03\xe8", CLOSE)
    both.consumer.setblocking(True)
    said = Peer(both.consumer, client=False).receive()
    assert said is not None
    assert said.code == 1001
    assert relay.deadline == GOODBYE_S
    relay.part("for another reason", 1.0)
    assert (relay.reason, relay.deadline) == ("for a test", GOODBYE_S)


def test_what_comes_after_the_goodbye_is_dropped(both: Both) -> None:
    relay = both.relay
    whole = frame(b"a whole message")
    both.consumer.send(whole[:5])
    relay.serve(relay.consumer, READ, 0.0)
    relay.part("for a test", 0.0)
    assert not relay.client.parted  # it is in the middle of a frame
    both.consumer.send(whole[5:] + frame(b"too late"))
    relay.serve(relay.consumer, READ, 0.0)
    assert relay.client.parted
    both.client.setblocking(True)
    peer = Peer(both.client, client=True)
    assert peer.text() == b"a whole message"
    last = peer.receive()
    assert last is not None
    assert last.code == 1001
    assert peer.receive() is None
