"""Parts of setup and doctor by themselves: fingerprints, managers, findings, views."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from gpumanager.cli import top, views
from gpumanager.config import parse_config, presets
from gpumanager.model import GpuProcess, Holdings, MemoryReading
from gpumanager.setup import diagnosis
from gpumanager.setup.brokers import RunningBroker, Stranger
from gpumanager.setup.configfile import propose
from gpumanager.setup.discovery import Found, Manager, _manager, _mib
from gpumanager.setup.services import known_services
from gpumanager.setup.userservice import UserService, _quoted
from tests.gpu.test_attribution import FakeProcesses

ANSWERS = Path(__file__).parent.parent / "config" / "answers"
SERVICES = {service.service: service for service in known_services()}


def test_every_preset_is_known_to_setup() -> None:
    assert {each.preset for each in known_services() if each.preset} == set(presets.names())


def test_every_service_makes_a_valid_consumer_that_serves_its_kind() -> None:
    for service in known_services():
        consumer: dict[str, Any] = {"url": "http://127.0.0.1:1", **service.config}
        if service.preset:
            consumer["preset"] = service.preset
        parsed = parse_config(yaml.safe_dump({"consumers": {"it": consumer}}))
        assert service.kind in parsed.consumers["it"].paths, service.service


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("ollama", b"Ollama is running"),
        ("comfyui", b'{"system": {"python_version": "3.12"}, "devices": [{"name": "cuda:0"}]}'),
        ("vllm", b'{"data": [{"id": "m", "owned_by": "vllm"}]}'),
        ("sglang", b'{"data": [{"id": "m", "owned_by": "sglang"}]}'),
        ("koboldcpp", b'{"result": "KoboldCpp", "version": "1.90"}'),
        ("triton", b'{"name": "triton", "version": "2.50"}'),
        ("kokoro", b'{"info": {"title": "Kokoro TTS API"}}'),
        ("llama-swap", b'{"running": []}'),
        ("whispercpp", b"<h1>Whisper.cpp Server</h1>"),
        ("tgi", b'{"model_id": "m", "max_total_tokens": 4096}'),
        ("tei", b'{"model_id": "m", "model_type": {"embedding": {}}}'),
        ("lmstudio", b'{"models": [{"key": "m", "loaded_instances": []}]}'),
        ("lemonade", b'{"status": "ok", "all_models_loaded": []}'),
        ("docker-model-runner", b'{"llama.cpp": "running", "vllm": "not installed"}'),
        ("xinference", b'{"version": "4.1.0", "full-revisionid": "1a2b"}'),
        ("mistralrs", b'{"data": [{"id": "default", "owned_by": "local"}, {"id": "m"}]}'),
        ("sdcpp", b'{"data": [{"id": "sd-cpp-local", "owned_by": "local"}]}'),
        ("sdnext", b'{"app": "sd.next", "version": "2026-09-01"}'),
        ("swarmui", b"<title>SwarmUI</title>"),
        ("faster-whisper-server", b'{"info": {"title": "faster-whisper-server"}}'),
        ("chatterbox", b'{"info": {"title": "Chatterbox TTS Server"}}'),
        ("piper", b'{"joe": {"audio": {"sample_rate": 22050}, "espeak": {"voice": "en"}}}'),
        ("mvoice", b'{"loaded": true, "gpu_resident_mib": 2800}'),
    ],
)
def test_a_server_is_known_by_its_own_answer(name: str, answer: bytes) -> None:
    service = SERVICES[name]
    assert service.is_it(answer)
    others = [each for each in known_services() if each.ask == service.ask and each != service]
    assert not any(other.is_it(answer) for other in others)


@pytest.mark.parametrize(
    "answer", [b"", b"null", b"[]", b"{}", b"<html>", b"\xff\xfe", b"[" * 5000]
)
def test_other_answers_are_nobodys(answer: bytes) -> None:
    assert not any(service.is_it(answer) for service in known_services())


@pytest.mark.parametrize(
    ("cgroup", "manager"),
    [
        ("/system.slice/ollama.service", Manager("unit", "ollama.service", "system")),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/comfyui.service",
            Manager("unit", "comfyui.service", "user"),
        ),
        (f"/system.slice/docker-{'ab' * 32}.scope", Manager("container", "ab" * 6)),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/vte.scope", None),
        ("/user.slice/user-1000.slice/session-3.scope", None),
        ("", None),
    ],
)
def test_what_runs_a_process_shows_in_its_cgroup(cgroup: str, manager: Manager | None) -> None:
    table = FakeProcesses()
    table.cgroups[100] = cgroup
    assert _manager((100,), table) == manager


def test_a_server_holds_what_its_descendants_hold() -> None:
    assert _mib((200,), {202: 4000, 300: 900}, FakeProcesses()) == 4000
    assert _mib((200,), None, FakeProcesses()) is None


def test_what_manages_a_server_stands_in_the_config_as_a_comment() -> None:
    found = [
        Found(SERVICES["comfyui"], 8188, manager=Manager("unit", "c.service", "user"), mib=4321),
        Found(SERVICES["whispercpp"], 8178, manager=Manager("container", "ab" * 6)),
        Found(SERVICES["comfyui"], 8189),
    ]
    text = propose("", found, listen="127.0.0.1:1", total_mib=24_000).after
    assert "# evict: [http, {unit: c.service, scope: user}]" in text
    assert f"# evict: [{{container: {'ab' * 6}}}]" in text
    config = parse_config(text)
    assert config.consumers["comfyui"].vram_resident_mib == 4321
    assert set(config.consumers) == {"comfyui", "whispercpp", "comfyui-8189"}
    assert dict(config.routing) == {"image": "comfyui", "stt": "whispercpp"}


@pytest.mark.parametrize(
    "before",
    ["listen: 127.0.0.1:1\n", "consumers: {}\nrouting: {}\n", "consumers: {}\n\n# the end\n"],
)
def test_consumers_are_added_to_whatever_is_there(before: str) -> None:
    proposal = propose(
        before, [Found(SERVICES["ollama"], 11434)], listen="127.0.0.1:1", total_mib=None
    )
    assert set(parse_config(proposal.after).consumers) == {"ollama"}
    assert proposal.added == ("ollama",)
    again = propose(
        proposal.after, [Found(SERVICES["ollama"], 11434)], listen="x:1", total_mib=None
    )
    assert not again.changed


def test_a_words_quotes_for_systemd() -> None:
    assert _quoted("/a b/%c$d") == '"/a b/%%c$$d"'


def test_without_systemctl_there_is_no_service() -> None:
    assert not UserService({"PATH": "/nowhere"}).available


# -- doctor ------------------------------------------------------------------------------------


def levels(findings: Any) -> list[str]:
    return [finding.level for finding in findings]


def test_a_card_that_cannot_be_measured_is_bad() -> None:
    assert levels(diagnosis.card(None, "no driver")) == ["bad"]


def test_foreign_processes_and_missing_figures_are_warnings() -> None:
    holdings = Holdings({}, {}, (GpuProcess(9, 500, "game"),), reason="no PID namespace")
    reading = MemoryReading(8000, 500, 7500, holdings=holdings)
    assert levels(diagnosis.card(reading, "")) == ["good", "warning", "warning"]


@pytest.mark.parametrize(
    ("reserved_mib", "expected"), [(256, ["good", "warning"]), (8000, ["good"])]
)
def test_a_card_with_the_hosts_memory_leaves_some_to_other_programs(
    reserved_mib: int, expected: list[str]
) -> None:
    reading = MemoryReading(120_000, 30_000, 90_000, name="NVIDIA GB10", memory="host")
    findings = list(diagnosis.card(reading, "", reserved_mib))
    assert levels(findings) == expected
    size = "120000 MiB of the host's memory, which is the card's"
    assert findings[0].what == f"NVIDIA GB10: {size}, measured"
    assert "7500" in findings[-1].remedy or expected == ["good"]


@pytest.mark.parametrize("memory", ["own", "host"])
def test_the_terminal_says_whose_the_cards_memory_is(memory: str) -> None:
    gpu = {"total_mib": 8000, "used_mib": 3000, "free_mib": 5000, "source": "measured"}
    text = shown(views.card({"gpu": {**gpu, "memory": memory}, "consumers": []}))
    assert ("of the host's memory, which is the card's" in text) == (memory == "host")


def test_two_brokers_are_one_too_many() -> None:
    first = RunningBroker(1, True, "/one.yaml", 0)
    assert levels(diagnosis.brokers([])) == []
    assert levels(diagnosis.brokers([first])) == ["good"]
    for device in (0, "GPU-1", None):
        second = RunningBroker(2, device is not None, "/two.yaml", device)
        (finding,) = diagnosis.brokers([first, second])
        assert finding.level == "warning", device
        assert "gpumanager drain --url http://127.0.0.1:2" in finding.remedy


@pytest.mark.parametrize("device", [1, "simulated:/tmp/card.json"])
def test_two_brokers_on_different_cards_are_no_fault(device: int | str) -> None:
    file = "/two.yaml" if device == 1 else None
    found = [RunningBroker(1, True, "/one.yaml", 0), RunningBroker(2, True, file, device)]
    (finding,) = diagnosis.brokers(found)
    assert finding.level == "good"
    assert "2 brokers run here" in finding.what
    assert ("demo" in finding.what) == (file is None)


def test_who_answers_in_the_brokers_place() -> None:
    def asked(there: RunningBroker | Stranger | None) -> list[str]:
        return levels(diagnosis.own_broker(there, "127.0.0.1:1", "/one.yaml"))

    assert asked(RunningBroker(1, True, "/one.yaml", 0)) == []
    assert asked(RunningBroker(1, True, "/two.yaml", 0)) == ["bad"]
    assert asked(RunningBroker(1, True, None, "simulated:x")) == ["bad"]
    assert asked(RunningBroker(1)) == ["warning"]
    assert asked(Stranger(1, ("nginx (pid 7)",))) == ["bad"]
    assert asked(None) == ["bad"]


def test_open_ports_without_keys_are_bad_and_open_services_pass_the_line_by() -> None:
    text = "listen: 0.0.0.0:8770\nconsumers:\n  it: {url: 'http://127.0.0.1:11434'}\n"
    config = parse_config(text)
    listening = [("0.0.0.0", 11434), ("127.0.0.1", 1)]
    assert levels(diagnosis.exposure(config, 0, listening)) == ["bad", "warning"]
    assert levels(diagnosis.exposure(config, 1, [])) == []


def test_consumers_are_judged_by_config_and_status() -> None:
    text = "consumers:\n  it: {url: 'http://127.0.0.1:1', health: /h, unload: /u}\n"
    config = parse_config(text)
    well = {"name": "it", "probed": True, "healthy": True}
    assert levels(diagnosis.consumers(config, {"consumers": [well]})) == ["good"]
    ill = {**well, "healthy": False, "quarantine": "gave nothing", "on_cpu": ["m"]}
    assert levels(diagnosis.consumers(config, {"consumers": [ill]})) == ["bad", "bad", "warning"]
    leaked = [{"event": "evicted", "outcome": "leaked", "consumer": "it"}] * 2
    assert "2 times" in next(iter(diagnosis.releases(leaked))).what


# -- views -------------------------------------------------------------------------------------


def shown(picture: Any) -> str:
    out = StringIO()
    Console(file=out, width=120, highlight=False).print(picture)
    return out.getvalue()


def consumer(**more: Any) -> dict[str, Any]:
    return {
        "name": "it",
        "probed": True,
        "healthy": True,
        "breaker": "closed",
        "loaded": True,
        "gpu_resident_mib": 3000,
        "vram_budget_mib": 3000,
        "total_requests": 3,
        "learned": {"run_ms": {"p50": 2000, "p95": 3000, "count": 3}},
        **more,
    }


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({}, "healthy"),
        ({"healthy": False}, "down"),
        ({"probed": False}, "not probed"),
        ({"breaker": "open"}, "failing"),
        ({"stopped_by": "unit"}, "stopped by the broker (unit)"),
        ({"quarantine": "x"}, "in quarantine"),
        ({"on_cpu": ["m"]}, "partly on the CPU"),
        ({"growth": {"verdict": "leaks"}}, "leaks memory"),
        ({"growth": {"verdict": "grows"}}, "healthy"),
    ],
)
def test_how_a_service_is_in_a_word(more: dict[str, Any], word: str) -> None:
    found = {
        "routing": {"tts": "it"},
        "time": "2026-05-11T11:33:39.120Z",
        "consumers": [consumer(last_used="2026-05-11T11:32:09.120Z", **more)],
    }
    text = shown(views.services(found))
    assert word in text
    assert "it (tts)" in text
    assert "1 min 30 s ago" in text


@pytest.mark.parametrize(
    ("growth", "said", "advice"),
    [
        (
            {"over": "jobs", "mib_per_job": 5.2, "grown_mib": 900},
            "leaks memory of the card: 5.2 MiB with each job, 900 MiB so far",
            "gpumanager unload it",
        ),
        (
            {"over": "loads", "mib_per_load": 40, "grown_mib": 0},
            "leaks memory of the card: after each unload it keeps 40 MiB more",
            "restart it",
        ),
    ],
)
def test_doctor_says_who_leaks_and_what_frees_it(
    growth: dict[str, Any], said: str, advice: str
) -> None:
    config = parse_config("consumers: {it: {url: 'http://127.0.0.1:1', pinned: true, health: /h}}")
    status = {"consumers": [consumer(name="it", growth={"verdict": "leaks", **growth})]}
    _, finding = diagnosis.consumers(config, status)
    assert finding.level == "warning"
    assert said in finding.what
    assert advice in finding.remedy


def test_status_says_since_when_and_why_a_consumer_is_down() -> None:
    found = {
        "time": "2026-05-11T11:33:39.120Z",
        "consumers": [
            consumer(name="well"),
            consumer(
                name="ollama",
                healthy=False,
                health_since="2026-05-11T11:32:09.120Z",
                last_error="ollama refused the connection",
            ),
            consumer(name="tei", breaker="open", breaker_since="2026-05-11T11:33:37.120Z"),
            consumer(name="sd", healthy=False, stopped_by="unit"),
        ],
    }
    assert shown(views.troubles(found)).splitlines() == [
        "ollama has been down for 1 min 30 s: ollama refused the connection",
        "tei has been failing for 2.0 s",
    ]
    found["consumers"] = [consumer()]
    assert shown(views.troubles(found)) == ""


def test_top_shows_memory_progress_the_line_and_events() -> None:
    entry = {
        "ticket": 1,
        "consumer": "it",
        "kind": "tts",
        "client": "127.0.0.1",
        "state": "running",
        "position": 0,
        "age_ms": 1000,
        "estimate_ms": 0,
    }
    found = {
        "version": "1",
        "time": "2026-05-11T11:33:39.120Z",
        "gpu": {"total_mib": 8000, "used_mib": 3500, "free_mib": 4500, "source": "measured"},
        "routing": {"tts": "it"},
        "consumers": [consumer()],
        "scheduler": {"total_jobs": 4, "evictions": 1, "queue_depth": 1},
        "queue": [entry, {**entry, "ticket": 2, "state": "waiting", "position": 1}],
    }
    event = {"number": 1, "time": "2026-05-11T11:33:39.120Z", "event": "evicted", "level": "info"}
    text = shown(
        top.picture(
            found, [{**event, "consumer": "x y"}], "http://h", Console(width=120), fit=False
        )
    )
    for part in ("it 3000 MiB", "others 500 MiB", "1.0 s of usually 2.0 s", "evicted", "'x y'"):
        assert part in text
    assert "trying again" in shown(views.gone("nobody listens there"))
    assert "2 events were missed" in views.event_line({"event": "missed", "count": 2})
