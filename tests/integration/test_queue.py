"""Operating the line: who is in it, and taking one out."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer
from tests.support.threads import PATIENCE_S, Outcome, eventually


@pytest.fixture
def broker(held_consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(held_consumer.url)) as running:
        yield running


def test_the_queue_shows_who_runs_and_who_waits(broker: LiveBroker) -> None:
    assert broker.get("/v1/queue").json() == {"queue": []}
    clients = []
    for count in (1, 2, 3):
        clients.append(Outcome(lambda: broker.post("/v1/stt", headers={"X-Request-Id": "r-1"})))
        broker.await_line(count)
    running, first, second = broker.get("/v1/queue").json()["queue"]
    assert (running["state"], running["position"]) == ("running", 0)
    assert (first["state"], first["position"]) == ("waiting", 1)
    assert second["position"] == 2
    assert running["ticket"] < first["ticket"] < second["ticket"]
    assert (first["consumer"], first["kind"]) == ("mvoice", "stt")
    assert (first["client"], first["request_id"]) == ("127.0.0.1", "r-1")
    assert first["age_ms"] >= 0
    assert second["estimate_ms"] > first["estimate_ms"]
    for entry in (second, first, running):
        broker.delete(f"/v1/queue/{entry['ticket']}")
    for client in clients:
        assert client.result().json()["error"] == "cancelled"


def test_cancelling_a_waiting_job(broker: LiveBroker, release: threading.Event) -> None:
    first = Outcome(lambda: broker.post("/v1/tts"))
    broker.await_line(1)
    waiting = Outcome(lambda: broker.post("/v1/tts"))
    broker.await_waiting(1)
    ticket = broker.get("/v1/queue").json()["queue"][1]["ticket"]
    reply = broker.delete(f"/v1/queue/{ticket}")
    assert (reply.status_code, reply.json()) == (200, {"ticket": ticket, "state": "cancelled"})
    cancelled = waiting.result()
    assert cancelled.status_code == 503
    assert (cancelled.json()["error"], cancelled.json()["retryable"]) == ("cancelled", False)
    assert broker.stats.queue_depth == 0
    release.set()
    assert first.result().json() == {"done": True}


def test_cancelling_a_running_job_closes_the_consumers_connection(
    broker: LiveBroker, held_consumer: ScriptedConsumer
) -> None:
    closed = threading.Event()

    def endless(connection: Connection, _: Received) -> None:
        if connection.wait_closed():
            closed.set()

    held_consumer.script = endless
    running = Outcome(lambda: broker.post("/v1/tts"))
    eventually(lambda: held_consumer.requests)
    ticket = broker.get("/v1/queue").json()["queue"][0]["ticket"]
    assert broker.delete(f"/v1/queue/{ticket}").status_code == 200
    assert running.result().json()["error"] == "cancelled"
    assert closed.wait(1)
    broker.await_idle()


@pytest.mark.parametrize("where", ["before the head", "in mid-answer"])
def test_a_running_job_of_a_consumer_that_works_on_holds_the_gpu_until_it_is_done(
    held_consumer: ScriptedConsumer, release: threading.Event, where: str
) -> None:
    def works_on(connection: Connection, _: Received) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
        if where == "in mid-answer":
            connection.send(head + b"first")
            release.wait(PATIENCE_S)
            connection.send(b"last")
        else:
            release.wait(PATIENCE_S)
            connection.send(head + b"firstlast")

    held_consumer.script = works_on
    with live_broker(config_for(held_consumer.url, consumer={"on_disconnect": "none"})) as broker:
        with broker.raw() as client:
            client.request("POST", "/v1/tts", b"{}")
            eventually(lambda: held_consumer.requests)
            if where == "in mid-answer":
                client.until(b"first")
            ticket = broker.get("/v1/queue").json()["queue"][0]["ticket"]
            broker.delete(f"/v1/queue/{ticket}")
            next_one = Outcome(lambda: broker.post("/v1/tts"))
            broker.await_waiting(1)
            assert broker.stats.in_flight == 1
            assert len(held_consumer.requests) == 1
            release.set()
            got = client.answer()
            if where == "in mid-answer":
                assert not got.complete
            else:
                assert got.status == 503
                assert b'"cancelled"' in got.body
        assert next_one.result().status_code == 200


@pytest.mark.parametrize("ticket", ["1", "999999", "0"])
def test_a_ticket_that_is_not_there(broker: LiveBroker, ticket: str) -> None:
    reply = broker.delete(f"/v1/queue/{ticket}")
    assert (reply.status_code, reply.json()["error"]) == (404, "not_found")


def test_a_ticket_is_a_number(broker: LiveBroker) -> None:
    assert broker.delete("/v1/queue/first").json()["error"] == "not_found"
