"""The fakes of servers with several models do what the real ones do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from gpumanager.gpu.simulated import SimulatedCard
from tests.support.fake_servers import Running, fake_server
from tests.support.threads import Outcome, eventually

SMALL, LARGE = "titles:1b", "coder:20b"
SIZES: dict[str, Any] = {SMALL: {"mib": 1000, "kv_kib": 128}, LARGE: 8000, "middle": 4000}


@pytest.fixture
def card(tmp_path: Path) -> SimulatedCard:
    return SimulatedCard.create(tmp_path / "card.json", 12_000)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def started(stack: ExitStack, kind: str, card: SimulatedCard, **settings: Any) -> Running:
    server = stack.enter_context(fake_server(kind, card.path, kind, SIZES))
    server.set(**{"unload_lag_s": 0.05, **settings})
    return server


def ask(server: Running, path: str, model: str, **more: Any) -> requests.Response:
    return requests.post(server.url + path, json={"model": model, **more}, timeout=20)


def counts(server: Running) -> dict[str, Any]:
    told: dict[str, Any] = server.ask("POST", "/_fake", {})
    return told


def in_ps(server: Running) -> dict[str, tuple[int, int, int]]:
    """By model: size and size_vram in MiB, and context."""
    mib = 1024 * 1024
    return {
        each["name"]: (each["size"] // mib, each["size_vram"] // mib, each["context_length"])
        for each in server.ask("GET", "/api/ps")["models"]
    }


def held(card: SimulatedCard) -> list[int]:
    return sorted(each.mib for each in card.holders())


def test_ollama_keeps_each_model_in_a_process_of_its_own(
    card: SimulatedCard, stack: ExitStack
) -> None:
    ollama = started(stack, "ollama", card)
    assert ask(ollama, "/api/chat", SMALL).status_code == 200
    assert ask(ollama, "/v1/chat/completions", LARGE).json()["choices"]
    assert in_ps(ollama) == {SMALL: (1512, 1512, 4096), LARGE: (8000, 8000, 4096)}
    assert held(card) == [1512, 8000]
    pids = {each.pid for each in card.holders()}
    descendants = {each.pid for each in psutil.Process(ollama.pid).children(recursive=True)}
    assert len(pids) == 2
    assert pids < descendants
    done = ask(ollama, "/api/generate", LARGE, keep_alive=0).json()
    assert done["done_reason"] == "unload"
    assert list(in_ps(ollama)) == [SMALL]
    eventually(lambda: held(card) == [1512])


def test_ollamas_list_is_empty_before_the_memory_is_back(
    card: SimulatedCard, stack: ExitStack
) -> None:
    ollama = started(stack, "ollama", card, unload_lag_s=1.0)
    ask(ollama, "/api/chat", LARGE)
    ask(ollama, "/api/generate", LARGE, keep_alive=0)
    assert in_ps(ollama) == {}
    assert held(card) == [8000]
    eventually(lambda: held(card) == [])


def test_ollama_loads_a_model_anew_for_another_context(
    card: SimulatedCard, stack: ExitStack
) -> None:
    ollama = started(stack, "ollama", card)
    ask(ollama, "/api/chat", SMALL, options={"num_ctx": 32_768})
    assert in_ps(ollama) == {SMALL: (5096, 5096, 32_768)}
    ask(ollama, "/api/chat", SMALL, options={"num_ctx": 32_768})
    assert counts(ollama)["loads"] == 1
    ask(ollama, "/api/chat", SMALL)  # without a word of it: the default again
    assert counts(ollama)["loads_of"] == {SMALL: 2}
    assert held(card) == [1512]


def test_ollama_makes_room_among_its_own_and_then_goes_to_the_cpu(
    card: SimulatedCard, stack: ExitStack
) -> None:
    ollama = started(stack, "ollama", card, overhead_mib=100)
    ask(ollama, "/api/chat", LARGE)
    ask(ollama, "/api/chat", "middle")  # 8100 and 4100 do not fit
    assert in_ps(ollama) == {"middle:latest": (4000, 4000, 4096)}
    assert held(card) == [4100]
    card.allocate("game", 5000)
    ask(ollama, "/api/chat", LARGE)  # half of it fits beside the game, with nobody else there
    assert in_ps(ollama) == {LARGE: (8000, 4000, 4096)}
    assert counts(ollama)["spills_of"] == {LARGE: 1}


def test_ollama_drains_before_it_unloads(card: SimulatedCard, stack: ExitStack) -> None:
    ollama = started(stack, "ollama", card, job_s=0.5)
    chat = Outcome(lambda: ask(ollama, "/api/chat", LARGE).status_code)
    eventually(lambda: held(card) == [8000])
    assert ask(ollama, "/api/generate", LARGE, keep_alive=0).status_code == 200
    assert LARGE in in_ps(ollama)
    assert chat.result() == 200
    eventually(lambda: in_ps(ollama) == {} and held(card) == [])
    assert ask(ollama, "/api/chat", LARGE).status_code == 200  # and loads it again


def test_ollamas_list_blocks_while_a_model_loads(card: SimulatedCard, stack: ExitStack) -> None:
    ollama = started(stack, "ollama", card, load_s=1.0)
    chat = Outcome(lambda: ask(ollama, "/api/chat", LARGE).status_code)
    eventually(lambda: held(card) == [8000])
    with pytest.raises(requests.ReadTimeout):
        requests.get(ollama.url + "/api/ps", timeout=0.2)
    assert chat.result() == 200


def test_ollama_tells_its_models_and_knows_no_others(card: SimulatedCard, stack: ExitStack) -> None:
    ollama = started(stack, "ollama", card)
    tags = ollama.ask("GET", "/api/tags")["models"]
    assert {each["name"]: each["size"] // 1024**2 for each in tags} == {
        SMALL: 1000,
        LARGE: 8000,
        "middle:latest": 4000,
    }
    assert ask(ollama, "/api/chat", "nobody").status_code == 404


def test_localai_shuts_a_backend_down_at_once_and_waits_for_its_job(
    card: SimulatedCard, stack: ExitStack
) -> None:
    localai = started(stack, "localai", card, job_s=0.4)
    speech = Outcome(lambda: ask(localai, "/v1/audio/speech", "middle").status_code)
    eventually(lambda: held(card) == [4000])
    ask(localai, "/v1/chat/completions", SMALL)
    loaded = [each["id"] for each in localai.ask("GET", "/system")["loaded_models"]]
    assert sorted(loaded) == ["middle", SMALL]
    assert ask(localai, "/backend/shutdown", "middle").status_code == 200
    assert held(card) == [1000]
    assert speech.result() == 200
    assert ask(localai, "/backend/shutdown", "middle").status_code == 404


def test_localai_says_what_it_lacks_or_not(card: SimulatedCard, stack: ExitStack) -> None:
    localai = started(stack, "localai", card)
    assert ask(localai, "/v1/chat/completions", LARGE).status_code == 200
    full = ask(localai, "/v1/images/generations", "middle")
    assert full.status_code == 200  # 12,000 in all
    refused = ask(localai, "/v1/chat/completions", SMALL)
    assert (refused.status_code, counts(localai)["out_of_memory_of"]) == (500, {SMALL: 1})
    assert "CUDA out of memory" in refused.json()["error"]["message"]
    localai.set(mute=True)
    refused = ask(localai, "/v1/chat/completions", SMALL)
    assert refused.status_code == 500
    assert "memory" not in refused.text


def test_a_backend_of_localais_may_grow_with_its_jobs(
    card: SimulatedCard, stack: ExitStack
) -> None:
    localai = started(stack, "localai", card)
    localai.set(models={"grows": {"mib": 1000, "grows_mib": 300, "grows_to_mib": 1500}})
    sizes = []
    for _ in range(4):
        ask(localai, "/v1/images/generations", "grows")
        sizes.append(sum(held(card)))
    assert sizes == [1300, 1500, 1500, 1500]


def states(router: Running) -> dict[str, str]:
    rows = router.ask("GET", "/models")["data"]
    return {each["id"]: each["status"]["value"] for each in rows}


def test_the_router_loads_and_unloads_in_its_own_time(
    card: SimulatedCard, stack: ExitStack
) -> None:
    router = started(stack, "llama-router", card, load_s=0.3, unload_lag_s=0.3)
    assert ask(router, "/models/load", LARGE).json() == {"success": True}
    assert states(router)[LARGE] == "loading"
    eventually(lambda: states(router)[LARGE] == "loaded")
    assert ask(router, "/models/load", LARGE).status_code == 400
    assert ask(router, "/models/unload", LARGE).json() == {"success": True}
    assert states(router)[LARGE] == "loaded"
    eventually(lambda: states(router) == dict.fromkeys(SIZES, "unloaded"))
    assert held(card) == []
    assert ask(router, "/models/unload", LARGE).status_code == 400


def test_the_router_aborts_what_works(card: SimulatedCard, stack: ExitStack) -> None:
    router = started(stack, "llama-router", card, job_s=0.5)
    chat = Outcome(lambda: ask(router, "/v1/chat/completions", LARGE).status_code)
    eventually(lambda: held(card) == [8000])
    ask(router, "/models/unload", LARGE)
    assert chat.result() == 500


def test_the_router_has_a_most_and_does_not_say_why_a_load_failed(
    card: SimulatedCard, stack: ExitStack
) -> None:
    router = started(stack, "llama-router", card, models_max=2)
    for model in (SMALL, "middle", LARGE):  # 1512, 4000, and 8000 in the place of the first
        assert ask(router, "/v1/chat/completions", model).status_code == 200
    assert held(card) == [4000, 8000]
    router.set(models_max=4)
    failed = ask(router, "/v1/chat/completions", SMALL)
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == f"model name={SMALL} failed to load"
    assert states(router)[SMALL] == "unloaded"


@pytest.mark.parametrize("kind", ["ollama", "localai", "llama-router"])
def test_what_a_model_holds_ends_with_its_server(kind: str, card: SimulatedCard) -> None:
    with fake_server(kind, card.path, kind, SIZES) as server:
        for model in (SMALL, "middle"):
            ask(server, "/v1/chat/completions", model)
        assert len(held(card)) == 2
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: held(card) == [])
