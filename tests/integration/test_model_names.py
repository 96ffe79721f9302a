"""Models that clients call by other names, and models that nobody has seen yet."""

from __future__ import annotations

from typing import Any

from tests.integration.test_models import (
    LARGE,
    OLLAMA,
    ROUTER,
    SMALL,
    box,
    card,
    chat,
    counts,
    evicted,
    held,
    models_of,
)
from tests.support.broker import LiveBroker
from tests.support.threads import eventually

__all__ = ["card"]


def needed(broker: LiveBroker, model: str) -> int:
    told: dict[str, Any] = broker.get(f"/v1/plan/llm?model={model}").json()
    return int(told["needed_mib"])


def test_another_name_that_the_list_tells_is_the_same_model(card: Any) -> None:
    with box(card, {"llama-router": ROUTER}) as (broker, fakes):
        fakes["llama-router"].set(aliases={"gpt-4o": "middle"})
        eventually(lambda: chat(broker, "gpt-4o") == 200)  # its list is asked again after 2 s
        assert chat(broker, "middle") == chat(broker, "gpt-4o") == 200
        eventually(lambda: held(broker, "llama-router") == {"middle": 3000})
        assert models_of(broker, "llama-router").keys() == {"middle"}
        assert needed(broker, "gpt-4o") == needed(broker, "middle") == 3000
        assert counts(fakes["llama-router"])["loads"] == 1


def test_another_name_that_the_list_does_not_tell_is_learned(card: Any) -> None:
    servers = {"llama-router": ROUTER}
    keys: dict[str, Any] = {"any_model": True, "vram_resident_mib": 7000}
    with box(card, servers, voice_mib=5000, **keys) as (broker, fakes):
        fakes["llama-router"].set(aliases={"gpt-4o": "small"}, tells_aliases=False)
        assert chat(broker, "gpt-4o") == 200
        eventually(lambda: held(broker, "llama-router") == {"small": 700})
        assert chat(broker, "gpt-4o") == 200  # from now on it is known which model it means
        eventually(lambda: needed(broker, "gpt-4o") == 700)
        assert models_of(broker, "llama-router").keys() == {"small"}
        assert broker.post("/v1/tts", json={}).status_code == 200
        broker.post("/v1/consumers/llama-router/unload?model=small")
        assert chat(broker, "gpt-4o") == 200  # 700 MiB fit beside 5,000, as 7,000 would not
        assert evicted(broker) == [("llama-router", "small", "released")]  # the operator's


def test_a_small_model_that_nobody_has_seen_evicts_nobody(card: Any) -> None:
    """Though the largest of its server would."""
    with box(card, {"ollama": OLLAMA}, voice_mib=5000, vram_resident_mib=9000) as (broker, fakes):
        assert broker.post("/v1/tts", json={}).status_code == 200
        eventually(lambda: needed(broker, SMALL) < 2000)
        assert chat(broker, SMALL) == 200
        assert evicted(broker) == []
        assert chat(broker, LARGE) == 200
        assert evicted(broker) == [("voice", None, "released")]
        assert counts(fakes["ollama"])["spills"] == 0
