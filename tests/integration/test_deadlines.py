"""`Prefer: wait=N` over real sockets: who cannot have its turn in time is told as soon as that is
known."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.sockets import ScriptedConsumer
from tests.support.threads import Outcome, eventually


@pytest.fixture
def broker(held_consumer: ScriptedConsumer) -> Iterator[LiveBroker]:
    with live_broker(config_for(held_consumer.url)) as running:
        yield running


@pytest.fixture
def running(
    broker: LiveBroker, held_consumer: ScriptedConsumer, release: threading.Event
) -> Iterator[Outcome[object]]:
    """A job that runs until `release`."""
    job: Outcome[object] = Outcome(lambda: broker.post("/v1/tts"))
    eventually(lambda: len(held_consumer.requests) == 1)
    yield job
    release.set()
    job.result()


def test_a_job_whose_turn_is_not_expected_in_time_is_refused_at_once(
    broker: LiveBroker, running: Outcome[object], held_consumer: ScriptedConsumer
) -> None:
    broker.broker.learned.ran("mvoice", 50.0)
    refused = broker.post("/v1/tts", headers={"Prefer": "wait=20"})
    said = refused.json()
    assert (refused.status_code, said["error"], said["retryable"]) == (503, "queue_timeout", True)
    assert said["consumer"] == "mvoice"
    assert said["message"] == f"no turn within 20 s: it is expected in {said['estimate_s']:g} s"
    assert 40 < said["estimate_s"] <= 50
    assert 20 < int(refused.headers["Retry-After"]) <= 30
    assert broker.stats.queue_depth == 0
    assert len(held_consumer.requests) == 1


@pytest.mark.parametrize(
    ("path", "where"), [("/v1/chat/completions", "error"), ("/v1/messages", "error")]
)
def test_each_protocol_tells_the_estimate(
    broker: LiveBroker, running: Outcome[object], path: str, where: str
) -> None:
    broker.broker.learned.ran("mvoice", 50.0)
    refused = broker.post(path, json={"model": "m"}, headers={"Prefer": "wait=20"})
    assert refused.status_code == 503
    assert refused.json()[where]["code"] == "queue_timeout"
    assert 40 < refused.json()[where]["estimate_s"] <= 50


def test_one_that_becomes_hopeless_is_told_while_it_waits(
    broker: LiveBroker, running: Outcome[object]
) -> None:
    """Jobs take 1 s or 50 s. After a second the one that runs is one of the long ones."""
    for seconds in (1.0, 1.0, 50.0):
        broker.broker.learned.ran("mvoice", seconds)
    began = time.monotonic()
    refused = broker.post("/v1/tts", headers={"Prefer": "wait=20"})
    assert (refused.status_code, refused.json()["error"]) == (503, "queue_timeout")
    assert "it is expected in 4" in refused.json()["message"]
    assert 40 < refused.json()["estimate_s"] < 49.5
    assert time.monotonic() - began < 10  # long before its 20 s are over


def test_nobody_is_refused_on_a_guess(
    broker: LiveBroker, running: Outcome[object], release: threading.Event
) -> None:
    """No job of it has ended yet, so nobody knows how long one takes."""
    waiting = Outcome(lambda: broker.post("/v1/tts", headers={"Prefer": "wait=30"}))
    broker.await_waiting(1)
    release.set()
    assert waiting.result().status_code == 200


def test_its_thread_ends_with_the_broker(broker: LiveBroker) -> None:
    def there() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name == "deadlines"]

    assert there() == ["deadlines"]
    broker.broker.stop()
    assert there() == []
