"""Consumers that answer oddly, through a whole broker: what cannot be read for certain is a 502,
or, where a part of it has gone out already, an answer that does not look complete. Never a 200
with something else in it, never a 500."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Answer, Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def says(data: bytes, *, then: str = "closes") -> Callable[[Connection, Received], None]:
    def script(connection: Connection, _: Received) -> None:
        connection.send(data)
        if then == "waits":
            connection.wait_closed(PATIENCE_S)

    return script


@pytest.fixture
def consumer() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(says(answer())) as running:
        yield running


@pytest.fixture
def broker(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(consumer.url)) as running:
        yield running


def ask(broker: LiveBroker, method: str = "POST", path: str = "/v1/tts") -> Answer:
    with broker.raw() as client:
        body = b"{}" if method == "POST" else None
        headers = ("X-Request-Id: mine",)
        return client.request(method, path, body, headers).answer(head_only=method == "HEAD")


REFUSED = {
    "a chunk size that is none": CHUNKED + b"zz\r\n",
    "a negative chunk size": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "a chunk size without its end": CHUNKED + b"00000",
    "no chunk at all": CHUNKED,
    "a length without its body": OK + b"Content-Length: 5\r\n\r\n",
    "a chunk line without end": CHUNKED + b"5;" + b"a" * 100_000,
    "trailers without end": CHUNKED + b"0\r\n" + b"A: b\r\n" * 100_000,
    "gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "gzip": OK + b"Transfer-Encoding: gzip\r\n\r\nhello",
    "a lone CR for the empty line": OK + b"Content-Length: 5\r\n\r\r\nhello",
    "a CR in the length": OK + b"Content-Length: 5\r\r\n\r\nhello",
    **{
        f"a length of {length[:5]!r}": OK + b"Content-Length: %b\r\n\r\nhello" % length
        for length in (b"-2", b"+2", b"abc", b"2, 3", b"9" * 5000)
    },
}


INCOMPLETE = {"a chunk size without its end", "no chunk at all", "a length without its body"}
"""Which may still become good ones, as long as the consumer does not close."""


@pytest.mark.parametrize(
    ("name", "then"),
    [
        *((name, "closes") for name in REFUSED),
        *((name, "waits") for name in REFUSED if name not in INCOMPLETE),
    ],
)
def test_what_cannot_be_read_for_certain_is_a_502(
    broker: LiveBroker, consumer: ScriptedConsumer, name: str, then: str
) -> None:
    consumer.script = says(REFUSED[name], then=then)
    got = ask(broker)
    if name in INCOMPLETE and got.status == 200:
        assert not got.complete  # its end came after its head had gone out
    else:
        assert (got.status, got.complete) == (502, True)
        assert json.loads(got.body)["error"] == "consumer_unreachable"
        assert got.all("X-Request-Id") == ["mine"]
    broker.await_idle()
    consumer.script = says(answer(b"fine"))
    assert ask(broker).body == b"fine"


@pytest.mark.parametrize(
    "name", ["a chunk size that is none", "gzip, chunked", "a length of b'abc'"]
)
def test_it_counts_as_the_consumers_failure(
    broker: LiveBroker, consumer: ScriptedConsumer, name: str
) -> None:
    consumer.script = says(REFUSED[name])
    seen = [ask(broker).status for _ in range(6)]
    assert seen[0] == 502
    assert seen[-1] == 503  # refused before the queue: the breaker has opened
    assert len(consumer.requests) == seen.count(502)


def test_one_that_breaks_between_its_head_and_the_relay_is_a_502(
    broker: LiveBroker, consumer: ScriptedConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is known, the job counts as begun well, and only then the fault comes."""
    from gpumanager.web.relay import RelayedResponse

    go_on = threading.Event()
    broken = threading.Event()
    relayed = RelayedResponse.__call__

    def script(connection: Connection, _: Received) -> None:
        connection.send(CHUNKED)
        assert go_on.wait(PATIENCE_S)
        connection.send(b"zz\r\n")
        broken.set()
        connection.wait_closed(PATIENCE_S)

    def later(self: RelayedResponse, *args: object) -> object:
        go_on.set()
        assert broken.wait(PATIENCE_S)
        eventually(self._answer.exchange.ready)
        return relayed(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RelayedResponse, "__call__", later)
    consumer.script = script
    got = ask(broker)
    assert (got.status, got.complete) == (502, True)
    assert json.loads(got.body)["error"] == "consumer_unreachable"
    assert got.all("X-Request-Id") == ["mine"]
    broker.await_idle()


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (b"All\rright", "All right"),
        (b"All\0right", "All right"),
        (b"All\x1b[2Jright", "All [2Jright"),
        (b"Sch\xf6n", "Sch\xf6n"),
        (b"", ""),
    ],
)
def test_a_reason_is_cleaned_as_header_values_are(
    broker: LiveBroker, consumer: ScriptedConsumer, reason: bytes, expected: str
) -> None:
    consumer.script = says(b"HTTP/1.1 200 %b\r\nContent-Length: 2\r\n\r\nok" % reason)
    with broker.raw() as client:
        client.request("POST", "/v1/tts", b"{}")
        line = client.until(b"\r\n").partition(b"\r\n")[0].decode("latin-1")
        assert (line.rstrip(), client.answer().body) == (f"HTTP/1.1 200 {expected}".rstrip(), b"ok")


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
@pytest.mark.parametrize("field", ["Transfer-Encoding: chunked", "Content-Length: 5"])
def test_an_answer_that_has_no_body_has_none_whatever_its_head_says(
    broker: LiveBroker, consumer: ScriptedConsumer, status: str, field: str
) -> None:
    consumer.script = says(f"HTTP/1.1 {status}\r\n{field}\r\n\r\n".encode(), then="waits")
    with broker.raw() as client:
        client.request("POST", "/v1/tts", b"{}", ("Connection: close",))
        got = client.answer()
        assert got.status == int(status[:3])
        assert got.all("Transfer-Encoding") == got.all("Content-Length") == []
        while more := client.sock.recv(100):
            client.buffer += more
        assert client.buffer.endswith(b"\r\n\r\n")
        assert client.buffer.count(b"\r\n\r\n") == 1


def test_head_of_a_chunked_consumer_has_no_chunk_at_all(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    consumer.script = says(CHUNKED, then="waits")
    with broker.raw() as client:
        client.request("HEAD", "/audio/a.wav")
        while more := client.sock.recv(1000):  # ends: without a length the connection is closed
            client.buffer += more
        assert client.buffer.startswith(b"HTTP/1.1 200")
        assert client.buffer.endswith(b"\r\n\r\n")
        assert client.buffer.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize("what", ["a chunk line", "trailers", "chunks of one byte", "a head"])
def test_nothing_without_end_is_read_without_end(consumer: ScriptedConsumer, what: str) -> None:
    """Nothing that a consumer sends for ever costs more than its job's time, and others are served
    meanwhile."""
    head, piece = {
        "a chunk line": (CHUNKED + b"1;", b"a" * 1000),
        "trailers": (CHUNKED + b"0\r\n", b"A: b\r\n" * 100),
        "chunks of one byte": (CHUNKED, b"1\r\nx\r\n" * 1000),
        "a head": (OK, b"A: b\r\n" * 100),
    }[what]
    sent = 0

    def script(connection: Connection, received: Received) -> None:
        nonlocal sent
        connection.send(head)
        while True:  # until the broker closes
            connection.send(piece)
            sent += len(piece)

    consumer.script = script
    timeouts = {"connect": 1, "first_byte": 1, "idle": 1, "total": 1.5}
    changes = {"timeouts": timeouts, "paths": {"tts": "/x"}}
    with live_broker(
        config_for(consumer.url, consumer=changes, routing={"tts": "mvoice"})
    ) as broker:
        got = ask(broker)
        if what == "chunks of one byte":  # which are an answer, as long as they come
            assert (got.status, got.complete) == (200, False)
            assert set(got.body) == {ord("x")}
        elif got.status == 200:  # its head had gone out before too much of it was there
            assert (got.body, got.complete) == (b"", False)
            assert what != "a head"
        else:
            assert (got.status, got.complete) == (502, True)
        broker.await_idle()
        assert sent < 8_000_000 or what == "chunks of one byte"


def test_health_is_answered_while_a_consumer_sends_chunks_of_one_byte(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    done = threading.Event()

    def script(connection: Connection, _: Received) -> None:
        connection.send(CHUNKED)
        while not done.is_set():
            connection.send(b"1\r\nx\r\n" * 1000)

    consumer.script = script
    with broker.raw() as client:
        client.request("POST", "/v1/tts", b"{}").until(b"x")
        times = []
        for _ in range(20):
            began = time.perf_counter()
            assert broker.get("/healthz").status_code == 200
            times.append(time.perf_counter() - began)
        done.set()
    times.sort()
    assert times[10] < 0.3
