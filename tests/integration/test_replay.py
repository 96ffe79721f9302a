"""A real broker's event file, played again: the same jobs, in the same order, by the same room."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pytest
import yaml
from click.testing import CliRunner

from gpumanager.cli import main
from gpumanager.config import load_config
from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.simulation.eventlines import read
from gpumanager.simulation.policies import Promise, played
from gpumanager.simulation.recorded import reconstruct
from gpumanager.simulation.trace import Course
from tests.support.broker import live_broker
from tests.support.fake_servers import fake_server
from tests.support.sockets import Connection, ScriptedConsumer, answer
from tests.support.threads import PATIENCE_S

JOBS = 20
TOTAL_MIB = 8000
NEEDS = {"voice": 3000, "whisper": 3500, "ollama": 4000}  # any two fit, and never all three
KINDS = {"voice": "tts", "whisper": "stt", "ollama": "llm"}


@pytest.fixture
def served(tmp_path: Path) -> tuple[Path, Path]:
    """The config and the event file of a broker that has served mixed jobs, all of which waited
    while the first one ran."""
    card = tmp_path / "card.json"
    SimulatedCard.create(card, TOTAL_MIB)
    events, config = tmp_path / "events.jsonl", tmp_path / "consumers.yaml"
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(fake_server("plain", card, name, mib)).url
            for name, mib in NEEDS.items()
        }
        go_on = Event()

        def last(peer: Connection, _: object) -> None:
            assert go_on.wait(PATIENCE_S)
            peer.send(answer(b"{}"))

        slow = stack.enter_context(ScriptedConsumer(last)).url
        document = {
            "gpu": {"device": f"simulated:{card}", "reserved_mib": 256, "sample_interval": 0.1},
            "events": {"file": str(events)},
            "health_interval": 0.2,
            "routing": {"image": "slow", **{kind: name for name, kind in KINDS.items()}},
            "consumers": {
                "slow": {"url": slow, "paths": {"image": "/"}, "health": {"tcp": slow[7:]}},
                **{
                    name: {
                        "url": urls[name],
                        "health": "/health",
                        "paths": {KINDS[name]: "/job"},
                        "vram_resident_mib": mib,
                        "unload": "/unload",
                    }
                    for name, mib in NEEDS.items()
                },
            },
        }
        config.write_text(yaml.safe_dump(document))
        with live_broker(config.read_text()) as live, ThreadPoolExecutor(JOBS + 1) as clients:
            first = clients.submit(live.post, "/v1/image", json={})
            live.await_line(1)
            jobs = [first]
            for number, name in enumerate(random.Random(7).choices(sorted(NEEDS), k=JOBS)):
                jobs.append(clients.submit(live.post, f"/v1/{KINDS[name]}", json={}))
                live.await_waiting(number + 1)
            go_on.set()
            assert {job.result().status_code for job in jobs} == {200}
            live.await_idle()
    return config, events


def decided(course: Course) -> list[tuple[str, ...]]:
    """Grants and evictions: these servers load with their first job, so that no load is told."""
    return [what for what in course.decisions if what[0] != "load"]


def test_the_simulator_decides_as_the_broker_did(served: tuple[Path, Path]) -> None:
    config, events = served
    found = reconstruct(read([str(events)]), "events", load_config(config))
    assert len(found.trace.tasks) == JOBS + 1
    assert found.trace.total_mib == TOTAL_MIB
    course = played(found.trace, "fifo", Promise())
    assert decided(course) == decided(found.real)
    assert sum(what[0] == "evict" for what in course.decisions) >= JOBS // 8


def test_the_command_shows_it(served: tuple[Path, Path]) -> None:
    done = CliRunner().invoke(main, ["replay", str(served[1]), "--json"])
    really, fifo, *_ = json.loads(done.stdout)["policies"]
    assert (really["policy"], fifo["policy"]) == ("really", "fifo")
    assert really["swaps"] == fifo["swaps"] > 0
    assert really["jobs"] == fifo["jobs"] == JOBS + 1
