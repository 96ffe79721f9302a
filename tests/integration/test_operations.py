"""What an operator asks for: plan, load, unload; and the same from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from gpumanager.cli import main
from gpumanager.gpu.simulated import SimulatedCard
from gpumanager.keys import ApiKey
from tests.support.broker import LiveBroker, live_broker
from tests.support.fake_servers import Running, fake_server
from tests.support.scene import BODIES
from tests.support.sockets import ScriptedConsumer, answer
from tests.support.threads import Outcome, eventually


@pytest.fixture
def card(tmp_path: Path) -> SimulatedCard:
    return SimulatedCard.create(tmp_path / "card.json", 8000)


@pytest.fixture
def voice(card: SimulatedCard) -> Iterator[Running]:
    with fake_server("plain", card.path, "voice", 3000) as running:
        yield running


@pytest.fixture
def ollama(card: SimulatedCard) -> Iterator[Running]:
    with fake_server("ollama", card.path, "ollama", 6000) as running:
        yield running


def config(card: SimulatedCard, voice: Running, ollama: Running, **top: Any) -> str:
    return yaml.safe_dump(
        {
            "gpu": {"device": f"simulated:{card.path}", "sample_interval": 0.2},
            "health_interval": 0.2,
            "routing": {"tts": "voice", "llm": "ollama", "image": "voice"},
            "consumers": {
                "voice": {
                    "url": voice.url,
                    "health": "/health",
                    "paths": {"tts": "/job"},
                    "unload": "/unload",
                    "vram_resident_mib": 3000,
                },
                "ollama": {
                    "preset": "ollama",
                    "model": "llama3:8b",
                    "url": ollama.url,
                    "vram_resident_mib": 6000,
                },
            },
            **top,
        }
    )


@pytest.fixture
def broker(card: SimulatedCard, voice: Running, ollama: Running) -> Iterator[LiveBroker]:
    with live_broker(config(card, voice, ollama)) as broker:
        eventually(lambda: all(c["probed"] for c in broker.get("/v1/status").json()["consumers"]))
        yield broker


def loaded(broker: LiveBroker) -> dict[str, bool]:
    return {c["name"]: c["loaded"] for c in broker.get("/v1/status").json()["consumers"]}


def test_a_plan_acts_on_nothing(broker: LiveBroker) -> None:
    assert broker.post("/v1/tts", json={}).status_code == 200
    plan = broker.get("/v1/plan/llm").json()
    assert plan["consumer"] == "ollama"
    assert (plan["fits"], plan["fits_now"], plan["short_mib"]) == (True, False, 0)
    assert (plan["needed_mib"], plan["held_mib"], plan["free_mib"]) == (6000, 0, 5000)
    (victim,) = plan["victims"]
    assert (victim["consumer"], victim["mib"]) == ("voice", 3000)
    assert victim["why"].startswith("least recently used: idle for")
    assert plan["estimate_ms"]["evict"] == victim["estimate_ms"] == 1000
    assert loaded(broker) == {"voice": True, "ollama": False}


def test_a_plan_that_fits_and_one_that_does_not(broker: LiveBroker, card: SimulatedCard) -> None:
    assert broker.get("/v1/plan/tts").json()["fits_now"] is True
    card.allocate("game", 4000)
    plan = broker.get("/v1/plan/llm").json()
    assert (plan["fits"], plan["victims"], plan["short_mib"]) == (False, [], 2256)


@pytest.mark.parametrize(("kind", "status"), [("stt", 501), ("video", 404)])
def test_a_plan_for_nobody(broker: LiveBroker, kind: str, status: int) -> None:
    assert broker.get(f"/v1/plan/{kind}").status_code == status


def test_an_operator_loads_and_unloads(broker: LiveBroker) -> None:
    broker.post("/v1/tts", json={})
    done = broker.post("/v1/consumers/ollama/load")
    assert (done.status_code, done.json()["loaded"]) == (200, True)
    assert loaded(broker) == {"voice": False, "ollama": True}  # room was made
    done = broker.post("/v1/consumers/ollama/unload").json()
    assert (done["consumer"], done["outcome"], done["mib"]) == ("ollama", "released", 6000)
    assert loaded(broker) == {"voice": False, "ollama": False}


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("nobody/load", 404, "there is no consumer 'nobody'; known: ollama, voice"),
        ("nobody/unload", 404, "there is no consumer"),
        ("voice/load", 501, "it loads with its first job"),
    ],
)
def test_what_cannot_be_done_is_told(
    broker: LiveBroker, path: str, status: int, words: str
) -> None:
    refused = broker.post(f"/v1/consumers/{path}")
    assert refused.status_code == status
    assert words in refused.json()["message"]
    assert broker.get(f"/v1/consumers/{path}").status_code == 405


def test_who_is_pinned_is_never_evicted_until_unpinned(broker: LiveBroker) -> None:
    assert broker.post("/v1/tts", json={}).status_code == 200
    pin = "/v1/consumers/voice/pin"
    assert broker.post(pin).json() == {"consumer": "voice", "pinned": True}
    (voice,) = (c for c in broker.get("/v1/status").json()["consumers"] if c["name"] == "voice")
    assert voice["pinned"] is True
    refused = broker.post("/v1/llm", json={"model": "llama3:8b"})
    assert refused.json()["error"] == "insufficient_vram"
    assert broker.delete(pin).json() == {"consumer": "voice", "pinned": False}
    assert broker.post("/v1/llm", json={"model": "llama3:8b"}).status_code == 200
    happened = [each["event"] for each in broker.get("/v1/events").json()["events"]]
    assert happened.index("pinned") < happened.index("unpinned") < happened.index("evicted")
    assert broker.post("/v1/consumers/nobody/pin").status_code == 404


def test_what_was_learned_can_be_forgotten(broker: LiveBroker) -> None:
    def learned() -> Any:
        consumers = broker.get("/v1/status").json()["consumers"]
        return next(each["learned"] for each in consumers if each["name"] == "voice")

    declared = learned()["needed"]
    assert declared["source"] == "declared"
    broker.broker.learned.ran_out("voice", 7000)
    broker.broker.learned.unloaded("voice", 1.0, 300)
    now = learned()
    assert (now["needed"]["mib"], now["needed"]["source"]) == (7000, "out-of-memory")
    assert now["raised"]["at"] == now["needed"]["at"]
    assert (now["residue"]["mib"], now["residue"]["source"]) == (300, "measured")
    assert now["residue"]["at"] <= broker.get("/v1/status").json()["time"]
    route = "/v1/consumers/voice/learned"
    assert broker.delete(route).json() == {"consumer": "voice", "needed": declared}
    assert learned() == {"needed": declared}
    broker.broker.learned.ran_out("voice", 7000)
    done = CliRunner().invoke(main, ["forget", "voice", "--url", broker.url])
    assert done.exit_code == 0
    assert done.output == f"voice: forgotten; room is made for {declared['mib']} MiB from now on\n"
    assert learned() == {"needed": declared}
    happened = [each["event"] for each in broker.get("/v1/events").json()["events"]]
    assert happened.count("forgotten") == 2
    assert broker.delete("/v1/consumers/nobody/learned").status_code == 404


def test_an_unload_waits_for_the_running_job(broker: LiveBroker, voice: Running) -> None:
    voice.set(job_s=0.5)
    job = Outcome(lambda: broker.post("/v1/tts", json={}).status_code)
    broker.await_line(1)
    unload = Outcome(lambda: broker.post("/v1/consumers/voice/unload").json()["outcome"])
    broker.await_waiting(1)
    (_, waiting) = broker.get("/v1/queue").json()["queue"]
    assert (waiting["kind"], waiting["consumer"]) == ("unload", "voice")
    assert job.result() == 200
    assert unload.result() == "released"


def test_an_operator_who_leaves_waits_no_more(broker: LiveBroker, voice: Running) -> None:
    voice.set(job_s=1.0)
    job = Outcome(lambda: broker.post("/v1/tts", json={}).status_code)
    broker.await_line(1)
    with broker.raw() as client:
        client.request("POST", "/v1/consumers/voice/unload")
        broker.await_waiting(1)
    broker.await_waiting(0)
    assert job.result() == 200
    assert loaded(broker)["voice"]


def test_the_load_of_a_consumer_that_loads_with_its_first_job_is_learned(
    broker: LiveBroker, voice: Running
) -> None:
    voice.set(load_s=0.6)
    for _ in range(4):
        assert broker.post("/v1/tts", json={}).status_code == 200
    (known,) = (
        each["learned"]
        for each in broker.get("/v1/status").json()["consumers"]
        if each["name"] == "voice"
    )
    assert (known["load_ms"]["count"], known["run_ms"]["count"]) == (1, 3)
    assert known["run_ms"]["p50"] < 500 <= known["load_ms"]["p50"]


def test_a_job_that_overstays_says_so_and_so_do_those_behind_it(
    broker: LiveBroker, voice: Running
) -> None:
    for _ in range(4):
        assert broker.post("/v1/tts", json={}).status_code == 200
    voice.set(job_s=20)
    jobs = []
    for count in (1, 2):
        jobs.append(Outcome(lambda: broker.post("/v1/tts", json={}).status_code))
        broker.await_line(count)
    eventually(lambda: broker.get("/v1/queue").json()["queue"][0]["overdue"])
    running, waiting = broker.get("/v1/queue").json()["queue"]
    assert running["run_ms"] > 0
    assert waiting["overdue"]
    assert waiting["estimate_ms"] > 0
    plan = run("plan", "tts", "--url", broker.url).stdout
    assert "takes far longer than usual" in plan
    assert "? " in run("queue", "--url", broker.url).stdout
    for entry in (waiting, running):
        broker.delete(f"/v1/queue/{entry['ticket']}")
    assert [job.result() for job in jobs] == [503, 503]


def test_after_a_restart_estimates_are_what_was_learned(
    card: SimulatedCard, voice: Running, ollama: Running, tmp_path: Path
) -> None:
    text, state = config(card, voice, ollama), tmp_path / "state.json"
    with live_broker(text, state_file=state) as broker:
        voice.set(job_s=0.5)
        for kind in ("tts", "tts", "tts", "llm", "llm"):
            assert broker.post(f"/v1/{kind}", json=BODIES[kind]).status_code == 200
    with live_broker(text, state_file=state) as broker:
        eventually(lambda: loaded(broker) == {"voice": False, "ollama": True})
        jobs = []
        for count in (1, 2, 3):
            jobs.append(Outcome(lambda: broker.post("/v1/tts", json={}).status_code))
            broker.await_line(count)
        *_, last = broker.get("/v1/queue").json()["queue"]
        (usual,) = (
            each["learned"]["run_ms"]
            for each in broker.get("/v1/status").json()["consumers"]
            if each["name"] == "voice"
        )
        assert 500 <= last["run_ms"] <= usual["p95"]
        assert last["estimate_ms"] >= 500
        assert [job.result() for job in jobs] == [200, 200, 200]


def test_who_is_idle_is_unloaded_and_what_is_missed_is_restored(
    card: SimulatedCard, voice: Running, ollama: Running
) -> None:
    text = yaml.safe_load(config(card, voice, ollama, restore_after=1, default_resident=["ollama"]))
    text["consumers"]["voice"]["idle_unload"] = "300ms"
    with live_broker(yaml.safe_dump(text)) as broker:
        broker.post("/v1/tts", json={})
        eventually(lambda: loaded(broker) == {"voice": False, "ollama": True})


# -- the command line ----------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments), env={"GPUMANAGER_URL": None})


def test_plan_on_the_command_line(broker: LiveBroker, card: SimulatedCard) -> None:
    broker.post("/v1/tts", json={})
    result = run("plan", "llm", "--url", broker.url)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "ollama needs 6000 MiB and holds 0; 5000 MiB are free, 256 of them reserved (measured)"
    )
    assert lines[1] == "fits after unloading:"
    assert lines[2].split()[:3] == ["voice", "3000", "MiB"]
    assert lines[3].startswith("estimated: wait 0.0 s, evict 1.0 s")
    as_json = run("plan", "llm", "--json", "--url", broker.url)
    assert json.loads(as_json.stdout)["consumer"] == "ollama"
    assert "fits as it is" in run("plan", "tts", "--url", broker.url).stdout
    card.allocate("game", 4000)
    result = run("plan", "llm", "--url", broker.url)
    assert result.exit_code == 1
    assert "does not fit: 2256 MiB short" in result.stdout


def test_the_command_line_tells_why_it_cannot(broker: LiveBroker) -> None:
    result = run("plan", "stt", "--url", broker.url)
    assert (result.exit_code, result.stderr) == (1, "no consumer routes stt\n")
    result = run("plan", "stt", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stderr) == (
        1,
        "http://127.0.0.1:1 cannot be asked: nobody listens there\n",
    )
    result = run("plan", "video", "--url", broker.url)
    assert result.exit_code == 1
    assert result.stderr.startswith("there is no kind 'video'; there are tts, stt, ")


def test_the_command_line_shows_a_key(card: SimulatedCard, voice: Running, ollama: Running) -> None:
    secret = "a-key-of-enough-characters"
    keys = [ApiKey("alice", secret)]
    with live_broker(config(card, voice, ollama), keys=keys) as broker:
        assert run("plan", "tts", "--url", broker.url).exit_code == 1
        assert run("plan", "tts", "--url", broker.url, "--key", secret).exit_code == 0


def test_something_else_that_listens_is_no_broker() -> None:
    with ScriptedConsumer(lambda peer, _: peer.send(answer(b"hello"))) as other:
        result = run("plan", "tts", "--url", other.url)
    assert result.exit_code == 1
    assert "is no gpumanager" in result.stderr
