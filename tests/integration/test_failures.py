"""Consumers that fail, each over real sockets: the right envelope, and the GPU back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.support import faults
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.ports import free_port
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually

QUICK = {"timeouts": {"connect": 0.5, "first_byte": 0.5, "idle": 0.5, "total": 2}}


def ok(connection: Connection, _: Received) -> None:
    connection.send(answer(b'{"ok": true}'))


@pytest.fixture
def consumer() -> Iterator[ScriptedConsumer]:
    with ScriptedConsumer(ok) as running:
        yield running


@pytest.fixture
def broker(consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(consumer.url, consumer=QUICK)) as running:
        yield running
        running.await_idle()


def envelope(status: int, reply: Any, code: str, *, retryable: bool) -> dict[str, Any]:
    assert reply.status_code == status
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Request-Id"]
    body: dict[str, Any] = reply.json()
    assert body["error"] == code
    assert body["retryable"] is retryable
    assert body["message"]
    assert set(body) <= {"error", "message", "consumer", "retryable"}
    return body


def test_a_dead_consumer_is_a_502() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with live_broker(config_for(url)) as broker:
        body = envelope(502, broker.post("/v1/tts"), "consumer_unreachable", retryable=True)
        assert body["consumer"] == "mvoice"
        assert url not in body["message"]
        broker.await_idle()


def test_an_unhealthy_consumer_is_refused_before_the_line() -> None:
    with ScriptedConsumer(lambda c, _: c.send(answer(b"", "500 Oops"))) as consumer:
        config = config_for(consumer.url, consumer={"health": "/health"}, health_interval=0.05)
        with live_broker(config) as broker:
            eventually(lambda: broker.broker.registry.get("mvoice").healthy is False)
            body = envelope(503, broker.post("/v1/tts"), "consumer_unreachable", retryable=True)
            assert body["consumer"] == "mvoice"
            assert broker.stats.total_jobs == 0
            assert all(b"/health" in received.line for received in consumer.requests)

            consumer.script = ok
            eventually(lambda: broker.broker.registry.get("mvoice").healthy)
            assert broker.post("/v1/tts").status_code == 200


def test_a_consumer_never_probed_is_not_refused(broker: LiveBroker) -> None:
    assert broker.post("/v1/tts").status_code == 200


def test_a_kind_nobody_serves_is_a_501(consumer: ScriptedConsumer) -> None:
    config = config_for(consumer.url, routing={"tts": "mvoice"}, consumer={"paths": {"stt": "/x"}})
    with live_broker(config) as broker:
        body = envelope(501, broker.post("/v1/tts"), "no_consumer", retryable=False)
        assert body["consumer"] == "mvoice"
        body = envelope(501, broker.post("/v1/llm"), "no_consumer", retryable=False)
        assert "consumer" not in body


def test_no_audio_proxy_is_a_404(consumer: ScriptedConsumer) -> None:
    with live_broker(config_for(consumer.url, audio_proxy=None)) as broker:
        envelope(404, broker.get("/audio/x.wav"), "no_audio_proxy", retryable=False)


def test_an_unknown_route_is_a_404(broker: LiveBroker) -> None:
    for path in ("/v1/video", "/v1/tts/", "/V1/tts", "/v1/status/", "/v1"):
        envelope(404, broker.get(path), "not_found", retryable=False)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/tts", "POST"),
        ("OPTIONS", "/v1/tts", "POST"),
        ("DELETE", "/v1/status", "GET, HEAD"),
        ("POST", "/audio/x.wav", "GET, HEAD"),
        ("PUT", "/", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_a_405_with_allow(
    broker: LiveBroker, method: str, path: str, allow: str
) -> None:
    reply = broker._session.request(method, broker.url + path, timeout=PATIENCE_S)
    envelope(405, reply, "method_not_allowed", retryable=False)
    assert reply.headers["Allow"] == allow


def test_too_large_a_body_is_a_413(consumer: ScriptedConsumer) -> None:
    with (
        live_broker(config_for(consumer.url, max_body_mib=1)) as broker,
        broker.raw() as client,
    ):
        client.request("POST", "/v1/tts", headers=(f"Content-Length: {1024 * 1024 + 1}",))
        got = client.answer()  # at once, with no byte of the body sent
        assert got.status == 413
        assert got.header("Content-Type") == "application/json"
        assert b'"payload_too_large"' in got.body
        assert got.header("X-Request-Id")
    assert consumer.requests == []


def test_a_malformed_request_is_a_400_in_the_envelope(broker: LiveBroker) -> None:
    for lines in (
        "POST /v1/tts HTTP/1.1\r\nHost: b\r\nContent-Length: x\r\n\r\n",
        "POST /v1/tts HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "POST /v1/tts HTTP/1.1\r\nHost : b\r\n\r\n",
        "nonsense\r\n\r\n",
        "POST /v1/tts HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n"
        "Content-Length: 3\r\n\r\n0\r\n\r\n",
        "POST /v1/tts HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n"
        "0\r\n\r\n",
        "POST /v1/tts?q=\xfc HTTP/1.1\r\nHost: b\r\n\r\n",
    ):
        with broker.raw() as client:
            got = client.send(lines.encode("latin-1")).answer()
        assert got.status == 400
        assert b'"bad_request"' in got.body
        assert got.header("Content-Type") == "application/json"


def test_an_unexpected_exception_is_a_500_without_a_trace(
    broker: LiveBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(broker.broker.registry, "enter", broken)
    reply = broker.post("/v1/tts", headers={"X-Request-Id": "find-me"})
    envelope(500, reply, "internal_error", retryable=True)
    assert "secret" not in reply.text
    (record,) = [r for r in caplog.records if r.exc_info]
    assert getattr(record, "request_id") == "find-me"  # noqa: B009  # an extra, unknown to mypy


def test_a_broken_scheduler_is_a_500_of_its_own(
    broker: LiveBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(broker.broker.card.scheduler, "enqueue", broken)
    envelope(500, broker.post("/v1/tts"), "scheduler_error", retryable=True)


# -- consumers that misbehave --------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        faults.refuses,
        faults.resets,
        faults.speaks_nonsense,
        faults.half_a_head,
        faults.oversized_head,
        faults.upgrades_unasked,
        faults.gives_two_lengths,
        faults.sends_no_header_line,
    ],
)
def test_one_that_breaks_before_it_answers_is_a_502(
    broker: LiveBroker, consumer: ScriptedConsumer, script: Any
) -> None:
    consumer.script = script
    envelope(502, broker.post("/v1/tts", data=b"{}"), "consumer_unreachable", retryable=True)
    assert len(consumer.requests) == 1  # a job never runs twice
    consumer.script = ok
    assert broker.post("/v1/tts").status_code == 200


@pytest.mark.parametrize("script", [faults.says_nothing, faults.drips_its_head])
def test_one_that_does_not_answer_in_time_is_a_504(
    broker: LiveBroker, consumer: ScriptedConsumer, script: Any
) -> None:
    consumer.script = script
    body = envelope(504, broker.post("/v1/tts"), "consumer_timeout", retryable=True)
    assert body["consumer"] == "mvoice"
    broker.await_idle()
    consumer.script = ok
    assert broker.post("/v1/tts").status_code == 200


TRUNCATING = [
    faults.promises_more,
    faults.breaks_a_chunk,
    faults.omits_the_last_chunk,
    faults.sends_a_nonsense_chunk,
    faults.resets_in_its_body,
    faults.stalls_in_its_body,
]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("script", TRUNCATING)
def test_a_truncated_answer_never_looks_complete(
    broker: LiveBroker, consumer: ScriptedConsumer, script: Any, version: str
) -> None:
    consumer.script = script
    with broker.raw() as client:
        try:
            got = client.request("POST", "/v1/llm", b"{}", version=version).answer()
        except (ConnectionResetError, EOFError):
            pass
        else:
            assert not got.complete
            assert b"only this".startswith(got.body[:9])
    broker.await_idle()
    consumer.script = ok
    assert broker.post("/v1/tts").status_code == 200


def test_a_stream_that_goes_on_for_ever_ends_at_the_total(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    consumer.script = faults.goes_on_for_ever
    with broker.raw() as client:
        assert not client.request("POST", "/v1/llm", b"{}").answer().complete
    broker.await_idle()


def test_the_total_holds_before_the_first_byte_too(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    consumer.script = faults.says_nothing
    quick = {"timeouts": {"connect": 2, "first_byte": 60, "idle": 60, "total": 0.5}}
    with live_broker(config_for(consumer.url, consumer=quick)) as bounded:
        body = envelope(504, bounded.post("/v1/tts"), "consumer_timeout", retryable=True)
        assert body["message"] == "mvoice: not done within 0.5 s"


# -- clients that leave ------------------------------------------------------------------------


def test_a_client_that_leaves_the_line_frees_its_place(
    broker: LiveBroker, held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    with live_broker(config_for(held_consumer.url)) as patient:
        first = Outcome(lambda: patient.post("/v1/tts"))
        eventually(lambda: patient.stats.in_flight == 1)
        with patient.raw() as leaver:
            leaver.request("POST", "/v1/tts", b"{}")
            patient.await_waiting(1)
            last = Outcome(lambda: patient.post("/v1/tts"))
            patient.await_waiting(2)
        patient.await_waiting(1)
        release.set()
        assert first.result().status_code == last.result().status_code == 200
        assert len(held_consumer.requests) == 2
        assert patient.stats.total_jobs == 2


@pytest.mark.parametrize("phase", ["first byte", "mid-stream"])
def test_a_client_that_leaves_while_its_job_runs_has_the_consumer_closed(
    broker: LiveBroker, consumer: ScriptedConsumer, phase: str
) -> None:
    closed = threading.Event()

    def endless(connection: Connection, _: Received) -> None:
        if phase == "mid-stream":
            connection.send(faults.HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        if connection.wait_closed():
            closed.set()

    consumer.script = endless
    with live_broker(config_for(consumer.url)) as patient:
        with patient.raw() as leaver:
            leaver.request("POST", "/v1/llm", b"{}")
            eventually(lambda: consumer.requests)
            if phase == "mid-stream":
                leaver.until(b"first")
        assert closed.wait(1.0)
        patient.await_idle(1.0)


def test_where_the_consumer_works_on_the_gpu_stays_held_until_it_is_done(
    consumer: ScriptedConsumer,
) -> None:
    finish = threading.Event()

    def works_on(connection: Connection, _: Received) -> None:
        connection.send(faults.HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        finish.wait(PATIENCE_S)
        connection.send(b"4\r\nlast\r\n0\r\n\r\n")

    consumer.script = works_on
    with live_broker(config_for(consumer.url, consumer={"on_disconnect": "none"})) as broker:
        with broker.raw() as leaver:
            leaver.request("POST", "/v1/llm", b"{}").until(b"first")
        next_one = Outcome(lambda: broker.post("/v1/tts"))
        broker.await_waiting(1)
        assert len(consumer.requests) == 1
        assert broker.stats.in_flight == 1
        consumer.script = ok
        finish.set()
        assert next_one.result().status_code == 200


@pytest.mark.parametrize("how", ["the client leaves", "the operator cancels"])
def test_a_consumer_that_has_to_be_told_is_told(consumer: ScriptedConsumer, how: str) -> None:
    told = threading.Event()

    def script(connection: Connection, received: Received) -> None:
        if received.line.startswith(b"POST /interrupt"):
            connection.send(answer())
            told.set()
        else:
            told.wait(PATIENCE_S)
            connection.send(answer(b"interrupted"))

    consumer.script = script
    changes = {"on_disconnect": {"path": "/interrupt"}}
    with live_broker(config_for(consumer.url, consumer=changes)) as broker:
        with broker.raw() as client:
            client.request("POST", "/v1/llm", b"{}")
            eventually(lambda: consumer.requests)
            if how == "the operator cancels":
                broker.delete(f"/v1/queue/{broker.get('/v1/queue').json()['queue'][0]['ticket']}")
                assert client.answer().status == 503
        assert told.wait(2)
        broker.await_idle()


def test_a_consumer_that_can_tell_is_asked_until_it_is_at_rest(
    consumer: ScriptedConsumer,
) -> None:
    """Its connection is closed, and the GPU held for as long as it says that it is busy."""
    working, asked = threading.Event(), threading.Event()
    working.set()

    def script(connection: Connection, received: Received) -> None:
        if received.line.startswith(b"GET /state"):
            asked.set()
            connection.send(answer(b'{"busy": true}' if working.is_set() else b'{"busy": false}'))
        else:
            connection.wait_closed()

    consumer.script = script
    changes = {
        "on_disconnect": "none",
        "probe": {"path": "/state", "busy": "busy"},
        "health": "/state",
    }
    with live_broker(config_for(consumer.url, consumer=changes, health_interval=60)) as broker:
        eventually(lambda: broker.broker.registry.get("mvoice").healthy)
        with broker.raw() as leaver:
            leaver.request("POST", "/v1/llm", b"{}")
            eventually(lambda: any(r.line.startswith(b"POST") for r in consumer.requests))
            asked.clear()
        assert asked.wait(2)
        assert broker.stats.in_flight == 1
        working.clear()
        broker.await_idle(2)


def test_the_line_runs_in_the_order_of_arrival(
    broker: LiveBroker, held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    clients = []
    with live_broker(config_for(held_consumer.url)) as patient:
        for index in range(5):
            path = f"/v1/tts?n={index}"
            clients.append(Outcome(partial(patient.post, path)))
            patient.await_line(index + 1)
        release.set()
        assert [client.result().status_code for client in clients] == [200] * 5
    assert [r.line for r in held_consumer.requests] == [
        f"POST /api/tts?n={index} HTTP/1.1".encode() for index in range(5)
    ]


def test_a_full_line_refuses_at_once_with_retry_after(
    held_consumer: ScriptedConsumer, release: threading.Event
) -> None:
    scheduler = {"kind": "locked", "max_queue": 1, "max_wait": 0.3}
    with live_broker(config_for(held_consumer.url, scheduler=scheduler)) as broker:
        first = Outcome(lambda: broker.post("/v1/tts"))
        eventually(lambda: broker.stats.in_flight == 1)
        second = Outcome(lambda: broker.post("/v1/tts"))
        broker.await_waiting(1)
        refused = broker.post("/v1/tts")
        envelope(503, refused, "queue_full", retryable=True)
        assert int(refused.headers["Retry-After"]) >= 1
        timed_out = second.result()
        envelope(503, timed_out, "queue_timeout", retryable=True)
        assert int(timed_out.headers["Retry-After"]) >= 1
        release.set()
        assert first.result().status_code == 200


# -- the breaker ---------------------------------------------------------------------------------


def test_repeated_failures_are_refused_fast_until_a_trial_succeeds(
    broker: LiveBroker, consumer: ScriptedConsumer
) -> None:
    consumer.script = faults.refuses
    for _ in range(3):
        assert broker.post("/v1/tts").status_code == 502
    refused = broker.post("/v1/tts")
    envelope(503, refused, "consumer_unreachable", retryable=True)
    assert int(refused.headers["Retry-After"]) >= 1
    assert len(consumer.requests) == 3
    assert broker.get("/v1/status").json()["consumers"][0]["breaker"] == "open"

    consumer.script = ok
    eventually(lambda: broker.post("/v1/tts").status_code == 200)
    assert broker.get("/v1/status").json()["consumers"][0]["breaker"] == "closed"


@pytest.mark.parametrize("status", ["400 Bad", "429 Slow down", "500 Oops"])
def test_a_consumers_own_errors_open_nothing(
    broker: LiveBroker, consumer: ScriptedConsumer, status: str
) -> None:
    consumer.script = lambda connection, _: connection.send(answer(b"", status))
    assert {broker.post("/v1/tts").status_code for _ in range(5)} == {int(status[:3])}


def arrived(consumer: ScriptedConsumer, count: int) -> bool:
    return len(consumer.requests) >= count


def test_clients_that_leave_open_nothing(broker: LiveBroker, consumer: ScriptedConsumer) -> None:
    consumer.script = faults.says_nothing
    for _ in range(4):
        with broker.raw() as leaver:
            seen = len(consumer.requests)
            leaver.request("POST", "/v1/tts", b"{}")
            eventually(partial(arrived, consumer, seen + 1))
        broker.await_idle()
    consumer.script = ok
    assert broker.post("/v1/tts").status_code == 200


def test_a_failing_load_is_not_retried_in_a_storm() -> None:
    def script(connection: Connection, received: Received) -> None:
        health = b'{"loaded": false, "gpu_resident_mib": 0}'
        if received.line.startswith(b"GET /health"):
            connection.send(answer(health))
        else:
            connection.send(answer(b"", "500 Oops"))

    changes = {"health": "/health", "load": "/load", "unload": "/unload"}
    with (
        ScriptedConsumer(script) as consumer,
        live_broker(config_for(consumer.url, consumer=changes, health_interval=0.05)) as broker,
    ):
        eventually(lambda: broker.broker.registry.get("mvoice").healthy)
        statuses = [broker.post("/v1/tts").status_code for _ in range(10)]
        assert statuses == [502] * 3 + [503] * 7
        loads = [r for r in consumer.requests if r.line.startswith(b"POST /load")]
        assert len(loads) == 3


# -- a client's own patience ---------------------------------------------------------------------


@pytest.mark.parametrize("value", ["wait=0", 'respond-async, wait="0"', "Wait=0; x=y"])
def test_a_client_may_say_how_long_it_will_wait(
    broker: LiveBroker, held_consumer: ScriptedConsumer, release: threading.Event, value: str
) -> None:
    with live_broker(config_for(held_consumer.url)) as patient:
        first = Outcome(lambda: patient.post("/v1/tts"))
        eventually(lambda: patient.stats.in_flight == 1)
        refused = patient.post("/v1/tts", headers={"Prefer": value})
        envelope(503, refused, "queue_timeout", retryable=True)
        release.set()
        assert first.result().status_code == 200
        assert patient.post("/v1/tts", headers={"Prefer": value}).status_code == 200
