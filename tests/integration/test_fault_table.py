"""Faults × phases. Whatever breaks, wherever the request stands: nobody is left in line, the GPU
is free, and the next client, innocent of it all, is served."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import yaml

from tests.support import faults
from tests.support.broker import LiveBroker, live_broker
from tests.support.sockets import Answer, Connection, RawClient, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

QUICK = {"connect": 0.4, "first_byte": 0.4, "idle": 0.4, "total": 1.0}
PATIENT = {"connect": 10.0, "first_byte": 10.0, "idle": 10.0, "total": 20.0}
LOADED = b'{"loaded": %s, "gpu_resident_mib": %d}'


# -- what may go wrong with an answer --------------------------------------------------------------


CONSUMER_FAULTS = [
    faults.refuses,
    faults.says_nothing,
    faults.resets,
    faults.half_a_head,
    faults.drips_its_head,
    faults.speaks_nonsense,
    faults.oversized_head,
    faults.promises_more,
    faults.breaks_a_chunk,
    faults.stalls_in_its_body,
    faults.goes_on_for_ever,
]
CALLS = ["job", "load", "unload", "health"]


# -- the stage -------------------------------------------------------------------------------------

Script = Callable[[Connection, Received], None]


@dataclass
class Stage:
    """Three consumers. `target` fits only once `victim` is unloaded, and has to be loaded;
    `innocent` needs nothing. `broken` replaces a call's good answer."""

    broker: LiveBroker
    broken: dict[str, Script]
    reached: dict[str, threading.Event] = field(
        default_factory=lambda: {call: threading.Event() for call in (*CALLS, "innocent")}
    )

    def innocent_is_served(self) -> None:
        self.broker.await_idle(5)
        reply = self.broker.post("/v1/stt", data=b"{}")
        assert (reply.status_code, reply.content) == (200, b"innocent")
        stats = self.broker.stats
        assert (stats.queue_depth, stats.in_flight) == (0, 0)
        assert {s.active for s in self.broker.broker.registry.now.states.values()} == {0}


@contextmanager
def stage(on_disconnect: str = "native", timeouts: dict[str, float] = QUICK) -> Iterator[Stage]:
    broken: dict[str, Script] = {}
    holder: list[Stage] = []

    def serve(call: str, good: bytes) -> Script:
        def script(connection: Connection, received: Received) -> None:
            if holder:
                holder[0].reached[call].set()
            if call in broken:
                broken[call](connection, received)
            else:
                connection.send(good)

        return script

    routes: dict[bytes, Script] = {
        b"/job": serve("job", answer(b"done")),
        b"/load": serve("load", answer()),
        b"/unload": serve("unload", answer()),
        b"/unload-target": lambda c, _: c.send(answer()),  # of a load that was given up
        b"/health": serve("health", answer(LOADED % (b"false", 0))),
        b"/loaded": lambda c, _: c.send(answer(LOADED % (b"true", 900))),
        b"/innocent": serve("innocent", answer(b"innocent")),
    }

    def script(connection: Connection, received: Received) -> None:
        routes[received.line.split()[1]](connection, received)

    quick = {"timeout": timeouts["first_byte"]}
    with ScriptedConsumer(script) as consumer:
        config = {
            "gpu": {"total_mib": 1500, "reserved_mib": 100},
            "health_interval": 0.1,
            "routing": {"tts": "target", "stt": "innocent"},
            "consumers": {
                "target": {
                    "url": consumer.url,
                    "paths": {"tts": "/job"},
                    "health": {"path": "/health", **quick},
                    "load": {"path": "/load", **quick},
                    "unload": "/unload-target",
                    "vram_resident_mib": 1000,
                    "timeouts": timeouts,
                    "on_disconnect": on_disconnect,
                },
                "victim": {
                    "url": consumer.url,
                    "health": {"path": "/loaded", **quick},
                    "unload": {"path": "/unload", **quick},
                    "vram_resident_mib": 900,
                },
                "innocent": {"url": consumer.url, "paths": {"stt": "/innocent"}},
            },
        }
        with live_broker(yaml.safe_dump(config)) as broker:
            registry = broker.broker.registry
            eventually(lambda: registry.get("victim").healthy and registry.get("target").healthy)
            holder.append(Stage(broker, broken))
            yield holder[0]


def attempt(broker: LiveBroker) -> Answer | None:
    """A job of the target; None if its connection broke."""
    with broker.raw() as client:
        try:
            return client.request("POST", "/v1/tts", b"{}").answer()
        except (EOFError, OSError):
            return None


# -- 44 cells: each fault of a consumer, in each call made to it -----------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", CONSUMER_FAULTS)
def test_a_consumer_that_breaks(fault: Script, call: str) -> None:
    with stage() as on:
        on.broken[call] = fault
        if call == "health":
            eventually(lambda: on.broker.broker.registry.get("target").healthy is False)
        got = attempt(on.broker)
        expected = {"job": (502, 504), "load": (502, 504), "unload": (503,), "health": (503,)}
        if got is not None and got.status != 200:
            assert got.status in expected[call]
            assert got.complete
            assert got.header("Content-Type") == "application/json"
        else:
            assert call == "job"
            assert got is None or not got.complete
        on.innocent_is_served()
        on.broken.clear()
        eventually(lambda: (a := attempt(on.broker)) is not None and a.status == 200)


# -- 16 cells: the client leaves, or the operator cancels, wherever the request stands -------------

PHASES = ["waiting", "unload", "load", "first byte", "mid-body"]


@contextmanager
def standing_at(on: Stage, phase: str, finish: threading.Event) -> Iterator[RawClient]:
    """A job of the target that has got as far as `phase`, and stays there until `finish`."""

    def hold(connection: Connection, received: Received) -> None:
        finish.wait(PATIENCE_S)
        connection.send(answer())

    def hold_answer(connection: Connection, received: Received) -> None:
        if phase == "mid-body":
            connection.send(faults.HEAD + b"Content-Length: 9\r\n\r\nfirst")
            finish.wait(PATIENCE_S)
            connection.send(b"last")
        else:
            hold(connection, received)

    call = {"first byte": "job", "mid-body": "job", "waiting": "innocent"}.get(phase, phase)
    on.broken[call] = hold_answer if call == "job" else hold
    with on.broker.raw() as before, on.broker.raw() as client:
        if phase == "waiting":
            before.request("POST", "/v1/stt", b"{}")
            assert on.reached["innocent"].wait(PATIENCE_S)
        client.request("POST", "/v1/tts", b"{}")
        if phase == "waiting":
            on.broker.await_waiting(1)
        else:
            assert on.reached[call].wait(PATIENCE_S)
        if phase == "mid-body":
            client.until(b"first")
        yield client
        if phase == "waiting":
            finish.set()
            before.answer()


@pytest.mark.parametrize("on_disconnect", ["native", "none"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves(phase: str, on_disconnect: str) -> None:
    finish = threading.Event()
    with stage(on_disconnect, PATIENT) as on:
        with standing_at(on, phase, finish) as client:
            client.sock.close()
            finish.set()
            if phase == "waiting":
                on.broker.await_waiting(0)
        on.broken.clear()
        on.innocent_is_served()
        assert attempt(on.broker) is not None


@pytest.mark.parametrize("on_disconnect", ["native", "none"])
@pytest.mark.parametrize("phase", PHASES)
def test_an_operator_who_cancels(phase: str, on_disconnect: str) -> None:
    finish = threading.Event()
    with stage(on_disconnect, PATIENT) as on:
        with standing_at(on, phase, finish) as client:
            ticket = on.broker.get("/v1/queue").json()["queue"][-1]["ticket"]
            assert on.broker.delete(f"/v1/queue/{ticket}").status_code == 200
            finish.set()
            got = client.answer()
            if phase == "mid-body":
                assert not got.complete
            else:
                assert (got.status, b'"cancelled"' in got.body) == (503, True)
        on.broken.clear()
        on.innocent_is_served()
