"""Clients that take, or give, their bytes slowly: they hold no thread, and not for ever."""

from __future__ import annotations

import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from gpumanager.web import connection
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, RawClient, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually

LARGE = bytes(range(256)) * 4 * 1024 * 6  # 6 MiB, more than the system's buffers hold
THREADS = 24  # of a live broker


def large_or_small(peer: Connection, received: Received) -> None:
    kind = received.header("x-answer")
    if kind == "chunked":
        peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(LARGE), 65536):
            piece = LARGE[at : at + 65536]
            peer.send(b"%X\r\n%s\r\n" % (len(piece), piece))
        peer.send(b"0\r\n\r\n")
    elif kind == "large":
        peer.send(answer(LARGE))
    elif kind == "huge, by its end":
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n" + LARGE * 4)
    elif kind == "huge":
        peer.send(answer(LARGE * 4))
    else:
        peer.send(answer(b"small"))


@pytest.fixture
def broker() -> Iterator[LiveBroker]:
    with (
        ScriptedConsumer(large_or_small) as consumer,
        live_broker(config_for(consumer.url)) as running,
    ):
        yield running


def slow_reader(port: int) -> RawClient:
    """A client with a small receive buffer, which was connected with it."""
    client = RawClient.__new__(RawClient)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    sock.settimeout(PATIENCE_S)
    sock.connect(("127.0.0.1", port))
    client.sock, client.buffer = sock, b""
    return client


def ask(client: RawClient, kind: str, path: str = "/v1/tts", version: str = "1.1") -> None:
    method = "GET" if path.startswith("/audio/") else "POST"
    body = None if method == "GET" else b"{}"
    client.request(method, path, body, (f"X-Answer: {kind}",), version)


def _read_to_the_end(client: RawClient) -> None:
    while client.sock.recv(65536):
        pass


@pytest.mark.parametrize("path", ["/v1/tts", "/audio/a.wav"])
def test_slow_readers_take_no_threads_and_lose_nothing(broker: LiveBroker, path: str) -> None:
    with ExitStack() as stack:
        readers = []
        for number in range(THREADS + 12):
            reader = stack.enter_context(slow_reader(broker.port))
            ask(reader, "chunked" if number % 2 else "large", path)
            reader.until(b"\r\n\r\n")
            readers.append(reader)
        broker.await_idle()
        assert broker.get("/healthz").status_code == 200
        assert broker.post("/v1/tts").content == b"small"
        eventually(lambda: broker.dispatcher.active_count == 0)  # no thread is at work for them
        for reader in readers:
            got = reader.answer()
            assert (got.body == LARGE, got.complete) == (True, True)
            assert reader.sock.recv(1) == b""  # such a connection is used once


def test_an_answer_to_http_1_0_is_left_to_the_server_too(broker: LiveBroker) -> None:
    for kind in ("large", "chunked"):
        with slow_reader(broker.port) as reader:
            ask(reader, kind, version="1.0")
            eventually(lambda: broker.dispatcher.active_count == 0)
            got = reader.answer()
            assert (got.body == LARGE, got.complete) == (True, True)


def test_a_second_request_behind_a_slowly_read_answer_takes_no_thread(broker: LiveBroker) -> None:
    with slow_reader(broker.port) as reader:
        head = "POST /v1/tts HTTP/1.1\r\nHost: localhost\r\nX-Answer: huge\r\n\r\n"
        reader.send((head * 2).encode())
        reader.until(b"\r\n\r\n")
        eventually(lambda: broker.dispatcher.active_count == 0)
        assert broker.broker.guard.unfinished() > 16 * 1024 * 1024  # where waitress makes one wait
        broker.await_idle()
        assert broker.stats.total_jobs == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_reader_below_the_least_rate_is_cut_off_with_a_reset(
    broker: LiveBroker, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(connection, "RATE_WINDOW_S", 1.0)
    with slow_reader(broker.port) as reader, slow_reader(broker.port) as steady:
        ask(reader, "large", version=version)
        ask(steady, "large", version=version)
        pace = Outcome(steady.answer)
        reader.until(b"\r\n\r\n")
        eventually(lambda: not broker.broker.guard.unfinished())
        with pytest.raises(ConnectionResetError):
            _read_to_the_end(reader)
        assert pace.result().body == LARGE


@contextmanager
def full_disk(mib: int) -> Iterator[None]:
    """No file of this process may grow beyond `mib` meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (mib * 1024 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as below
@pytest.mark.parametrize("framing", ["Content-Length: 3000000", "Transfer-Encoding: chunked"])
def test_a_body_that_the_disk_has_no_room_for_is_a_500(
    broker: LiveBroker, caplog: pytest.LogCaptureFixture, framing: str
) -> None:
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    body = chunk * 45 if "chunked" in framing else b"x" * 2_900_000
    with full_disk(1), broker.raw() as client:
        client.request("POST", "/v1/tts", headers=(framing,)).send(body)
        got = client.answer()
    assert (got.status, got.header("Connection")) == (500, "close")
    assert b'"internal_error"' in got.body
    (said,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert said.message == "a body cannot be kept"
    assert broker.post("/v1/tts", data=b"x" * 3_000_000).status_code == 200


# Waitress leaves a file that it cannot fill to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["huge", "huge, by its end"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_that_the_disk_has_no_room_for_does_not_look_complete(
    broker: LiveBroker, caplog: pytest.LogCaptureFixture, version: str, kind: str
) -> None:
    with full_disk(3), slow_reader(broker.port) as reader:
        ask(reader, kind, version=version)
        reader.until(b"\r\n\r\n")
        eventually(lambda: broker.dispatcher.active_count == 0)
        broker.await_idle()
        # A reset may come in place of bytes that were sent; in HTTP/1.0 only it tells.
        with suppress(ConnectionResetError):
            assert not reader.answer().complete
    (said,) = [r for r in caplog.records if r.message == "answer truncated"]
    assert "File too large" in getattr(said, "reason")  # noqa: B009  # an extra, unknown to mypy
    assert broker.post("/v1/tts").status_code == 200
