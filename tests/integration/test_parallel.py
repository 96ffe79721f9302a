"""Several jobs of one consumer at the same time, where it says so."""

from __future__ import annotations

import threading

import pytest

from tests.support.broker import config_for, live_broker
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually

EIGHT = 8


class Batching:
    """A server that answers as soon as `together` jobs are there at once; it notes the most that
    there were."""

    def __init__(self, together: int) -> None:
        self._all_here = threading.Barrier(together)
        self._lock = threading.Lock()
        self._here = 0
        self.most = 0

    def __call__(self, connection: Connection, _: Received) -> None:
        with self._lock:
            self._here += 1
            self.most = max(self.most, self._here)
        self._all_here.wait(PATIENCE_S)
        with self._lock:
            self._here -= 1
        connection.send(answer(b'{"done": true}'))


def test_as_many_run_at_once_as_the_consumer_says() -> None:
    batching = Batching(EIGHT)
    with (
        ScriptedConsumer(batching) as consumer,
        live_broker(
            config_for(consumer.url, consumer={"max_parallel": EIGHT, "vram_resident_mib": 1000})
        ) as broker,
    ):
        clients = [Outcome(lambda: broker.post("/v1/llm")) for _ in range(2 * EIGHT)]
        for client in clients:
            assert client.result().json() == {"done": True}
        broker.await_idle()
        assert batching.most == EIGHT
        status = broker.get("/v1/status").json()
        (shown,) = status["consumers"]
        assert (shown["active"], shown["total_requests"]) == (0, 2 * EIGHT)
        assert status["scheduler"]["total_jobs"] == 2 * EIGHT


class Telling(Batching):
    """Such a server that says how many jobs it works on at once, once it is `ready`, and never
    while it should not be asked: for a job."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._slots = slots
        self.ready = threading.Event()
        self.asked = 0

    def __call__(self, connection: Connection, received: Received) -> None:
        if received.line.startswith(b"GET /health"):
            connection.send(answer(b"{}"))
        elif received.line.startswith(b"GET /props") and self.ready.is_set():
            self.asked += 1
            connection.send(answer(b'{"total_slots": %d}' % self._slots))
        elif received.line.startswith(b"GET /props"):
            connection.send(answer(b'{"error": "loading"}', status="503 Service Unavailable"))
        else:
            super().__call__(connection, received)


def test_auto_is_one_until_the_server_has_said_how_many() -> None:
    server = Telling(EIGHT)
    settings = {
        "max_parallel": "auto",
        "slots": {"path": "/props", "count": "total_slots"},
        "health": "/health",
    }
    with (
        ScriptedConsumer(server) as consumer,
        live_broker(config_for(consumer.url, consumer=settings, health_interval=0.05)) as broker,
    ):

        def shown() -> tuple[int, str]:
            (its,) = broker.get("/v1/status").json()["consumers"]
            return its["max_parallel"], its["max_parallel_source"]

        eventually(lambda: broker.broker.registry.get("mvoice").healthy)
        assert shown() == (1, "unknown")
        server.ready.set()
        eventually(lambda: shown() == (EIGHT, "server"))
        asked = server.asked
        clients = [Outcome(lambda: broker.post("/v1/llm")) for _ in range(2 * EIGHT)]
        for client in clients:
            assert client.result().json() == {"done": True}
        assert server.most == EIGHT
        assert server.asked <= asked + 1  # by the clock, not by the job


@pytest.mark.parametrize("settings", [{}, {"max_parallel": 1}])
def test_one_by_one_where_it_says_nothing(settings: dict[str, int]) -> None:
    batching = Batching(1)
    with (
        ScriptedConsumer(batching) as consumer,
        live_broker(config_for(consumer.url, consumer=settings)) as broker,
    ):
        clients = [Outcome(lambda: broker.post("/v1/llm")) for _ in range(EIGHT)]
        for client in clients:
            assert client.result().json() == {"done": True}
        assert batching.most == 1
