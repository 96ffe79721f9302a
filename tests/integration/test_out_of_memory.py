"""The promise: two consumers that do not fit together never meet on the card."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import fake_server

JOBS = 200
CLIENTS = 8
TOTAL_MIB = 8000
NEEDS = {"mvoice": 5000, "ollama": 6000}
KINDS = {"mvoice": "tts", "ollama": "llm"}


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "card.json"
    SimulatedCard.create(path, TOTAL_MIB, release_lag_s=0.02)
    return path


@pytest.fixture
def urls(card: Path) -> Iterator[dict[str, str]]:
    with (
        fake_server("plain", card, "mvoice", NEEDS["mvoice"]) as mvoice,
        fake_server("plain", card, "ollama", NEEDS["ollama"]) as ollama,
    ):
        yield {"mvoice": mvoice.url, "ollama": ollama.url}


def config(urls: dict[str, str], gpu: dict[str, Any]) -> str:
    return yaml.safe_dump(
        {
            "gpu": {"reserved_mib": 256, "sample_interval": 0.2, **gpu},
            "health_interval": 0.2,
            "routing": {kind: name for name, kind in KINDS.items()},
            "consumers": {
                name: {
                    "url": url,
                    "health": "/health",
                    "paths": {KINDS[name]: "/job"},
                    "vram_resident_mib": NEEDS[name],
                    "unload": "/unload",
                }
                for name, url in urls.items()
            },
        }
    )


def mixed_jobs() -> list[str]:
    return random.Random(4).choices(sorted(NEEDS), k=JOBS)


def post(url: str) -> int:
    with requests.Session() as session:
        session.trust_env = False
        return session.post(url, data=b"{}", timeout=60).status_code


def run_all(targets: list[str]) -> list[int]:
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(post, targets))


def test_without_the_broker_jobs_run_out_of_memory(urls: dict[str, str]) -> None:
    statuses = run_all([f"{urls[name]}/job" for name in mixed_jobs()])
    assert statuses.count(500) > JOBS // 10
    assert set(statuses) == {200, 500}


@pytest.mark.parametrize("source", ["measured", "ledger"])
def test_through_the_broker_none_does(urls: dict[str, str], card: Path, source: str) -> None:
    gpu: dict[str, Any] = {"device": f"simulated:{card}"}
    if source == "ledger":
        gpu = {"device": f"simulated:{card}.gone", "total_mib": TOTAL_MIB}
        # The ledger cannot see a release that lags, so here the card releases at once.
        SimulatedCard.create(card, TOTAL_MIB)

    def check(broker: LiveBroker) -> None:
        statuses = run_all([f"{broker.url}/v1/{KINDS[name]}" for name in mixed_jobs()])
        assert statuses == [200] * JOBS
        status = broker.get("/v1/status").json()
        assert status["gpu"]["source"] == source
        assert status["scheduler"]["total_jobs"] == JOBS
        assert status["scheduler"]["evictions"] > 10
        assert (status["scheduler"]["queue_depth"], status["scheduler"]["in_flight"]) == (0, 0)

    with live_broker(config(urls, gpu)) as broker:
        check(broker)


def test_what_can_never_fit_is_refused_with_what_is_in_the_way(
    urls: dict[str, str], card: Path
) -> None:
    SimulatedCard(card).allocate("somebody else", 4000)
    with live_broker(config(urls, {"device": f"simulated:{card}"})) as broker:
        reply = broker.post("/v1/llm", data=b"{}")
        assert reply.status_code == 503
        body = reply.json()
        assert (body["error"], body["retryable"]) == ("insufficient_vram", True)
        # 8000 - 4000 - 256 for the 6000 it needs
        assert "2256 MiB short" in body["message"]
        assert f"(pid {os.getpid()}) 4000 MiB" in body["message"]
        assert int(reply.headers["Retry-After"]) >= 1
        assert broker.stats.evictions == 0
        assert broker.stats.in_flight == 0


def test_without_a_card_to_ask_two_that_say_nothing_of_themselves_never_meet(
    urls: dict[str, str], card: Path
) -> None:
    """Both can be loaded and unloaded, so both are taken for loaded at the start, and cannot be."""
    SimulatedCard.create(card, TOTAL_MIB)
    silent = yaml.safe_load(config(urls, {"device": 99, "total_mib": TOTAL_MIB}))
    for consumer in silent["consumers"].values():
        consumer |= {"health": "/quiet", "load": "/job"}
    with live_broker(yaml.safe_dump(silent)) as broker:
        gpu = broker.get("/v1/status").json()["gpu"]
        assert gpu["used_mib"] <= gpu["total_mib"] == TOTAL_MIB
        for kind in ("tts", "llm", "tts", "llm", "llm"):
            assert broker.post(f"/v1/{kind}", data=b"{}").status_code == 200
            consumers = broker.get("/v1/status").json()["consumers"]
            assert [each["name"] for each in consumers if each["loaded"]] == [
                name for name in NEEDS if KINDS[name] == kind
            ]
        assert broker.stats.evictions == 4
