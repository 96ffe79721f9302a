"""Memory by model, with faithful fakes of servers that keep several loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import Running, fake_server
from tests.support.threads import eventually

SMALL, MIDDLE, LARGE = "titles:1b", "chat:8b", "coder:14b"
OLLAMA: dict[str, Any] = {
    SMALL: {"mib": 1000, "kv_kib": 32},
    MIDDLE: {"mib": 4000, "kv_kib": 128},
    LARGE: 8000,
}
"""At 4,096 tokens: 1,128, 4,512 and 8,000 MiB."""

ROUTER = {"small": 700, "middle": 3000, "large": 7000}
CHAT = "/v1/chat/completions"


@pytest.fixture
def card(tmp_path: Path) -> SimulatedCard:
    return SimulatedCard.create(tmp_path / "card.json", 12_000, release_lag_s=0.05)


@contextmanager
def box(
    card: SimulatedCard,
    servers: dict[str, dict[str, Any]],
    *,
    voice_mib: int = 0,
    state_file: Path | None = None,
    health_interval: float = 0.2,
    **consumer: Any,
) -> Iterator[tuple[LiveBroker, dict[str, Running]]]:
    """A broker in front of fakes of the kinds that are their names, nothing declared, and a plain
    server of `voice_mib` beside them. Further keys are those of each of the former."""
    with ExitStack() as stack:
        fakes = {
            name: stack.enter_context(fake_server(name, card.path, name, sizes))
            for name, sizes in servers.items()
        }
        consumers = {
            name: {"preset": name, "url": fake.url, **consumer} for name, fake in fakes.items()
        }
        routing: dict[str, Any] = {"llm": list(fakes)}
        if voice_mib:
            fakes["voice"] = stack.enter_context(
                fake_server("plain", card.path, "voice", voice_mib)
            )
            consumers["voice"] = {
                "url": fakes["voice"].url,
                "health": "/health",
                "unload": "/unload",
                "paths": {"tts": "/job"},
                "vram_resident_mib": voice_mib,
            }
            routing["tts"] = "voice"
        config = {
            "gpu": {
                "device": f"simulated:{card.path}",
                "sample_interval": 0.2,
                "release_timeout": 2,
            },
            "health_interval": health_interval,
            "routing": routing,
            "consumers": consumers,
        }
        broker = stack.enter_context(live_broker(yaml.safe_dump(config), state_file=state_file))
        eventually(lambda: all(each["probed"] for each in status(broker)["consumers"]))
        yield broker, fakes


def status(broker: LiveBroker) -> dict[str, Any]:
    told: dict[str, Any] = broker.get("/v1/status").json()
    return told


def consumer_of(broker: LiveBroker, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(e for e in status(broker)["consumers"] if e["name"] == name)
    return found


def models_of(broker: LiveBroker, name: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in consumer_of(broker, name).get("models", ())}


def held(broker: LiveBroker, name: str) -> dict[str, int]:
    """What status says that each loaded model holds, in MiB."""
    return {
        model: each["held_mib"] for model, each in models_of(broker, name).items() if each["loaded"]
    }


def needed(broker: LiveBroker, name: str) -> dict[str, int]:
    return {
        model: each["learned"]["needed"]["mib"] for model, each in models_of(broker, name).items()
    }


def chat(broker: LiveBroker, model: str, **more: Any) -> int:
    answer = broker.post(CHAT, json={"model": model, "messages": [], **more})
    return answer.status_code


def evicted(broker: LiveBroker) -> list[tuple[str, str | None, str]]:
    """Who was evicted: consumer, model, outcome."""
    found = []
    for each in broker.broker.events.since(0).events:
        if each.event.name == "evicted":
            event: Any = each.event
            found.append((event.consumer, event.model, event.outcome))
    return found


def counts(fake: Running) -> dict[str, Any]:
    told: dict[str, Any] = fake.ask("POST", "/_fake", {})
    return told


# -- which of them goes ----------------------------------------------------------------------------


def test_a_small_model_stays_while_the_large_one_of_the_same_server_goes(
    card: SimulatedCard,
) -> None:
    with box(card, {"ollama": OLLAMA}, voice_mib=5000) as (broker, fakes):
        for model in (SMALL, LARGE):
            assert chat(broker, model) == 200
        eventually(lambda: held(broker, "ollama") == {SMALL: 1128, LARGE: 8000})
        assert broker.post("/v1/tts", json={}).status_code == 200
        assert evicted(broker) == [("ollama", LARGE, "released")]
        assert held(broker, "ollama") == {SMALL: 1128}
        assert chat(broker, SMALL) == 200  # it is still there
        assert counts(fakes["ollama"])["loads_of"] == {SMALL: 1, LARGE: 1}
        assert counts(fakes["ollama"])["spills"] == 0


def test_a_small_job_evicts_nobody_where_a_large_one_would(card: SimulatedCard) -> None:
    with box(card, {"ollama": OLLAMA}, voice_mib=5000) as (broker, _):
        for model in (SMALL, LARGE):  # each is learned of alone
            assert chat(broker, model) == 200
        assert broker.post("/v1/tts", json={}).status_code == 200
        before = len(evicted(broker))
        assert chat(broker, SMALL) == 200
        assert len(evicted(broker)) == before
        plan = broker.get(f"/v1/plan/llm?model={LARGE}").json()
        assert plan["needed_mib"] == 8000
        assert [each["consumer"] for each in plan["victims"]] == ["voice"]


def test_a_model_is_evicted_for_another_one_of_the_same_server(card: SimulatedCard) -> None:
    with box(card, {"ollama": OLLAMA}) as (broker, fakes):
        for model in (LARGE, MIDDLE, SMALL, MIDDLE):  # one of which nothing is known may be large
            assert chat(broker, model) == 200
        eventually(lambda: held(broker, "ollama") == {SMALL: 1128, MIDDLE: 4512})
        before = len(evicted(broker))
        assert chat(broker, SMALL) == chat(broker, LARGE) == 200
        assert evicted(broker)[before:] == [("ollama", MIDDLE, "released")]
        eventually(lambda: held(broker, "ollama") == {SMALL: 1128, LARGE: 8000})
        assert counts(fakes["ollama"])["own_unloads"] == 0
        assert counts(fakes["ollama"])["spills"] == 0


# -- how much a job needs --------------------------------------------------------------------------


@pytest.mark.parametrize("measured_at", [[4096], [4096, 8192]])
def test_a_long_context_makes_more_room(card: SimulatedCard, measured_at: list[int]) -> None:
    with box(card, {"ollama": OLLAMA}, voice_mib=5000) as (broker, fakes):

        def generate(tokens: int) -> int:
            body = {"model": MIDDLE, "prompt": "Hello.", "options": {"num_ctx": tokens}}
            return broker.post("/api/generate", json=body).status_code

        assert [generate(tokens) for tokens in measured_at] == [200] * len(measured_at)
        assert broker.post("/v1/tts", json={}).status_code == 200
        assert evicted(broker) == []
        assert generate(32_768) == 200  # 8,096 MiB, which do not fit beside 5,000
        assert evicted(broker) == [("voice", None, "released")]
        assert counts(fakes["ollama"])["spills"] == 0
        eventually(lambda: held(broker, "ollama") == {MIDDLE: 8096})
        assert models_of(broker, "ollama")[MIDDLE]["context"] == 32_768


# -- what is known of them -------------------------------------------------------------------------


def test_figures_of_models_survive_a_restart(card: SimulatedCard, tmp_path: Path) -> None:
    state_file = tmp_path / "state.json"
    with box(card, {"ollama": OLLAMA}, state_file=state_file) as (broker, _):
        for model in (SMALL, LARGE):
            assert chat(broker, model) == 200
        eventually(lambda: needed(broker, "ollama") == {SMALL: 1128, LARGE: 8000})
    with box(card, {"ollama": OLLAMA}, state_file=state_file, voice_mib=5000) as (broker, fakes):
        assert needed(broker, "ollama") == {SMALL: 1128, LARGE: 8000}
        assert broker.post("/v1/tts", json={}).status_code == 200
        assert chat(broker, LARGE) == 200  # room is made at the first meeting
        assert evicted(broker) == [("voice", None, "released")]
        assert counts(fakes["ollama"])["spills"] == 0


def test_what_was_learned_of_a_model_can_be_forgotten(card: SimulatedCard) -> None:
    with box(card, {"ollama": OLLAMA}) as (broker, _):
        for model in (SMALL, MIDDLE):
            assert chat(broker, model) == 200
        broker.post(f"/v1/consumers/ollama/unload?model={MIDDLE}")
        eventually(lambda: needed(broker, "ollama")[MIDDLE] == 4512)
        broker.delete(f"/v1/consumers/ollama/learned?model={MIDDLE}")
        known = models_of(broker, "ollama").get(MIDDLE, {"learned": {}})["learned"]
        assert "peak_mib" not in known
        assert needed(broker, "ollama")[SMALL] == 1128


def test_status_tells_of_each_model(card: SimulatedCard) -> None:
    with box(card, {"ollama": OLLAMA}) as (broker, _):
        for model in (SMALL, MIDDLE, SMALL):
            assert chat(broker, model) == 200
        eventually(lambda: held(broker, "ollama") == {SMALL: 1128, MIDDLE: 4512})
        told = models_of(broker, "ollama")
        assert (told[SMALL]["total_requests"], told[MIDDLE]["total_requests"]) == (2, 1)
        eventually(lambda: models_of(broker, "ollama")[SMALL].get("context") == 4096)
        assert told[SMALL]["learned"]["needed"] | {"at": ""} == {
            "mib": 1128,
            "source": "measured",
            "at": "",
        }
        assert consumer_of(broker, "ollama")["gpu_resident_mib"] == 5640
        broker.post(f"/v1/consumers/ollama/unload?model={SMALL}")
        assert held(broker, "ollama") == {MIDDLE: 4512}


# -- servers that unload in their own time ---------------------------------------------------------


def test_a_model_that_is_listed_until_its_process_has_ended_is_not_loaded_again(
    card: SimulatedCard,
) -> None:
    """It is asked many times while its model stops, and says that it is loaded."""
    servers = {"llama-router": ROUTER}
    with box(card, servers, voice_mib=6000, health_interval=0.02) as (broker, fakes):
        fakes["llama-router"].set(unload_lag_s=0.4)
        for _ in range(3):
            for model in ("small", "large"):
                assert chat(broker, model) == 200
            assert broker.post("/v1/tts", json={}).status_code == 200
            assert held(broker, "llama-router") == {"small": 700}
        outcomes = {outcome for _, _, outcome in evicted(broker)}
        assert outcomes == {"released"}
        assert "quarantine" not in consumer_of(broker, "llama-router")


def test_a_model_that_is_not_loaded_after_all_is_no_leak(card: SimulatedCard) -> None:
    """Unloaded by somebody else just before, unnoticed."""
    servers = {"llama-router": ROUTER}
    with box(card, servers, voice_mib=9500, health_interval=30) as (broker, fakes):
        for model in ("large", "middle", "large", "middle"):
            assert chat(broker, model) == 200
        eventually(lambda: held(broker, "llama-router") == {"middle": 3000, "large": 7000})
        fakes["llama-router"].ask("POST", "/models/unload", {"model": "large"})
        eventually(lambda: card.memory().used_mib == 3000)
        assert broker.post("/v1/tts", json={}).status_code == 200
        assert "quarantine" not in consumer_of(broker, "llama-router")
        assert held(broker, "llama-router") == {}


def test_a_model_that_went_to_the_cpu_is_loaded_again_once_there_is_room(
    card: SimulatedCard,
) -> None:
    with box(card, {"ollama": OLLAMA}, voice_mib=5000) as (broker, fakes):
        card.allocate("game", 6000)
        assert chat(broker, LARGE) == 200  # wholly it does not fit, whoever goes
        eventually(lambda: consumer_of(broker, "ollama").get("on_cpu") == [LARGE])
        assert needed(broker, "ollama")[LARGE] == 8000
        assert chat(broker, LARGE) == 200
        assert counts(fakes["ollama"])["loads"] == 1  # there is no room for it yet
        card.free("game")
        eventually(lambda: status(broker)["gpu"]["free_mib"] == 8000)
        assert chat(broker, LARGE) == 200
        eventually(lambda: held(broker, "ollama") == {LARGE: 8000})
        assert "on_cpu" not in consumer_of(broker, "ollama")
        assert counts(fakes["ollama"])["loads"] == 2


# -- where nobody knows what a model holds ---------------------------------------------------------


def test_what_holds_nobody_knows_how_much_goes_for_a_job_that_ran_out_of_memory(
    card: SimulatedCard,
) -> None:
    """As on WSL2, with servers that tell no figures of their own."""
    card.misbehave(per_process=False)
    servers = {"llama-router": ROUTER, "localai": {"painter": 6500, "voice": 500}}
    with box(card, servers) as (broker, fakes):
        for model in ("small", "large", "voice"):
            assert chat(broker, model) == 200
        assert chat(broker, "painter") == 200  # in a second run
        failures = status(broker)["scheduler"]["out_of_memory"]
        assert failures == {"seen": 1, "healed": 1}
        assert counts(fakes["llama-router"])["unloads_of"] == {"small": 1, "large": 1}
        assert chat(broker, "painter") == 200
        assert status(broker)["scheduler"]["out_of_memory"] == failures
