"""A real broker before servers of several processes, and before several servers in one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import Running, fake_server
from tests.support.families import family
from tests.support.threads import eventually

CARD_MIB = 10_000

pytestmark = pytest.mark.timeout(90)


class Machine:
    def __init__(self, live: LiveBroker, fakes: dict[str, Running]) -> None:
        self.live, self.fakes = live, fakes

    def job(self, consumer: str) -> requests.Response:
        url = f"{self.live.url}/v1/{consumer}"
        return requests.post(url, json={}, timeout=60)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = requests.get(f"{self.live.url}/v1/status", timeout=10).json()
        return found

    def consumer(self, name: str) -> dict[str, Any]:
        found = {each["name"]: each for each in self.status()["consumers"]}
        return dict(found[name])

    def evicted(self) -> list[tuple[str, str, int]]:
        events = requests.get(f"{self.live.url}/v1/events", timeout=10).json()["events"]
        found = [each for each in events if each["event"] == "evicted"]
        return [(each["consumer"], each["outcome"], each["mib"]) for each in found]


def at(url: str, mib: int, **more: Any) -> dict[str, Any]:
    return {
        "url": url,
        "health": "/quiet",
        "unload": "/unload",
        "paths": dict.fromkeys(("first", "second", "third"), "/job"),
        "vram_resident_mib": mib,
    } | more


@contextmanager
def broker(card: SimulatedCard, **consumers: dict[str, Any]) -> Iterator[LiveBroker]:
    """Jobs of the kinds `first`, `second` and `third` go to the consumers in their order."""
    kinds = ("first", "second", "third")
    config = {
        "gpu": {"device": f"simulated:{card.path}", "sample_interval": 0.1, "release_timeout": 2},
        "health_interval": 0.3,
        "routing": dict(zip(kinds, consumers, strict=False)),
        "consumers": consumers,
    }
    with live_broker(yaml.safe_dump(config)) as live:
        yield live


@contextmanager
def parallel(folder: Path) -> Iterator[Machine]:
    """A server of two workers (5000 MiB), and another one (6000)."""
    with ExitStack() as stack:
        card = SimulatedCard.create(folder / "card.json", CARD_MIB)
        workers = stack.enter_context(fake_server("workers", card.path, "parallel", 5000))
        other = stack.enter_context(fake_server("plain", card.path, "other", 6000))
        consumers = {
            "first": at(workers.url, 5000, health="/health"),
            "second": at(other.url, 6000),
        }
        live = stack.enter_context(broker(card, **consumers))
        yield Machine(live, {"first": workers, "second": other})


def pids(workers: Running) -> list[int]:
    return list(workers.ask("POST", "/_fake", {})["pids"])


def test_a_worker_is_replaced_while_it_is_loaded(tmp_path: Path) -> None:
    with parallel(tmp_path) as it:
        assert it.job("first").status_code == 200
        before = pids(it.fakes["first"])
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: len(set(pids(it.fakes["first"])) - set(before)) == 1)
        eventually(lambda: it.consumer("first")["gpu_resident_mib"] == 5000)
        status = it.status()
        assert status["gpu"]["foreign"] == []
        assert it.consumer("first")["attribution"] == "processes"
        assert it.job("second").status_code == 200
        assert it.evicted() == [("first", "released", 5000)]


def test_a_worker_is_replaced_during_an_eviction(tmp_path: Path) -> None:
    with parallel(tmp_path) as it:
        it.fakes["first"].set(replace=True, unload_lag_s=0.6)
        assert it.job("first").status_code == 200
        assert it.job("second").status_code == 200
        assert it.evicted() == [("first", "released", 5000)]
        assert it.status()["gpu"]["foreign"] == []
        assert "quarantine" not in it.consumer("first")


def test_two_consumers_in_one_process_are_not_known_and_jobs_run(tmp_path: Path) -> None:
    card = SimulatedCard.create(tmp_path / "card.json", CARD_MIB)
    with ExitStack() as stack:
        pair = stack.enter_context(fake_server("pair", card.path, "pair", 3000))
        third = stack.enter_context(fake_server("plain", card.path, "third", 6000))
        beside = f"http://127.0.0.1:{pair.ask('POST', '/_fake', {})['other']}"
        consumers = {
            "first": at(pair.url, 3000),
            "second": at(beside, 3000),
            "third": at(third.url, 6000),
        }
        it = Machine(stack.enter_context(broker(card, **consumers)), {})
        for kind in ("first", "second"):
            assert it.job(kind).status_code == 200
        assert card.memory().used_mib == 6000
        for name in ("first", "second"):
            seen = it.consumer(name)
            figures = (seen["gpu_resident_mib"], seen["resident_source"], seen["attribution"])
            assert figures == (3000, "declared", "totals")
            assert "peak_mib" not in seen["learned"]  # nothing is learned from what is not known
        assert it.status()["gpu"]["attribution"] == {"source": "processes"}
        assert it.status()["gpu"]["foreign"] == []
        # One of them is enough, and the card's totals show that it gave its memory back.
        assert it.job("third").status_code == 200
        assert it.evicted() == [("first", "released", 3000)]
        assert it.job("first").status_code == 200
        assert it.evicted()[1:] in ([("third", "released", 6000)], [("second", "released", 3000)])
        assert card.memory().used_mib <= CARD_MIB


def test_a_consumer_that_died_and_left_a_worker(tmp_path: Path) -> None:
    card = SimulatedCard.create(tmp_path / "card.json", CARD_MIB)
    with ExitStack() as stack:
        dying = stack.enter_context(family("detached", card.path, 5000))
        worker = dying.holder()
        other = stack.enter_context(fake_server("plain", card.path, "other", 6000))
        dead = at(f"http://127.0.0.1:{dying.port}", 5000, health={"tcp": f"127.0.0.1:{dying.port}"})
        it = Machine(stack.enter_context(broker(card, first=dead, second=at(other.url, 6000))), {})
        eventually(lambda: it.consumer("first")["gpu_resident_mib"] == 5000)
        dying.kill()
        eventually(lambda: [each["pid"] for each in it.status()["gpu"]["foreign"]] == [worker])
        assert it.consumer("first")["attribution"] == "totals"
        eventually(lambda: not it.consumer("first")["healthy"])
        refused = it.job("second")
        assert refused.status_code == 503
        assert f"(pid {worker}) 5000 MiB" in refused.text  # who has to be ended
