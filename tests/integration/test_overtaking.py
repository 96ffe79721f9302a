"""`policy: affinity` through a whole broker: the promise, on two servers that do not fit together,
which unload each other; urgency and fair share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.keys import ApiKey
from gpumanager.model import Job
from gpumanager.telemetry.events import JobEnded
from tests.support.broker import LiveBroker, config_for, live_broker
from tests.support.fake_servers import Running, fake_server
from tests.support.sockets import Connection, Received, ScriptedConsumer, answer
from tests.support.threads import Outcome


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[SimulatedCard, Running, Running]]:
    card = SimulatedCard.create(tmp_path / "card.json", 8000)
    with (
        fake_server("plain", card.path, "left", 6000) as left,
        fake_server("plain", card.path, "right", 6000) as right,
    ):
        yield card, left, right


def config(card: SimulatedCard, left: Running, right: Running, **scheduler: Any) -> str:
    def plain(server: Running, kind: str) -> dict[str, Any]:
        return {
            "url": server.url,
            "health": "/health",
            "unload": "/unload",
            "paths": {kind: "/job"},
            "vram_resident_mib": 6000,
        }

    return yaml.safe_dump(
        {
            "gpu": {"device": f"simulated:{card.path}", "sample_interval": 0.2},
            "routing": {"tts": "left", "stt": "right"},
            "scheduler": scheduler,
            "consumers": {"left": plain(left, "tts"), "right": plain(right, "stt")},
        }
    )


def order(broker: LiveBroker, kinds: str) -> str:
    """Have these jobs come, one after the other, while another one runs on what is loaded; returns
    their numbers in the order in which they had the GPU."""
    paths = {"l": "/v1/tts", "r": "/v1/stt"}
    assert broker.post(paths["l"], headers={"X-Request-Id": "0"}).status_code == 200
    clients = []
    with closing(broker.broker.card.scheduler.enqueue(Job("left", "tts"))) as ticket:
        ticket.wait()
        for number, kind in enumerate(kinds, start=1):
            headers = {"X-Request-Id": str(number)}
            clients.append(Outcome(partial(broker.post, paths[kind], headers=headers)))
            broker.await_waiting(number)
    for client in clients:
        assert client.result().status_code == 200
    broker.await_idle()
    # A job's end is told when the next one has the GPU already, so perhaps after that one's.
    events = [each.event for each in broker.broker.events.since(0).events]
    ended = [each for each in events if isinstance(each, JobEnded)]
    return "".join(each.request_id for each in sorted(ended, key=granted))


def granted(job: JobEnded) -> float:
    """When it had its turn, in seconds since the epoch."""
    assert job.arrived is not None
    return datetime.fromisoformat(job.arrived).timestamp() + job.wait_ms / 1000


@pytest.mark.parametrize(
    ("scheduler", "expected", "evictions"),
    [
        ({"policy": "fifo"}, "01234567", 4),
        ({"policy": "affinity"}, "02356714", 1),
        ({"policy": "affinity", "max_overtaken_by": 2}, "02314567", 2),
        ({"policy": "affinity", "max_overtake": 0}, "01234567", 4),
    ],
)
def test_jobs_for_what_is_loaded_overtake_within_the_promise(
    servers: tuple[SimulatedCard, Running, Running],
    scheduler: dict[str, Any],
    expected: str,
    evictions: int,
) -> None:
    with live_broker(config(*servers, **scheduler)) as broker:
        assert order(broker, "rllrlll") == expected
        assert broker.stats.evictions == evictions
        most = scheduler.get("max_overtaken_by", 20)
        assert broker.stats.longest_overtake <= most


KEYS = (ApiKey("script", "s" * 32), ApiKey("person", "p" * 32))


@pytest.mark.parametrize(
    ("policy", "priority", "place"),
    [("fifo", "u=0", 12), ("affinity", "u=3", 2), ("affinity", "u=0", 1), ("affinity", "u=7", 12)],
)
def test_a_persons_job_among_those_of_a_script(policy: str, priority: str, place: int) -> None:
    """Eleven jobs of a script wait, and then comes one of a person: by its urgency, and by how much
    of the GPU each has had."""

    def work(connection: Connection, _: Received) -> None:
        connection.send(answer(b"{}"))

    with (
        ScriptedConsumer(work) as consumer,
        live_broker(
            config_for(consumer.url, scheduler={"policy": policy}), keys=KEYS, threads=32
        ) as broker,
    ):
        clients = []
        with closing(broker.broker.card.scheduler.enqueue(Job("mvoice", "tts"))) as ticket:
            ticket.wait()
            for number in range(1, 13):
                who = KEYS[number == 12]
                headers = {
                    "Authorization": f"Bearer {who.secret}",
                    "X-Request-Id": str(number),
                    **({"Priority": priority} if who.name == "person" else {}),
                }
                clients.append(Outcome(partial(broker.post, "/v1/tts", headers=headers)))
                broker.await_waiting(number)
        for client in clients:
            assert client.result().status_code == 200
        broker.await_idle()
        events = [each.event for each in broker.broker.events.since(0).events]
        served = [each.request_id for each in events if isinstance(each, JobEnded)]
        assert served.index("12") + 1 == place
