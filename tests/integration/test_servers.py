"""Whole cycles with faithful fakes of real servers, on a simulated card: probe, job, evict, settle,
reload, with the traps of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from gpumanager.config.presets import filled_in
from gpumanager.consumers.footprint import ENOUGH
from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.host import checkpoint
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import Running, command, fake_server
from tests.support.ports import free_port
from tests.support.threads import Outcome, eventually

KINDS = {"comfyui": "image", "ollama": "llm", "vllm": "llm", "plain": "tts"}


@pytest.fixture
def card(tmp_path: Path) -> SimulatedCard:
    return SimulatedCard.create(tmp_path / "card.json", 10_000, release_lag_s=0.05)


@contextmanager
def box(
    card: SimulatedCard, consumers: dict[str, dict[str, Any]], **top: Any
) -> Iterator[tuple[LiveBroker, dict[str, Running]]]:
    """A broker in front of fakes: by name, with `fake` (its kind; None: one that runs already),
    `mib`, and config keys."""
    with ExitStack() as stack:
        fakes, configured, routing = {}, {}, {}
        for name, settings in consumers.items():
            kind, mib = settings.pop("fake"), settings.pop("mib")
            if kind is not None:
                fakes[name] = stack.enter_context(fake_server(kind, card.path, name, mib))
                settings["url"] = fakes[name].url
            route = settings.pop("kind", KINDS[kind or "plain"])
            defaults: dict[str, Any] = {"preset": kind}
            if "preset" in settings:
                defaults = {}
            elif kind in ("plain", None):
                paths = {route: "/job"}
                defaults = {"health": "/health", "unload": "/unload", "paths": paths}
            configured[name] = {"vram_resident_mib": mib, **defaults, **settings}
            routing[route] = name
        text = yaml.safe_dump(
            {
                "gpu": {
                    "device": f"simulated:{card.path}",
                    "sample_interval": 0.2,
                    "release_timeout": 1,
                },
                "health_interval": 0.2,
                "routing": routing,
                "consumers": configured,
                **top,
            }
        )
        state_file = Path(top["state_file"]) if "state_file" in top else None
        broker = stack.enter_context(live_broker(text, state_file=state_file))
        eventually(lambda: all(c["probed"] for c in broker.get("/v1/status").json()["consumers"]))
        yield broker, fakes


@contextmanager
def detached(start: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server that ends with the block, and so does whatever was started in its place."""
    first = subprocess.Popen(start, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield first
    finally:
        first.kill()
        first.wait(5)
        for child in psutil.Process().children():
            if child.cmdline() == start:
                child.kill()
                child.wait(5)


def status_of(broker: LiveBroker, name: str) -> dict[str, Any]:
    consumers = broker.get("/v1/status").json()["consumers"]
    found: dict[str, Any] = next(each for each in consumers if each["name"] == name)
    return found


def job(broker: LiveBroker, kind: str, body: Any = None) -> Any:
    return broker.post(f"/v1/{kind}", json={} if body is None else body)


# -- Ollama --------------------------------------------------------------------------------------


def test_ollamas_memory_is_waited_for_though_its_list_is_empty_before(
    card: SimulatedCard,
) -> None:
    consumers = {
        "ollama": {"fake": "ollama", "mib": 7000},
        "voice": {"fake": "plain", "mib": 5000},
    }
    with box(card, consumers) as (broker, fakes):
        fakes["ollama"].set(unload_lag_s=0.6)
        assert job(broker, "llm", {"model": "llama3:8b"}).status_code == 200
        eventually(lambda: status_of(broker, "ollama")["gpu_resident_mib"] == 7000)
        assert status_of(broker, "ollama")["resident_source"] == "measured"  # a child holds it
        assert status_of(broker, "ollama")["attribution"] == "processes"
        for _ in range(2):
            assert job(broker, "tts").status_code == 200
            assert job(broker, "llm", {"model": "llama3:8b"}).status_code == 200
        learned = status_of(broker, "ollama")["learned"]
        assert learned["unload_ms"]["p50"] >= 500
        assert learned["peak_mib"] == 7000
        assert broker.get("/v1/status").json()["scheduler"]["evictions"] == 4


def test_ollama_is_given_the_time_that_its_preset_says(card: SimulatedCard) -> None:
    """Longer than the card is given: nothing leaked, and nobody else has to go."""
    consumers = {
        "ollama": {"fake": "ollama", "mib": 6000},
        "voice": {"fake": "plain", "mib": 5000},
    }
    with box(card, consumers) as (broker, fakes):
        fakes["ollama"].set(unload_lag_s=1.5)  # gpu.release_timeout is 1 here
        assert job(broker, "llm", {"model": "llama3:8b"}).status_code == 200
        assert job(broker, "tts").status_code == 200
        assert "quarantine" not in status_of(broker, "ollama")


def test_a_deleted_model_of_ollama_does_not_keep_the_others(
    card: SimulatedCard, caplog: pytest.LogCaptureFixture
) -> None:
    consumers = {
        "ollama": {"fake": "ollama", "mib": 6000},
        "voice": {"fake": "plain", "mib": 5000},
    }
    with box(card, consumers) as (broker, fakes):
        assert job(broker, "llm", {"model": "llama3:8b"}).status_code == 200
        fakes["ollama"].set(deleted="old:7b")
        assert broker.post("/v1/consumers/ollama/unload").json()["outcome"] == "released"
        assert "model not unloaded" in caplog.text
        assert job(broker, "tts").status_code == 200
        assert status_of(broker, "ollama")["gpu_resident_mib"] == 0


def test_a_model_that_went_to_the_cpu_is_reported(
    card: SimulatedCard, caplog: pytest.LogCaptureFixture
) -> None:
    with box(card, {"ollama": {"fake": "ollama", "mib": 3000}}) as (broker, fakes):
        fakes["ollama"].set(needs=14_000)  # the half of it fits
        assert job(broker, "llm", {"model": "llama3:70b"}).status_code == 200
        eventually(lambda: status_of(broker, "ollama").get("on_cpu") == ["llama3:70b"])
        assert "partly on the CPU" in caplog.text
        broker.post("/v1/consumers/ollama/unload")
        assert "on_cpu" not in status_of(broker, "ollama")


# -- ComfyUI -------------------------------------------------------------------------------------

PROMPT = {"prompt": {"1": {"class_type": "KSampler"}}}


def test_comfyui_holds_the_gpu_until_its_render_is_done(card: SimulatedCard) -> None:
    consumers = {
        "comfyui": {"fake": "comfyui", "mib": 6000},
        "voice": {"fake": "plain", "mib": 6000},
    }
    with box(card, consumers) as (broker, fakes):
        fakes["comfyui"].set(paused=True)
        answer = job(broker, "image", PROMPT)
        prompt = answer.json()["prompt_id"]
        assert answer.status_code == 200
        assert broker.stats.in_flight == 1  # the client has its answer, the render goes on
        speech = Outcome(lambda: job(broker, "tts").status_code)
        broker.await_waiting(1)
        fakes["comfyui"].set(paused=False)
        assert speech.result() == 200  # evicted only after the render
        history = fakes["comfyui"].ask("GET", f"/history/{prompt}")
        assert history[prompt]["status"]["status_str"] == "success"
        assert status_of(broker, "comfyui")["gpu_resident_mib"] == 0
        assert broker.get("/v1/status").json()["scheduler"]["out_of_memory"]["seen"] == 0


@pytest.mark.parametrize("another", [True, False])
def test_a_render_from_comfyuis_own_page_is_no_leak(card: SimulatedCard, another: bool) -> None:
    """It takes longer than memory is given to come back (1 s); if somebody else can go, it is
    left alone."""
    consumers: dict[str, dict[str, Any]] = {
        "comfyui": {"fake": "comfyui", "mib": 5000},
        "voice": {"fake": "plain", "mib": 4000},
    }
    if another:
        consumers["small"] = {"fake": "plain", "mib": 3000, "kind": "stt"}
        consumers["voice"]["mib"] = 4500
    else:
        consumers["voice"]["mib"] = 6000
    with box(card, consumers) as (broker, fakes):
        if another:
            assert job(broker, "stt").status_code == 200
        fakes["comfyui"].set(job_s=3)
        prompt = fakes["comfyui"].ask("POST", "/prompt", PROMPT)["prompt_id"]
        eventually(lambda: status_of(broker, "comfyui")["gpu_resident_mib"] == 5000)
        assert job(broker, "tts").status_code == 200
        over = fakes["comfyui"].ask("GET", f"/history/{prompt}") != {}
        assert over is not another
        comfyui = status_of(broker, "comfyui")
        assert "quarantine" not in comfyui
        assert comfyui["gpu_resident_mib"] == (5000 if another else 0)


def test_a_prompt_that_is_refused_holds_nothing(card: SimulatedCard) -> None:
    with box(card, {"comfyui": {"fake": "comfyui", "mib": 6000}}) as (broker, _):
        assert job(broker, "image", {"prompt": {}}).status_code == 400
        broker.await_idle()


def test_a_prompt_deleted_while_pending_gives_the_gpu_back(card: SimulatedCard) -> None:
    with box(card, {"comfyui": {"fake": "comfyui", "mib": 6000}}) as (broker, fakes):
        fakes["comfyui"].set(paused=True)
        prompt = job(broker, "image", PROMPT).json()["prompt_id"]
        fakes["comfyui"].ask("POST", "/queue", {"delete": [prompt]})  # in the queue no more
        broker.await_idle()
        assert fakes["comfyui"].ask("GET", f"/history/{prompt}") == {}


def test_a_render_can_be_cancelled_through_the_line(card: SimulatedCard) -> None:
    with box(card, {"comfyui": {"fake": "comfyui", "mib": 6000}}) as (broker, fakes):
        fakes["comfyui"].set(job_s=600)
        prompt = job(broker, "image", PROMPT).json()["prompt_id"]
        eventually(lambda: fakes["comfyui"].ask("GET", "/queue")["queue_running"] != [])
        (entry,) = broker.get("/v1/queue").json()["queue"]
        assert broker.delete(f"/v1/queue/{entry['ticket']}").status_code == 200
        broker.await_idle()
        history = fakes["comfyui"].ask("GET", f"/history/{prompt}")
        assert history[prompt]["status"]["status_str"] == "error"  # interrupted


def test_a_render_without_end_gives_the_gpu_back_in_time(
    card: SimulatedCard, caplog: pytest.LogCaptureFixture
) -> None:
    timeouts = {"total": 1.0}
    consumers = {"comfyui": {"fake": "comfyui", "mib": 6000, "timeouts": timeouts}}
    with box(card, consumers) as (broker, fakes):
        fakes["comfyui"].set(job_s=600)
        job(broker, "image", PROMPT)
        broker.await_idle()
        assert "still busy" in caplog.text


def test_a_render_that_ran_out_of_memory_is_learned_from(card: SimulatedCard) -> None:
    consumers = {
        "comfyui": {"fake": "comfyui", "mib": 4000},
        "voice": {"fake": "plain", "mib": 3000},
    }
    with box(card, consumers) as (broker, fakes):
        assert job(broker, "tts").status_code == 200
        fakes["comfyui"].set(needs=8000)
        job(broker, "image", PROMPT)
        broker.await_idle()
        failures = broker.get("/v1/status").json()["scheduler"]["out_of_memory"]
        assert failures == {"seen": 1, "healed": 0}  # its answer had gone out
        # 3000 of 10,000 were the voice's, so 7000 was not enough.
        needed = status_of(broker, "comfyui")["learned"]["needed"]
        assert (needed["mib"], needed["source"]) == (7000, "out-of-memory")
        job(broker, "image", PROMPT)
        broker.await_idle()
        failures = broker.get("/v1/status").json()["scheduler"]["out_of_memory"]
        assert failures == {"seen": 1, "healed": 0}
        assert not status_of(broker, "voice")["loaded"]


# -- vLLM ----------------------------------------------------------------------------------------


def test_vllm_is_put_to_sleep_and_woken_before_its_job(card: SimulatedCard) -> None:
    settled = {"path": "/is_sleeping", "until": "is_sleeping == `true`", "timeout": 1}
    consumers: dict[str, dict[str, Any]] = {
        "vllm": {"fake": "vllm", "mib": 7000, "settled": settled},
        "voice": {"fake": "plain", "mib": 6000},
    }
    with box(card, consumers) as (broker, fakes):
        for _ in range(2):
            assert job(broker, "tts").status_code == 200
            assert fakes["vllm"].ask("GET", "/is_sleeping") == {"is_sleeping": True}
            assert status_of(broker, "vllm")["gpu_resident_mib"] == 1200
            # Asleep it would queue the job for ever.
            assert job(broker, "llm").status_code == 200
        # What it still keeps when a release had its time is known, and not promised again.
        assert job(broker, "tts").status_code == 200
        eventually(lambda: status_of(broker, "vllm")["learned"].get("residue_mib") == 1200)
        assert job(broker, "llm").status_code == 200
        eventually(lambda: broker.get("/v1/plan/tts").json()["victims"][0]["mib"] == 5800)


# -- SGLang --------------------------------------------------------------------------------------


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def killed(folder: Path) -> Path:
    """What a broker that is killed now leaves behind."""
    state = folder / "state.json"
    eventually(lambda: state.exists() and "sglang" in json.loads(state.read_text())["unloaded"])
    left = folder / "left.json"
    left.write_bytes(state.read_bytes())
    return left


@pytest.mark.parametrize("replaced", [False, True])
def test_sglang_is_woken_after_a_restart_of_the_broker(
    card: SimulatedCard, tmp_path: Path, replaced: bool
) -> None:
    """Only if it still sleeps: neither way it says so, and either way it would end."""
    with ExitStack() as stack:
        port = free_port()
        start = [*command("sglang", card.path, "sglang", 6000, port), "detached"]
        server = stack.enter_context(detached(start))
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: answers(url + "/get_model_info"))
        sglang = {"fake": None, "mib": 6000, "url": url, "kind": "llm", "preset": "sglang"}

        def consumers() -> dict[str, dict[str, Any]]:
            return {"sglang": dict(sglang), "voice": {"fake": "plain", "mib": 6000}}

        with box(card, consumers(), state_file=str(tmp_path / "state.json")) as (broker, _):
            assert job(broker, "llm").status_code == 200
            assert job(broker, "tts").status_code == 200
            left = killed(tmp_path)
        if replaced:
            server.kill()
            server.wait(5)
            stack.enter_context(detached(start))
            eventually(lambda: answers(url + "/get_model_info"))
        with box(card, consumers(), state_file=str(left)) as (broker, _):
            assert status_of(broker, "sglang")["loaded"] is replaced
            assert job(broker, "llm").status_code == 200


# -- releases in two steps ------------------------------------------------------------------------


def test_a_release_in_two_steps_is_believed_when_it_is_over(card: SimulatedCard) -> None:
    consumers = {
        "slow": {"fake": "plain", "mib": 7000},
        "big": {"fake": "plain", "mib": 6000, "kind": "llm"},
    }
    gpu = {"device": f"simulated:{card.path}", "sample_interval": 0.2, "release_timeout": 5}
    with box(card, consumers, gpu=gpu) as (broker, fakes):
        fakes["slow"].set(steps=[0.2, 1.2])
        for _ in range(2):
            assert job(broker, "tts").status_code == 200
            assert job(broker, "llm").status_code == 200
        assert status_of(broker, "slow")["learned"].get("residue_mib") in (None, 0)


# -- checkpoints ---------------------------------------------------------------------------------

DRIVER = """
import json, sys, urllib.request
what = sys.argv[2]
body = {} if what == "state" else {"suspended": what == "suspend"}
request = urllib.request.Request(sys.argv[1] + "/_fake", json.dumps(body).encode())
running = json.load(urllib.request.urlopen(request))["running"]
print("running" if running else "stopped")
"""


@pytest.fixture
def suspendable(
    card: SimulatedCard, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[LiveBroker, dict[str, Running]]]:
    """A consumer whose process is suspended to evict it, and another one; in place of the
    driver, the process itself is told."""
    consumers: dict[str, dict[str, Any]] = {
        "still": {"fake": "plain", "mib": 6000, "evict": [{"checkpoint": True}]},
        "other": {"fake": "plain", "mib": 6000, "kind": "llm"},
    }
    with box(card, consumers) as (broker, fakes):
        helper = [sys.executable, "-c", DRIVER, fakes["still"].url]
        monkeypatch.setattr(checkpoint, "HELPER", helper)
        yield broker, fakes


def probes_of(broker: LiveBroker, name: str, count: int) -> None:
    """Return after so many more probes."""
    seen = {status_of(broker, name)["last_probe"]}

    def enough() -> bool:
        seen.add(status_of(broker, name)["last_probe"])
        return len(seen) > count

    eventually(enough)


def test_a_suspended_process_that_answers_its_health_is_restored_before_its_job(
    suspendable: tuple[LiveBroker, dict[str, Running]],
) -> None:
    broker, _ = suspendable
    assert job(broker, "tts").status_code == 200
    assert job(broker, "llm").status_code == 200
    probes_of(broker, "still", 3)
    still = status_of(broker, "still")
    assert (still["stopped_by"], still["loaded"]) == ("checkpoint", False)
    assert job(broker, "tts").status_code == 200
    assert "stopped_by" not in status_of(broker, "still")


def test_a_suspended_process_that_somebody_else_resumed_is_back(
    suspendable: tuple[LiveBroker, dict[str, Running]],
) -> None:
    broker, fakes = suspendable
    assert job(broker, "tts").status_code == 200
    assert job(broker, "llm").status_code == 200
    broker.post("/v1/consumers/other/unload")
    fakes["still"].set(suspended=False)
    eventually(lambda: "stopped_by" not in status_of(broker, "still"))
    assert status_of(broker, "still")["loaded"]


# -- out of memory -------------------------------------------------------------------------------


def test_a_job_that_ran_out_of_memory_is_healed(card: SimulatedCard) -> None:
    consumers = {
        "voice": {"fake": "plain", "mib": 3000},
        "small": {"fake": "plain", "mib": 4000, "kind": "stt"},
    }
    with box(card, consumers) as (broker, fakes):
        assert job(broker, "stt").status_code == 200
        fakes["voice"].set(needs=8000)  # far more than declared: the room made is too small
        answer = job(broker, "tts")
        assert (answer.status_code, answer.json()) == (200, {"done_by": "voice"})
        failures = broker.get("/v1/status").json()["scheduler"]["out_of_memory"]
        assert failures == {"seen": 1, "healed": 1}
        assert not status_of(broker, "small")["loaded"]
        # It is known now: the next time room is made at once.
        assert job(broker, "stt").status_code == 200
        assert job(broker, "tts").status_code == 200
        failures = broker.get("/v1/status").json()["scheduler"]["out_of_memory"]
        assert failures == {"seen": 1, "healed": 1}


def test_with_nobody_to_make_room_the_failure_passes(card: SimulatedCard) -> None:
    with box(card, {"voice": {"fake": "plain", "mib": 3000}}) as (broker, fakes):
        fakes["voice"].set(needs=11_000)
        answer = job(broker, "tts")
        assert answer.status_code == 500
        assert "CUDA out of memory" in answer.json()["error"]
        failures = broker.get("/v1/status").json()["scheduler"]["out_of_memory"]
        assert failures == {"seen": 1, "healed": 0}
        # It was alone on the card: nothing that could be learned from it would help.
        learned = status_of(broker, "voice")["learned"]
        assert learned["needed"] == {"mib": 3000, "source": "declared"}


def test_it_is_never_tried_a_third_time(card: SimulatedCard) -> None:
    consumers = {
        "voice": {"fake": "plain", "mib": 3000},
        "small": {"fake": "plain", "mib": 4000, "kind": "stt"},
    }
    with box(card, consumers) as (broker, fakes):
        job(broker, "stt")
        fakes["voice"].set(needs=11_000)
        assert job(broker, "tts").status_code == 500
        failures = broker.get("/v1/status").json()["scheduler"]["out_of_memory"]
        assert failures == {"seen": 2, "healed": 0}


def test_healing_can_be_switched_off_and_is_learned_from_all_the_same(
    card: SimulatedCard,
) -> None:
    consumers = {
        "voice": {"fake": "plain", "mib": 3000, "oom": {"retry": False}},
        "small": {"fake": "plain", "mib": 6200, "kind": "stt"},
    }
    with box(card, consumers) as (broker, fakes):
        job(broker, "stt")
        fakes["voice"].set(needs=3900)
        assert job(broker, "tts").status_code == 500
        assert job(broker, "tts").status_code == 200


@pytest.mark.parametrize("per_process", [True, False])
def test_requests_that_can_never_fit_do_no_harm_to_those_that_do(
    card: SimulatedCard, per_process: bool, tmp_path: Path
) -> None:
    """Beside a desktop; also after a restart."""
    card.allocate("desktop", 600)
    card.misbehave(per_process=per_process)
    state = str(tmp_path / "state.json")

    def consumers() -> dict[str, dict[str, Any]]:
        return {
            "voice": {"fake": "plain", "mib": 6000},
            "small": {"fake": "plain", "mib": 2000, "kind": "stt"},
        }

    with box(card, consumers(), state_file=state) as (broker, fakes):
        for _ in range(4):
            assert job(broker, "stt").status_code == 200
            fakes["voice"].set(needs=20_000)
            assert job(broker, "tts").status_code == 500
    for _ in range(2):
        with box(card, consumers(), state_file=state) as (broker, fakes):
            for _ in range(2):
                assert job(broker, "stt").status_code == 200
                assert job(broker, "tts").status_code == 200
            assert status_of(broker, "voice")["learned"]["needed"]["mib"] == 6000
            assert failures_of(broker) == {"seen": 0, "healed": 0}
            assert broker.stats.evictions == 0


@pytest.mark.parametrize("declared", [12_000, 0])
def test_alone_on_the_card_a_job_is_tried_whatever_is_declared(
    card: SimulatedCard, declared: int
) -> None:
    card.allocate("desktop", 600)
    consumers = {
        "voice": {"fake": "plain", "mib": 6000, "vram_resident_mib": declared},
        "small": {"fake": "plain", "mib": 4500, "kind": "stt"},
    }
    with box(card, consumers) as (broker, _):
        for _ in range(2):
            assert job(broker, "stt").status_code == 200
            assert job(broker, "tts").status_code == 200
        failures = broker.get("/v1/status").json()["scheduler"]["out_of_memory"]
        assert failures == ({"seen": 0, "healed": 0} if declared else {"seen": 1, "healed": 1})


def test_with_nothing_declared_and_nobody_to_measure_it_what_was_too_little_is_learned(
    card: SimulatedCard,
) -> None:
    card.misbehave(per_process=False)
    mute = {"vram_resident_mib": 0, "health": "/quiet", "oom": {"retry": False}}
    consumers = {
        "voice": {"fake": "plain", "mib": 6000, **mute},
        "small": {"fake": "plain", "mib": 4500, "kind": "stt"},
    }
    with box(card, consumers) as (broker, _):
        assert job(broker, "stt").status_code == 200
        assert job(broker, "tts").status_code == 500
        # It held nothing, and 5500 were free.
        needed = status_of(broker, "voice")["learned"]["needed"]
        assert (needed["mib"], needed["source"]) == (5500, "out-of-memory")
        assert job(broker, "tts").status_code == 200


def failures_of(broker: LiveBroker) -> Any:
    return broker.get("/v1/status").json()["scheduler"]["out_of_memory"]


def test_a_clients_words_unload_nobody(card: SimulatedCard) -> None:
    consumers = {
        "voice": {"fake": "plain", "mib": 3000},
        "small": {"fake": "plain", "mib": 4000, "kind": "stt"},
    }
    with box(card, consumers) as (broker, fakes):
        assert job(broker, "stt").status_code == 200
        for status, text in (
            (400, "CUDA out of memory"),
            (500, "model 'CUDA out of memory' unknown"),
        ):
            fakes["voice"].set(answer=[status, {"error": text}])
            assert job(broker, "tts", {"model": "CUDA out of memory"}).status_code == status
        assert failures_of(broker) == {"seen": 0, "healed": 0}
        assert status_of(broker, "small")["loaded"]


@pytest.mark.parametrize("job_s", [0.0, 600.0])
def test_the_words_of_a_prompt_in_comfyuis_history_are_no_failure(
    card: SimulatedCard, job_s: float
) -> None:
    """Neither of a render that went well, nor of one that failed for another reason."""
    prompt = {"prompt": {"1": {"class_type": "KSampler", "text": "CUDA out of memory"}}}
    consumers = {
        "comfyui": {"fake": "comfyui", "mib": 3000},
        "voice": {"fake": "plain", "mib": 3000},
    }
    with box(card, consumers) as (broker, fakes):
        assert job(broker, "tts").status_code == 200
        fakes["comfyui"].set(job_s=job_s)
        name = job(broker, "image", prompt).json()["prompt_id"]
        if job_s:
            eventually(lambda: fakes["comfyui"].ask("GET", "/queue")["queue_running"] != [])
            fakes["comfyui"].ask("POST", "/interrupt", {"prompt_id": name})
        broker.await_idle()
        assert "CUDA out of memory" in str(fakes["comfyui"].ask("GET", f"/history/{name}"))
        assert failures_of(broker) == {"seen": 0, "healed": 0}


@pytest.mark.parametrize("per_process", [True, False])
def test_where_the_card_has_plenty_of_room_a_lack_of_memory_is_not_believed(
    card: SimulatedCard, per_process: bool, caplog: pytest.LogCaptureFixture
) -> None:
    card.misbehave(per_process=per_process)
    consumers = {
        "voice": {"fake": "plain", "mib": 2000},
        "small": {"fake": "plain", "mib": 2500, "kind": "stt"},
    }
    with box(card, consumers) as (broker, fakes):
        assert job(broker, "stt").status_code == 200
        fakes["voice"].set(answer=[500, {"error": "CUDA out of memory on cuda:1"}])
        assert job(broker, "tts").status_code == 500  # 7500 were free
        assert failures_of(broker) == {"seen": 0, "healed": 0}
        assert status_of(broker, "small")["loaded"]
        assert status_of(broker, "voice")["learned"]["needed"]["source"] == "declared"
        assert "out of memory not believed" in caplog.text


# -- declarations that are wrong, or not for this card -------------------------------------------


def test_a_declaration_three_times_too_high_is_learned_down(card: SimulatedCard) -> None:
    consumers: dict[str, dict[str, Any]] = {
        "voice": {"fake": "plain", "mib": 2000, "vram_resident_mib": 6000},
        "small": {"fake": "plain", "mib": 3500, "kind": "stt"},
        "other": {"fake": "plain", "mib": 3500, "kind": "llm"},
    }
    with box(card, consumers) as (broker, _):
        for _ in range(10):
            for kind in ("tts", "stt", "llm"):
                assert job(broker, kind).status_code == 200
        assert broker.stats.evictions <= ENOUGH
        needed = status_of(broker, "voice")["learned"]["needed"]
        assert (needed["mib"], needed["source"]) == (2000, "measured")
        assert failures_of(broker) == {"seen": 0, "healed": 0}


def test_one_that_runs_on_the_cpu_evicts_nobody_for_long(card: SimulatedCard) -> None:
    consumers: dict[str, dict[str, Any]] = {
        "voice": {"fake": "plain", "mib": 6000},
        "small": {"fake": "plain", "mib": 5000, "kind": "stt"},
    }
    with box(card, consumers) as (broker, fakes):
        fakes["voice"].set(needs=0)
        for _ in range(10):
            for kind in ("tts", "stt"):
                assert job(broker, kind).status_code == 200
        assert broker.stats.evictions <= ENOUGH
        assert status_of(broker, "voice")["learned"]["needed"]["mib"] == 0
        fakes["voice"].set(needs=6000)  # it moves to this card
        for _ in range(3):
            for kind in ("tts", "stt"):
                assert job(broker, kind).status_code == 200
        assert failures_of(broker) == {"seen": 1, "healed": 1}


def test_what_fits_only_with_the_cpus_help_is_not_learned_as_enough(card: SimulatedCard) -> None:
    with box(card, {"ollama": {"fake": "ollama", "mib": 8000}}) as (broker, fakes):
        fakes["ollama"].set(needs=14_000)  # the half of it fits
        for _ in range(2 * ENOUGH):
            assert job(broker, "llm", {"model": "llama3:70b"}).status_code == 200
        eventually(lambda: "on_cpu" in status_of(broker, "ollama"))
        eventually(
            lambda: (
                status_of(broker, "ollama")["learned"]["needed"]
                == {"mib": 8000, "source": "declared"}
            )
        )


def test_what_an_elastic_one_fills_is_not_made_room_for(card: SimulatedCard) -> None:
    consumers: dict[str, dict[str, Any]] = {
        "comfyui": {"fake": "comfyui", "mib": 4000},
        "voice": {"fake": "plain", "mib": 3000, "max_mib": 3500},
        "small": {"fake": "plain", "mib": 3000, "kind": "stt"},
    }
    with box(card, consumers) as (broker, fakes):
        fakes["comfyui"].set(needs=9000)
        fakes["voice"].set(needs=9000)
        for kind, body in (("image", PROMPT), ("tts", None)):
            for _ in range(ENOUGH):
                job(broker, kind, body)
                broker.await_idle()
        assert status_of(broker, "comfyui")["learned"]["peak_mib"] == 9000
        assert status_of(broker, "comfyui")["learned"]["needed"]["mib"] == 4000
        assert status_of(broker, "voice")["learned"]["needed"] == {
            "mib": 3500,
            "source": "declared",
        }


# -- leaks, thefts, foreigners -------------------------------------------------------------------


def test_one_that_leaks_is_quarantined_and_the_next_goes(card: SimulatedCard) -> None:
    consumers = {
        "leaky": {"fake": "plain", "mib": 4000},
        "small": {"fake": "plain", "mib": 3000, "kind": "stt"},
        "big": {"fake": "plain", "mib": 5500, "kind": "llm"},
    }
    with box(card, consumers) as (broker, _):
        job(broker, "tts")
        job(broker, "stt")
        card.misbehave(leaks={"leaky": 1.0})
        assert job(broker, "llm").status_code == 200
        assert "gave back 0 of 4000 MiB after http" in status_of(broker, "leaky")["quarantine"]
        assert not status_of(broker, "small")["loaded"]


@pytest.mark.usefixtures("impatient")
def test_after_a_leak_nobody_goes_in_vain_and_the_refusal_names_it(card: SimulatedCard) -> None:
    consumers = {
        "leaky": {"fake": "plain", "mib": 4000},
        "small": {"fake": "plain", "mib": 3000, "kind": "stt"},
        "big": {"fake": "plain", "mib": 8000, "kind": "llm"},
    }
    with box(card, consumers) as (broker, _):
        job(broker, "tts")
        job(broker, "stt")
        card.misbehave(leaks={"leaky": 1.0})
        answer = job(broker, "llm")
        assert answer.status_code == 503
        message = answer.json()["message"]
        assert "leaky was unloaded, but gave nothing back" in message
        assert "leaky 4000 MiB" in message
        assert status_of(broker, "small")["loaded"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's job waits for memory that is overdue."""
    monkeypatch.setattr("gpumanager.residency.census.LATE_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_vllm_that_was_slow_once_is_asked_again(card: SimulatedCard) -> None:
    """It keeps more than a bare process, which is no reason to stay in quarantine."""
    settled = {"path": "/is_sleeping", "until": "is_sleeping == `true`", "timeout": 0.5}
    consumers: dict[str, dict[str, Any]] = {
        "vllm": {"fake": "vllm", "mib": 7000, "settled": settled},
        "voice": {"fake": "plain", "mib": 6000},
    }
    with box(card, consumers) as (broker, fakes):
        fakes["vllm"].set(sleep_lag_s=2)  # gpu.release_timeout is 1 here
        assert job(broker, "tts").status_code == 503
        assert "gave back 0 of 7000 MiB" in status_of(broker, "vllm")["quarantine"]
        eventually(lambda: "quarantine" not in status_of(broker, "vllm"))
        fakes["vllm"].set(sleep_lag_s=0)
        for kind in ("tts", "llm", "tts"):
            assert job(broker, kind).status_code == 200


def test_vllm_asleep_is_not_asked_to_sleep_again(card: SimulatedCard) -> None:
    """It keeps more than a bare process; the other one goes."""
    consumers = {
        "vllm": {"fake": "vllm", "mib": 5000},
        "voice": {"fake": "plain", "mib": 3000},
        "big": {"fake": "plain", "mib": 8000, "kind": "image"},
    }
    with box(card, consumers) as (broker, fakes):
        fakes["vllm"].ask("POST", "/sleep?level=1&mode=wait")  # by its own user, say
        eventually(lambda: not status_of(broker, "vllm")["loaded"])
        assert job(broker, "tts").status_code == 200
        assert job(broker, "image").status_code == 200
        assert "quarantine" not in status_of(broker, "vllm")


def test_one_that_leaks_is_ended_by_its_next_method_and_started_again(
    card: SimulatedCard,
) -> None:
    port = free_port()
    start = [*command("plain", card.path, "leaky", 4000, port), "detached"]
    with detached(start) as first:
        evict = ["http", {"signal": "TERM", "grace": 2, "start": start}]
        url = f"http://127.0.0.1:{port}"
        consumers: dict[str, dict[str, Any]] = {
            "leaky": {"fake": None, "mib": 4000, "url": url, "evict": evict, "ready_timeout": 10},
            "big": {"fake": "plain", "mib": 7000, "kind": "llm"},
        }
        with box(card, consumers) as (broker, _):
            eventually(lambda: status_of(broker, "leaky")["healthy"])
            assert job(broker, "tts").status_code == 200
            card.misbehave(leaks={"leaky": 1.0})
            assert job(broker, "llm").status_code == 200
            assert first.wait(5) != 0
            leaky = status_of(broker, "leaky")
            assert leaky["stopped_by"] == "signal"
            assert "quarantine" not in leaky
            # A job of it starts it again.
            assert job(broker, "tts").status_code == 200
            leaky = status_of(broker, "leaky")
            assert "stopped_by" not in leaky
            assert leaky["healthy"]


def test_a_foreigner_on_the_card_is_named(card: SimulatedCard) -> None:
    card.allocate("game", 5000)
    with box(card, {"voice": {"fake": "plain", "mib": 3000}}) as (broker, _):
        eventually(lambda: "foreign" in broker.get("/v1/status").json()["gpu"])
        gpu = broker.get("/v1/status").json()["gpu"]
        assert gpu["attribution"] == {"source": "processes"}
        (foreign,) = gpu["foreign"]
        assert (foreign["pid"], foreign["mib"]) == (os.getpid(), 5000)
        assert foreign["name"]


def test_without_figures_per_process_the_totals_have_to_do(card: SimulatedCard) -> None:
    consumers = {
        "voice": {"fake": "plain", "mib": 6000},
        "big": {"fake": "plain", "mib": 6000, "kind": "llm"},
    }
    card.misbehave(per_process=False)
    with box(card, consumers) as (broker, _):
        for kind in ("tts", "llm", "tts"):
            assert job(broker, kind).status_code == 200
        gpu = broker.get("/v1/status").json()["gpu"]
        assert gpu["attribution"]["source"] == "totals"
        assert "per process" in gpu["attribution"]["reason"]
        assert gpu["foreign"] == []
        eventually(lambda: status_of(broker, "voice")["resident_source"] == "reported")
        assert status_of(broker, "voice")["attribution"] == "totals"


# -- growth and leaks ----------------------------------------------------------------------------


def seen_at_rest(broker: LiveBroker, jobs: int, **growth: Any) -> None:
    """Wait until the sampler has seen what it holds after so many jobs since its load."""
    seen = {"jobs": jobs, **growth}
    eventually(lambda: seen.items() <= status_of(broker, "leaky")["growth"].items())


def test_a_leak_is_shown_and_an_unload_frees_it(card: SimulatedCard) -> None:
    consumers = {"leaky": {"fake": "plain", "mib": 3000}, "good": {"fake": "vllm", "mib": 4000}}
    with box(card, consumers) as (broker, fakes):
        fakes["leaky"].set(leaks_mib=20)
        for number in range(1, 43):
            assert job(broker, "tts").status_code == 200
            seen_at_rest(broker, number)
        growth = status_of(broker, "leaky")["growth"]
        assert (growth["verdict"], growth["over"], growth["mib_per_job"]) == ("leaks", "jobs", 20)
        assert (growth["fresh_mib"], growth["grown_mib"]) == (3020, 41 * 20)
        assert status_of(broker, "good")["growth"]["verdict"] != "leaks"
        events = broker.get("/v1/events").json()["events"]
        (told,) = [each for each in events if each["event"] == "leaking"]
        assert (told["consumer"], told["each_mib"], told["level"]) == ("leaky", 20, "warning")
        metrics = broker.get("/metrics").text
        assert 'gpumanager_consumer_leaks{consumer="leaky"} 1.0' in metrics
        assert 'gpumanager_consumer_grown_bytes{consumer="leaky"} 8.5983232e+08' in metrics
        assert broker.post("/v1/consumers/leaky/unload").json()["outcome"] == "released"
        eventually(lambda: status_of(broker, "leaky")["growth"]["grown_mib"] == 0)
        assert status_of(broker, "leaky")["growth"]["verdict"] == "leaks"  # it is the same server


def test_what_unloads_leave_behind_more_and_more_is_a_leak(card: SimulatedCard) -> None:
    with box(card, {"leaky": {"fake": "plain", "mib": 3000}}) as (broker, fakes):
        fakes["leaky"].set(leaves_mib=50)
        for number in range(1, 8):
            assert job(broker, "tts").status_code == 200
            seen_at_rest(broker, 1, fresh_mib=3000 + 50 * (number - 1))
            broker.post("/v1/consumers/leaky/unload")
        seen_at_rest(broker, 0, mib_per_load=50)
        assert status_of(broker, "leaky")["growth"]["over"] == "loads"


def test_what_one_can_give_back_while_loaded_comes_before_an_unload(card: SimulatedCard) -> None:
    """`plan` says so before, and the trimmed one needs no reload after."""
    consumers = {
        "leaky": {"fake": "plain", "mib": 3000, "trim": "/trim", "pinned": True},
        "small": {"fake": "plain", "mib": 2000, "kind": "stt"},
        "big": {"fake": "plain", "mib": 4000, "kind": "llm"},
    }
    with box(card, consumers) as (broker, fakes):
        assert job(broker, "stt").status_code == 200
        assert job(broker, "tts").status_code == 200
        seen_at_rest(broker, 1, fresh_mib=3000)
        fakes["leaky"].set(caches_mib=1500)
        assert job(broker, "tts").status_code == 200
        seen_at_rest(broker, 2, grown_mib=1500, trims_to_mib=3000)
        (victim,) = broker.get("/v1/plan/llm").json()["victims"]
        assert (victim["consumer"], victim["method"], victim["mib"]) == ("leaky", "trim", 1500)
        assert job(broker, "llm").status_code == 200
        assert all(status_of(broker, name)["loaded"] for name in ("leaky", "small", "big"))
        assert status_of(broker, "leaky")["gpu_resident_mib"] == 3000
        assert broker.stats.evictions == 0
        (told,) = [
            each for each in broker.get("/v1/events").json()["events"] if each["event"] == "trimmed"
        ]
        assert (told["consumer"], told["target"], told["mib"]) == ("leaky", "big", 1500)
        metrics = broker.get("/metrics").text
        assert 'gpumanager_trims_total{consumer="leaky",outcome="released"} 1.0' in metrics
        assert 'gpumanager_trimmed_bytes_total{consumer="leaky"} 1.572864e+09' in metrics


def test_comfyuis_free_is_no_trim(card: SimulatedCard) -> None:
    """With `free_memory` alone it unloads its models as well, so the preset does without."""
    assert filled_in({"preset": "comfyui"}).get("trim") is None
    with fake_server("comfyui", card.path, "comfyui", 5000) as comfyui:
        prompt = {"prompt": {"1": {"class_type": "KSampler"}}}
        comfyui.ask("POST", "/prompt", prompt)
        eventually(lambda: card.memory().used_mib == 5000)
        comfyui.ask("POST", "/free", {"free_memory": True})
        eventually(lambda: card.memory().used_mib == 0)


def test_before_a_job_runs_a_second_time_all_give_back_what_they_can(card: SimulatedCard) -> None:
    consumers = {
        "leaky": {"fake": "plain", "mib": 3000, "trim": "/trim", "pinned": True},
        "big": {"fake": "plain", "mib": 4000, "kind": "llm"},
    }
    with box(card, consumers) as (broker, fakes):
        assert job(broker, "tts").status_code == 200
        seen_at_rest(broker, 1, fresh_mib=3000)
        fakes["leaky"].set(caches_mib=2500)
        assert job(broker, "tts").status_code == 200
        seen_at_rest(broker, 2, trims_to_mib=3000)
        fakes["big"].set(needs=6000)
        assert job(broker, "llm").status_code == 200
        assert failures_of(broker) == {"seen": 1, "healed": 1}
        assert status_of(broker, "leaky")["gpu_resident_mib"] == 3000
