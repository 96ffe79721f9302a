"""Faults × phases. Whatever breaks, wherever the request stands: nobody is left in line, the GPU
is free, and the next client, innocent of it all, is served."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import yaml

from tests.support.broker import LiveBroker, live_broker
from tests.support.sockets import Answer, Connection, RawClient, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, eventually

QUICK = {"connect": 0.4, "first_byte": 0.4, "idle": 0.4, "total": 1.0}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
LOADED = b'{"loaded": %s, "gpu_resident_mib": %d}'


# -- what may go wrong with an answer --------------------------------------------------------------


def refuses(connection: Connection, _: Received) -> None:
    connection.sock.close()


def says_nothing(connection: Connection, _: Received) -> None:
    connection.wait_closed(3)


def resets(connection: Connection, _: Received) -> None:
    connection.reset()


def half_a_head(connection: Connection, _: Received) -> None:
    connection.send(b"HTTP/1.1 200 OK\r\nX-Half: ")


def drips_its_head(connection: Connection, _: Received) -> None:
    pause = threading.Event()
    for byte in HEAD * 3:
        connection.send(bytes([byte]))
        pause.wait(0.05)


def speaks_nonsense(connection: Connection, _: Received) -> None:
    connection.send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


def oversized_head(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n")


def promises_more(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Content-Length: 100\r\n\r\nshort")


def breaks_a_chunk(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort\r\nzz\r\n")


def stalls_in_its_body(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Content-Length: 100\r\n\r\nshort")
    connection.wait_closed(3)


def goes_on_for_ever(connection: Connection, _: Received) -> None:
    connection.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while not connection.wait_closed(0.1):
        connection.send(b"1\r\nx\r\n")


CONSUMER_FAULTS = [
    refuses,
    says_nothing,
    resets,
    half_a_head,
    drips_its_head,
    speaks_nonsense,
    oversized_head,
    promises_more,
    breaks_a_chunk,
    stalls_in_its_body,
    goes_on_for_ever,
]
CALLS = ["job", "load", "unload", "health"]


# -- the stage -------------------------------------------------------------------------------------

Script = Callable[[Connection, Received], None]


@dataclass
class Stage:
    """Three consumers. `target` fits only once `victim` is unloaded, and has to be loaded;
    `innocent` needs nothing. `faults` replaces a call's good answer."""

    broker: LiveBroker
    faults: dict[str, Script]
    reached: dict[str, threading.Event] = field(
        default_factory=lambda: {call: threading.Event() for call in (*CALLS, "innocent")}
    )

    def innocent_is_served(self) -> None:
        self.broker.await_idle(5)
        reply = self.broker.post("/v1/stt", data=b"{}")
        assert (reply.status_code, reply.content) == (200, b"innocent")
        stats = self.broker.stats
        assert (stats.queue_depth, stats.in_flight) == (0, 0)
        assert {s.active for s in self.broker.broker.registry.snapshot().values()} == {0}


@contextmanager
def stage(on_disconnect: str = "native") -> Iterator[Stage]:
    faults: dict[str, Script] = {}
    holder: list[Stage] = []

    def serve(call: str, good: bytes) -> Script:
        def script(connection: Connection, received: Received) -> None:
            if holder:
                holder[0].reached[call].set()
            if call in faults:
                faults[call](connection, received)
            else:
                connection.send(good)

        return script

    routes: dict[bytes, Script] = {
        b"/job": serve("job", answer(b"done")),
        b"/load": serve("load", answer()),
        b"/unload": serve("unload", answer()),
        b"/health": serve("health", answer(LOADED % (b"false", 0))),
        b"/loaded": lambda c, _: c.send(answer(LOADED % (b"true", 900))),
        b"/innocent": serve("innocent", answer(b"innocent")),
    }

    def script(connection: Connection, received: Received) -> None:
        routes[received.line.split()[1]](connection, received)

    quick = {"timeout": 0.4}
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
                    "timeouts": QUICK,
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
            holder.append(Stage(broker, faults))
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
        on.faults[call] = fault
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
        on.faults.clear()
        eventually(lambda: (a := attempt(on.broker)) is not None and a.status == 200)


# -- 16 cells: the client leaves, or the operator cancels, wherever the request stands -------------

PHASES = ["waiting", "unload", "load", "first byte", "mid-body"]


@contextmanager
def standing_at(on: Stage, phase: str, finish: threading.Event) -> Iterator[RawClient]:
    """A job of the target that has got as far as `phase`, and stays there until `finish`."""

    def hold(connection: Connection, received: Received) -> None:
        finish.wait(0.3)
        connection.send(answer())

    def hold_answer(connection: Connection, received: Received) -> None:
        if phase == "mid-body":
            connection.send(HEAD + b"Content-Length: 9\r\n\r\nfirst")
            finish.wait(0.3)
            connection.send(b"last")
        else:
            hold(connection, received)

    call = {"first byte": "job", "mid-body": "job", "waiting": "innocent"}.get(phase, phase)
    on.faults[call] = hold_answer if call == "job" else hold
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
    with stage(on_disconnect) as on:
        with standing_at(on, phase, finish) as client:
            client.sock.close()
            if phase == "waiting":
                on.broker.await_waiting(0)
        on.faults.clear()
        on.innocent_is_served()
        assert attempt(on.broker) is not None


@pytest.mark.parametrize("on_disconnect", ["native", "none"])
@pytest.mark.parametrize("phase", PHASES)
def test_an_operator_who_cancels(phase: str, on_disconnect: str) -> None:
    finish = threading.Event()
    with stage(on_disconnect) as on:
        with standing_at(on, phase, finish) as client:
            ticket = on.broker.get("/v1/queue").json()["line"][-1]["ticket"]
            assert on.broker.delete(f"/v1/queue/{ticket}").status_code == 200
            got = client.answer()
            if phase == "mid-body":
                assert not got.complete
            else:
                assert (got.status, b'"cancelled"' in got.body) == (503, True)
        on.faults.clear()
        on.innocent_is_served()
