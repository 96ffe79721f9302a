"""Ollama unloads by itself, too: after a job with `keep_alive: 0`, and some time after any other.
The broker notices, and does not fight it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from gpumanager.gpu.simulated import SimulatedCard
from tests.integration.test_servers import box, card, job, status_of
from tests.support.broker import LiveBroker
from tests.support.threads import eventually

__all__ = ["card"]

PROBE = {
    "path": "/api/ps",
    "items": "models[].name",
    "loaded": "length(models) > `0`",
    "resident": "sum(models[].size_vram)",
    "unit": "B",
}
"""Without `on_cpu`, for which it is asked after each job."""


def consumers(**ollama: Any) -> dict[str, dict[str, Any]]:
    return {
        "ollama": {"fake": "ollama", "mib": 7000, **ollama},
        "voice": {"fake": "plain", "mib": 5000},
    }


def chat(broker: LiveBroker, **more: Any) -> int:
    status: int = job(broker, "llm", {"model": "llama3:8b", **more}).status_code
    return status


def told(broker: LiveBroker, *names: str) -> list[str]:
    found = [each.event.name for each in broker.broker.events.since(0).events]
    return [name for name in found if name in names]


def was_left_in_peace(broker: LiveBroker) -> bool:
    """Nobody was unloaded by the broker, nor blamed."""
    scheduler = broker.get("/v1/status").json()["scheduler"]
    ollama = status_of(broker, "ollama")
    said = told(broker, "evicted", "quarantined", "eviction_failed", "refused")
    return scheduler["evictions"] == 0 and "quarantine" not in ollama and said == []


def test_a_model_that_leaves_after_its_job_is_noticed_and_waited_for(card: SimulatedCard) -> None:
    with box(card, consumers(), health_interval=60) as (broker, fakes):
        fakes["ollama"].set(unload_lag_s=0.8)
        assert chat(broker, keep_alive=0) == 200
        eventually(lambda: not status_of(broker, "ollama")["loaded"])
        assert broker.get("/v1/plan/tts").json()["victims"] == []
        assert job(broker, "tts").status_code == 200
        assert was_left_in_peace(broker)
        assert status_of(broker, "ollama")["gpu_resident_mib"] == 0


def test_a_model_that_has_left_unnoticed_is_no_eviction(card: SimulatedCard) -> None:
    with box(card, consumers(probe=PROBE), health_interval=60) as (broker, fakes):
        fakes["ollama"].set(unload_lag_s=0.8)
        assert chat(broker, keep_alive="0") == 200
        assert status_of(broker, "ollama")["loaded"]
        assert job(broker, "tts").status_code == 200
        assert was_left_in_peace(broker)
        assert not status_of(broker, "ollama")["loaded"]
        assert "residue_mib" not in status_of(broker, "ollama")["learned"]


def test_its_own_time_is_noticed(card: SimulatedCard) -> None:
    with box(card, consumers()) as (broker, fakes):
        fakes["ollama"].set(keep_alive_s=0.5)
        assert chat(broker) == 200
        assert status_of(broker, "ollama")["loaded"]
        eventually(lambda: not status_of(broker, "ollama")["loaded"])
        eventually(lambda: status_of(broker, "ollama")["gpu_resident_mib"] == 0)
        assert job(broker, "tts").status_code == 200
        assert was_left_in_peace(broker)
        assert chat(broker, keep_alive="5m") == 200
        assert told(broker, "evicted") == ["evicted"]  # the voice


def test_a_default_resident_is_loaded_again_once(card: SimulatedCard) -> None:
    top: dict[str, Any] = {"default_resident": ["ollama"], "restore_after": 0.1}
    with box(card, consumers(model="llama3:8b"), **top) as (broker, fakes):
        fakes["ollama"].set(keep_alive_s=0.3)
        assert chat(broker, keep_alive=0) == 200
        eventually(lambda: fakes["ollama"].ask("POST", "/_fake", {})["loads"] >= 2)
        eventually(lambda: not status_of(broker, "ollama")["loaded"])
        loads = fakes["ollama"].ask("POST", "/_fake", {})["loads"]
        threading.Event().wait(2.5)  # the housekeeper looks each second
        assert fakes["ollama"].ask("POST", "/_fake", {})["loads"] == loads == 2


@pytest.mark.parametrize("keep_alive", [-1, "-1m"])
def test_a_model_that_is_to_stay_for_ever_makes_room_all_the_same(
    card: SimulatedCard, keep_alive: int | str
) -> None:
    with box(card, consumers()) as (broker, fakes):
        assert chat(broker, keep_alive=keep_alive) == 200
        assert job(broker, "tts").status_code == 200
        assert fakes["ollama"].ask("GET", "/api/ps") == {"models": []}
        assert told(broker, "evicted", "quarantined") == ["evicted"]


@pytest.mark.parametrize("path", ["/api/generate", "/consumers/ollama/api/generate"])
def test_an_unload_of_the_clients_own_takes_nobodys_memory(card: SimulatedCard, path: str) -> None:
    """As `ollama stop` sends it: it waits its turn, and needs no room."""
    with box(card, consumers()) as (broker, fakes):
        assert job(broker, "tts").status_code == 200
        stop = {"model": "llama3:8b", "keep_alive": 0}
        assert broker.post(path, json=stop).json()["done_reason"] == "unload"
        assert status_of(broker, "voice")["loaded"]
        assert told(broker, "evicted", "quarantined") == []
        # What has something to answer does need it.
        assert broker.post(path, json={**stop, "prompt": "Hello."}).status_code == 200
        assert told(broker, "evicted") == ["evicted"]
        assert fakes["ollama"].ask("POST", "/_fake", {})["loads"] == 1
