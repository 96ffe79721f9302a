"""An exchange whose answer is read ahead, and one that is made a second time."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from typing import IO

import pytest

from gpumanager.clock import SystemClock
from gpumanager.config import Timeouts
from gpumanager.errors import ClientGone, ConsumerUnreachable
from gpumanager.upstream.exchange import AHEAD_BYTES, Exchange, Outbound
from gpumanager.upstream.parsing import InvalidAnswer
from gpumanager.upstream.watcher import Watcher
from gpumanager.upstream.wire import PIECE_BYTES, Wire
from tests.support.ports import free_port
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

Script = Callable[[Connection, Received], None]


def exchange(url: str, body: bytes | IO[bytes] | None = None, length: int = 0) -> Exchange:
    outbound = Outbound("POST", url, "/base/job?x=1", [], body, length)
    timeouts = Timeouts(connect=2, first_byte=2, idle=2, total=5)
    return Exchange("it", outbound, timeouts, Watcher(), SystemClock())


def drained(one: Exchange) -> bytes:
    parts = []
    while chunk := one.read():
        parts.append(chunk)
    return b"".join(parts)


@pytest.mark.parametrize("size", [0, 10, 300_000])
def test_what_was_read_ahead_comes_again(size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with (
        ScriptedConsumer(lambda peer, _: peer.send(answer(body))) as consumer,
        closing(exchange(consumer.url)) as one,
    ):
        one.send()
        assert one.read_ahead(1_000_000) == body
        assert one.ended is (size == 0)
        assert one.ready()
        assert drained(one) == body
        assert one.ended


def test_a_consumer_that_said_all_at_once_is_done_before_its_answer_is_read() -> None:
    with (
        ScriptedConsumer(lambda peer, _: peer.send(answer(b"hello"))) as consumer,
        closing(exchange(consumer.url)) as one,
    ):
        one.send()
        assert one.consumer_done
        assert not one.ended
        assert drained(one) == b"hello"
        assert one.ended


def test_a_consumer_that_has_more_to_say_is_not_done() -> None:
    go_on = threading.Event()

    def in_two_parts(peer: Connection, _: Received) -> None:
        whole = answer(b"hello")
        peer.send(whole[:-2])
        go_on.wait(5)
        peer.send(whole[-2:])

    with ScriptedConsumer(in_two_parts) as consumer, closing(exchange(consumer.url)) as one:
        one.send()
        assert not one.consumer_done
        go_on.set()
        assert drained(one) == b"hello"
        assert one.consumer_done


def test_an_answer_beyond_the_limit_is_not_read_to_its_end() -> None:
    body = b"y" * 500_000
    with (
        ScriptedConsumer(lambda peer, _: peer.send(answer(body))) as consumer,
        closing(exchange(consumer.url)) as one,
    ):
        one.send()
        assert one.read_ahead(1000) is None
        assert not one.ended
        assert drained(one) == body


def test_an_answer_that_breaks_off_while_it_is_read_ahead_is_an_error() -> None:
    half = answer(b"z" * 1000)[:-500]
    with ScriptedConsumer(lambda peer, _: peer.send(half)) as consumer:
        one = exchange(consumer.url)
        one.send()
        with pytest.raises(ConsumerUnreachable, match="broke off"):
            one.read_ahead(10_000)


@pytest.mark.parametrize("kind", ["bytes", "file", "file in its middle"])
def test_the_same_request_can_be_made_again(kind: str) -> None:
    file = io.BytesIO(b"skippedhello")
    file.seek(7)
    bodies: dict[str, tuple[bytes | IO[bytes], int]] = {
        "bytes": (b"hello", 5),
        "file": (io.BytesIO(b"hello"), 5),
        "file in its middle": (file, 5),
    }
    with ScriptedConsumer(lambda peer, _: peer.send(answer())) as consumer:
        one = exchange(consumer.url, *bodies[kind])
        one.send()
        again = one.again()
        assert again is not None
        again.send()
        assert [each.body for each in consumer.requests] == [b"hello", b"hello"]
        one.close()
        again.close()


class Piecewise(io.BytesIO):
    """A file that is not to be read as a whole."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert 0 <= size <= PIECE_BYTES
        return super().read(size)


@pytest.mark.parametrize("head", [10, PIECE_BYTES, 200_000])
@pytest.mark.parametrize("size", [0, 10, 300_000])
def test_a_file_is_sent_in_pieces_whatever_the_head(head: int, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with ScriptedConsumer(lambda peer, _: peer.send(answer())) as consumer:
        headers = [("X-Long", "y" * head)]
        outbound = Outbound("POST", consumer.url, "/", headers, Piecewise(body), size)
        timeouts = Timeouts(connect=2, first_byte=2, idle=2, total=5)
        with closing(Exchange("it", outbound, timeouts, Watcher(), SystemClock())) as one:
            one.send()
            assert one.status == 200
        assert consumer.requests[0].header("x-long") == "y" * head
        assert consumer.requests[0].body == body


def test_a_body_that_cannot_be_had_twice() -> None:
    file = io.BytesIO(b"hello")
    one = exchange("http://127.0.0.1:1", file, 5)
    file.close()
    assert one.again() is None


def test_the_request_line_behind_the_base_path() -> None:
    assert exchange("http://127.0.0.1:1").request_line("/base") == ("POST", "/job")


# -- started by somebody else ------------------------------------------------------------------


def test_a_small_request_is_sent_before_its_owner_goes_on() -> None:
    arrived = threading.Event()

    def script(peer: Connection, _: Received) -> None:
        arrived.set()
        peer.send(answer(b"hi"))

    with ScriptedConsumer(script) as consumer, closing(exchange(consumer.url, b"hello", 5)) as one:
        one.send_ahead()
        assert arrived.wait(10)
        assert one.reached
        one.send()
        assert drained(one) == b"hi"
        assert [each.body for each in consumer.requests] == [b"hello"]


@pytest.mark.parametrize(
    ("host", "body"),
    [
        ("localhost", io.BytesIO(b"hello")),
        ("localhost", b"x" * (AHEAD_BYTES + 1)),
        ("192.0.2.1", b"hello"),
        ("gpu-box.example", b"hello"),
    ],
    ids=["a file", "large", "another machine", "a name"],
)
def test_what_could_make_it_wait_is_left_to_its_owner(host: str, body: bytes | IO[bytes]) -> None:
    one = exchange(f"http://{host}:9", body, 5)
    one.send_ahead()
    assert one.begun is None
    assert not one.reached


def test_a_consumer_that_is_gone_is_told_to_the_owner() -> None:
    one = exchange(f"http://127.0.0.1:{free_port()}")
    one.send_ahead()
    with pytest.raises(ConsumerUnreachable, match="refused"):
        one.send()


def test_one_that_was_started_and_never_gone_on_with_is_closed() -> None:
    with ScriptedConsumer(lambda peer, _: peer.send(answer())) as consumer:
        one = exchange(consumer.url)
        one.send_ahead()
        one.close()
        assert one.begun is not None
        with pytest.raises(OSError, match="Bad file descriptor"):
            one.begun.await_head()


def test_one_that_was_aborted_after_its_start_says_so() -> None:
    def script(peer: Connection, _: Received) -> None:
        peer.wait_closed()

    with (
        ScriptedConsumer(script) as consumer,
        closing(exchange(consumer.url)) as one,
    ):
        one.send_ahead()
        one.abort(ClientGone("left"))
        with pytest.raises(ClientGone):
            one.send()


def test_a_reset_that_was_seen_by_a_look_is_not_the_end_of_an_answer() -> None:
    """The system says once that a connection was reset, and after that only that it has ended."""
    read = threading.Event()

    def script(peer: Connection, _: Received) -> None:
        peer.send(b"HTTP/1.1 200 OK\r\n\r\nall of it?")
        assert read.wait(PATIENCE_S)
        peer.reset()

    with ScriptedConsumer(script) as consumer, closing(exchange(consumer.url)) as one:
        one.send()
        assert one.read() == b"all of it?"
        assert not one.ready()
        read.set()
        eventually(one.ready)
        with pytest.raises(ConsumerUnreachable, match="reset"):
            one.read()


def test_what_was_wrong_with_a_head_is_said_again_to_who_waits_for_it() -> None:
    ours, theirs = socket.socketpair()
    with closing(theirs), closing(Wire(ours, 1)) as wire:
        theirs.send(b"nonsense\r\n")
        large = b"x" * PIECE_BYTES  # between two pieces what has come is looked at
        with pytest.raises(InvalidAnswer, match="status line"):
            wire.send("POST", b"", large)
        with pytest.raises(InvalidAnswer, match="status line"):
            wire.await_head()
