"""Clients that nobody knows yet, and what they may cost: time, memory, disk, connections."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import quote

import pytest

from gpumanager.keys import ApiKey
from gpumanager.web import connection, server
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, RawClient, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually

KEY = "alice-has-a-long-key"
CHUNKED = b"POST /v1/tts HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def consumer() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(lambda peer, _: peer.send(answer())) as running:
        yield running


@pytest.fixture
def broker(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(consumer.url)) as running:
        yield running


@pytest.fixture
def guarded(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(consumer.url), keys=[ApiKey("alice", KEY)]) as running:
        yield running


# -- bodies without end --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"1" * 2000, "too long"),
        (b"1;" + b"a" * 2000, "too long"),
        (b"1;a=b\r\nx\r\n" + b"0;" + b"a" * 2000, "too long"),
        (b"0\r\n" + b"a: b\r\n" * 2000, "too many trailers"),
        (b"0\r\na: " + b"b" * 2000, "too long"),
        ((b"1;" + b"a" * 500 + b"\r\nx\r\n") * 40, "too little content"),
    ],
)
def test_framing_without_end_is_refused_when_it_is_too_much(
    broker: LiveBroker, consumer: ScriptedConsumer, sent: bytes, words: str
) -> None:
    with broker.raw() as client:
        got = client.send(CHUNKED + sent).answer()
    assert got.status == 400
    assert words.encode() in got.body
    assert consumer.requests == []


def test_a_body_in_one_byte_chunks_arrives(broker: LiveBroker, consumer: ScriptedConsumer) -> None:
    with broker.raw() as client:
        got = client.send(CHUNKED + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n").answer()
    assert got.status == 200
    assert consumer.requests[0].body == b"x" * 100_000


# -- slow ones -----------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 1.0)
    monkeypatch.setattr(connection, "RATE_WINDOW_S", 1.0)


@pytest.mark.usefixtures("impatient")
def test_a_head_has_to_come_in_time(broker: LiveBroker) -> None:
    with broker.raw() as client:
        got = client.send(b"POST /v1/tts HTTP/1.1\r\nX-A: ").answer()
        assert got.status == 408
        assert b'"request_timeout"' in got.body
        assert got.header("X-Request-Id")


@pytest.mark.usefixtures("impatient")
def test_a_connection_that_says_nothing_is_closed(broker: LiveBroker) -> None:
    with broker.raw() as client:
        assert client.sock.recv(1) == b""


@pytest.mark.usefixtures("impatient")
def test_an_idle_connection_stays_until_the_next_head_is_late(broker: LiveBroker) -> None:
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with broker.raw() as client:
        assert client.send(get).answer().status == 200
        threading.Event().wait(2)  # more than HEAD_S: it owes nothing
        client.buffer = b""
        assert client.send(get).answer().status == 200
        client.buffer = b""
        assert client.send(get[:10]).answer().status == 408


@pytest.mark.usefixtures("impatient")
def test_a_body_has_to_come_at_the_least_rate(broker: LiveBroker) -> None:
    stop = threading.Event()
    with broker.raw() as client:
        client.request("POST", "/v1/tts", headers=("Content-Length: 1000000",))

        def trickle() -> None:
            while not stop.wait(0.1):
                client.send(b"x")

        trickling = Outcome(trickle)
        got = client.answer()
        stop.set()
        trickling.result()
    assert got.status == 408
    assert b"the body came too slowly" in got.body


@pytest.mark.usefixtures("impatient")
def test_a_client_that_waits_for_its_answer_is_not_slow(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    go_on = threading.Event()

    def slow(peer: Connection, _: Received) -> None:
        go_on.wait(PATIENCE_S)
        peer.send(answer())

    consumer.script = slow
    with broker.raw() as client:
        client.request("POST", "/v1/tts", b"{}").send(b"POST /v1/tts HTTP/1.1\r\nHos")
        eventually(lambda: consumer.requests)
        threading.Event().wait(2)
        go_on.set()
        assert client.answer().status == 200
        client.buffer = b""
        assert client.send(b"t: localhost\r\n\r\n").answer().status == 200


# -- strangers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/tts", "/healthz", "/nowhere"])
@pytest.mark.parametrize(
    "more", [(), ("Expect: 100-continue",), ("X-Api-Key: wrong-but-long-key",)]
)
def test_not_a_byte_of_a_strangers_body_is_waited_for(
    guarded: LiveBroker, path: str, more: tuple[str, ...]
) -> None:
    with guarded.raw() as client:
        client.request(
            "POST", path, headers=("Content-Length: 300000000", "X-Request-Id: me", *more)
        )
        got = client.answer()
    assert got.status == 401
    assert (got.header("Connection"), got.header("X-Request-Id")) == ("close", "me")
    assert (got.header("Www-Authenticate") or "").startswith("Bearer")


def test_a_stranger_who_sends_it_all_can_still_read_why_not(guarded: LiveBroker) -> None:
    with guarded.raw() as client:
        got = client.request("POST", "/v1/tts", b"x" * 2_000_000).answer()
        assert got.status == 401
        assert client.sock.recv(1) == b""
    chunked = guarded.post("/v1/tts", data=(b"x" * 65536 for _ in range(20)))
    assert chunked.status_code == 401


def test_a_stranger_does_not_send_for_ever(guarded: LiveBroker) -> None:
    with guarded.raw() as client, pytest.raises((ConnectionResetError, BrokenPipeError)):
        client.send(CHUNKED + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 1000)


def test_what_is_behind_a_refused_request_is_not_run(
    guarded: LiveBroker, consumer: ScriptedConsumer
) -> None:
    good = f"POST /v1/tts HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {KEY}\r\n\r\n"
    bad = f"POST /v1/tts HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(good)}\r\n\r\n"
    with guarded.raw() as client:
        assert client.send((bad + good).encode()).answer().status == 401
        assert client.sock.recv(1) == b""
    guarded.await_idle()
    assert consumer.requests == []


def test_a_good_key_is_known_before_the_body_and_told_to_go_on(guarded: LiveBroker) -> None:
    with guarded.raw() as client:
        client.request(
            "POST",
            "/v1/tts",
            headers=(f"X-Api-Key: {KEY}", "Content-Length: 2", "Expect: 100-continue"),
        )
        client.until(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.buffer = b""
        assert client.send(b"{}").answer().status == 200


# -- connections ---------------------------------------------------------------------------------


def test_healthz_answers_however_many_connect_and_say_nothing(
    held_consumer: ScriptedConsumer, release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SPARE_CONNECTIONS", -364)  # 21 connections in all
    with live_broker(config_for(held_consumer.url)) as broker, ExitStack() as stack:
        working = stack.enter_context(broker.raw()).request("POST", "/v1/tts", b"{}")
        eventually(lambda: held_consumer.requests)
        uploading = stack.enter_context(broker.raw())
        uploading.request("POST", "/v1/tts", headers=("Content-Length: 2",)).send(b"{")
        idle = [stack.enter_context(broker.raw()).send(b"G") for _ in range(60)]
        for _ in range(3):
            with RawClient(broker.port) as client:
                assert client.request("GET", "/healthz").answer().status == 200
        assert idle[0].sock.recv(1) == b""  # the one that was silent for longest made way
        release.set()
        assert working.answer().status == 200
        assert uploading.send(b"}").answer().status == 200


def test_of_long_paths_little_is_kept(broker: LiveBroker, consumer: ScriptedConsumer) -> None:
    consumer.script = lambda peer, _: peer.reset()
    long = "/audio/" + "ä" * 9_000
    for _ in range(20):
        with broker.raw() as client:
            client.request("GET", quote(long))
            assert client.answer().status in (502, 503)
    eventually(lambda: len(refusals(broker)) == 20)
    assert {event["path"] for event in refusals(broker)} == {long[:255] + "…"}
    with broker.raw() as client:
        got = client.request("GET", "/" + "a" * 10_000).answer()
    assert (got.status, len(got.body) < 400) == (404, True)


def refusals(broker: LiveBroker) -> list[dict[str, str]]:
    events = broker.get("/v1/events").json()["events"]
    return [event for event in events if event["event"] == "refused"]
