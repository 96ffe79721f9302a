"""A whole broker prepares the next swap while a job runs: real files, a stand-in for systemctl."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumanager.host.pagecache import CHUNK
from tests.support.broker import LiveBroker, live_broker
from tests.support.pages import cached_bytes, on_disk
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S, Outcome, eventually


class Server:
    """A consumer that works for as long as it is told to. With a `flag` it runs while that file is
    there."""

    def __init__(self, flag: Path | None = None) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.working = threading.Event()
        self._flag = flag

    def __call__(self, connection: Connection, received: Received) -> None:
        if self._flag is not None and not self._flag.exists():
            connection.send(answer(status="503 Service Unavailable"))
        elif received.line.startswith(b"POST /work"):
            self.working.set()
            self.go_on.wait(PATIENCE_S)
            connection.send(answer(b'{"done": true}'))
        else:
            connection.send(answer(b"{}"))


@contextmanager
def two(
    first: Server, second: Server, of_second: dict[str, Any]
) -> Iterator[tuple[LiveBroker, Outcome[Any]]]:
    """A broker whose two consumers do not fit together; a job of the first runs and one of the
    second, which is not loaded, waits."""
    with ScriptedConsumer(first) as one, ScriptedConsumer(second) as other:
        base = {"vram_resident_mib": 6000, "load": "/load", "unload": "/unload", "health": "/"}
        config = {
            "gpu": {"total_mib": 10_000},
            "health_interval": 0.2,
            "routing": {"llm": "one", "image": "other"},
            "consumers": {
                "one": {**base, "url": one.url, "paths": {"llm": "/work"}},
                "other": {**base, "url": other.url, "paths": {"image": "/work"}, **of_second},
            },
        }
        with live_broker(yaml.safe_dump(config)) as broker:
            assert broker.post("/v1/image").json() == {"done": True}
            first.go_on.clear()
            running = Outcome(lambda: broker.post("/v1/llm"))
            assert first.working.wait(PATIENCE_S)
            waiting = Outcome(lambda: broker.post("/v1/image"))
            broker.await_waiting(1)
            try:
                yield broker, waiting
            finally:
                first.go_on.set()
            assert running.result().json() == {"done": True}


def happened(broker: LiveBroker) -> list[str]:
    return [each["event"] for each in broker.get("/v1/events").json()["events"]]


def test_weights_are_in_the_page_cache_before_the_swap(tmp_path: Path) -> None:
    weights = on_disk(tmp_path / "weights", 2 * CHUNK)
    first, second = Server(), Server()
    with two(first, second, {"prefetch": str(tmp_path / "wei*")}) as (broker, waiting):
        eventually(lambda: "prefetched" in happened(broker))
        assert cached_bytes(weights) == 2 * CHUNK
        assert broker.stats.in_flight == 1  # the first one's job
        first.go_on.set()
        assert waiting.result().json() == {"done": True}
        events = happened(broker)
        (prefetched,) = [
            each
            for each in broker.get("/v1/events").json()["events"]
            if each["event"] == "prefetched"
        ]
        assert (prefetched["consumer"], prefetched["read_mib"]) == ("other", 8)
        assert "loaded" in events[events.index("prefetched") :]


def test_nothing_is_read_by_itself(tmp_path: Path) -> None:
    first, second = Server(), Server()
    with two(first, second, {}) as (broker, waiting):
        names = [worker.name for worker in broker.broker.threads.all()]
        assert "look-ahead" not in names
        first.go_on.set()
        assert waiting.result().json() == {"done": True}


@pytest.mark.parametrize("fails", [False, True])
def test_a_stopped_unit_is_started_before_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """If that fails the first time, its job has it started as ever."""
    flag, calls = tmp_path / "runs", tmp_path / "calls"
    flag.touch()
    script = tmp_path / "bin" / "systemctl"
    script.parent.mkdir()
    broken = f"grep -q start {calls} || {{ echo start >> {calls}; exit 1; }};" if fails else ""
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *stop*) echo stop >> {calls}; rm -f {flag} ;;\n'
        f"*start*) {broken} echo start >> {calls}; touch {flag} ;; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    first, second = Server(), Server(flag)
    settings = {"start_ahead": True, "evict": [{"unit": "other.service"}], "unload": None}
    with two(first, second, settings) as (broker, waiting):
        eventually(lambda: calls.exists() and "start" in calls.read_text())
        if not fails:
            eventually(lambda: "started_ahead" in happened(broker))
            assert flag.exists()
        assert broker.stats.in_flight == 1
        first.go_on.set()
        assert waiting.result().json() == {"done": True}
    assert calls.read_text().split()[:2] == ["stop", "start"]
    assert flag.exists()
