"""What is shown of the models of a consumer that tells them apart: in the list of models, in the
metrics, and on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from gpumanager.cli import main
from tests.support.scene import Scene, models
from tests.support.threads import eventually

pytestmark = pytest.mark.timeout(60)

SIZES = {"titles:1b": 1000, "code:20b": 6000, "chat:8b": 3000}


@pytest.fixture
def it() -> Iterator[Scene]:
    with models(SIZES, voice_mib=6000) as scene:
        yield scene


def listed(it: Scene) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in it.broker.get("/v1/models").json()["data"]}


def test_the_list_of_models_says_what_each_needs_as_soon_as_it_was_seen(it: Scene) -> None:
    eventually(lambda: listed(it).keys() == {*SIZES, "voice"})
    assert not any(each["loaded"] for each in listed(it).values())
    assert {each.get("vram_source") for each in listed(it).values()} <= {None, "listed"}
    it.used("titles:1b", "code:20b")
    eventually(lambda: listed(it)["code:20b"].get("vram_mib") == 6000)
    eventually(lambda: all(listed(it)[name]["loaded"] for name in ("titles:1b", "code:20b")))
    found = listed(it)
    assert found["titles:1b"]["vram_source"] == found["code:20b"]["vram_source"] == "measured"
    assert found["titles:1b"]["vram_mib"] == 1000
    assert found["chat:8b"]["vram_source"] == "listed", "nothing was seen of it but its size"
    assert "vram_mib" not in found["voice"]
    assert it.broker.post("/v1/consumers/ollama/unload?model=code:20b").status_code == 200
    eventually(lambda: [n for n, each in listed(it).items() if each["loaded"]] == ["titles:1b"])
    assert listed(it)["code:20b"]["vram_mib"] == 6000


# -- metrics -------------------------------------------------------------------------------------

MIB = 1024 * 1024


def of_models(it: Scene) -> dict[str, dict[str, float]]:
    """The value of each metric of a model, by the metric's name and the model's."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(it.broker.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("gpumanager_model_"):
                by_model = found.setdefault(sample.name.removeprefix("gpumanager_model_"), {})
                by_model[sample.labels["model"]] = sample.value
    return found


def test_metrics_tell_what_each_model_holds_needs_and_was_loaded(it: Scene) -> None:
    assert it.broker.get("/metrics").status_code == 200
    assert of_models(it) == {}
    it.used("titles:1b", "code:20b", "titles:1b")
    eventually(lambda: of_models(it)["needed_bytes"].get("code:20b") == 6000 * MIB)
    assert it.job("tts").result(30).status_code == 200  # the large one has to go for it
    eventually(lambda: not it.shown("code:20b")["loaded"])
    found = of_models(it)
    assert found["held_bytes"] == {"titles:1b": 1000 * MIB, "code:20b": 0}
    assert found["needed_bytes"] == {"titles:1b": 1000 * MIB, "code:20b": 6000 * MIB}
    assert found["loads_total"] == {"titles:1b": 1, "code:20b": 1}
    assert found["evictions_total"] == {"titles:1b": 0, "code:20b": 1}
    events = it.broker.get("/v1/events").json()["events"]
    cold = [each.get("cold", False) for each in events if each["event"] == "job"]
    assert cold == [True, True, False, True]


def test_a_name_that_a_client_made_up_is_no_label(it: Scene) -> None:
    it.used("titles:1b")
    for number in range(100):
        assert it.chat(f"made-up-{number}").result(30).status_code in (404, 503)
    assert set(of_models(it)["needed_bytes"]) == {"titles:1b"}
    assert "made-up" not in it.broker.get("/metrics").text


# -- the command line ----------------------------------------------------------------------------


def run(it: Scene, *arguments: str, width: int = 120) -> Result:
    environ = {"COLUMNS": str(width)}
    return CliRunner().invoke(main, [*arguments, "--url", it.broker.url], env=environ)


def test_the_status_has_the_models_below_their_consumer(it: Scene) -> None:
    it.used("titles:1b", "code:20b")
    assert run(it, "pin", "ollama", "--model", "titles:1b").exit_code == 0
    assert run(it, "unload", "ollama", "--model", "code:20b").exit_code == 0
    lines = run(it, "status").stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("ollama (llm)")]
    assert lines[at].split()[2:7] == ["healthy", "1", "loaded", "1000", "MiB"]
    titles, code = lines[at + 1].split(), lines[at + 2].split()
    assert titles[:4] == ["titles:1b", "pinned", "4096", "tokens"]
    assert titles[4:9] == ["1000", "MiB", "1000", "MiB", "1"]
    assert code[:8] == ["code:20b", "not", "loaded", "0", "MiB", "6000", "MiB", "1"]
    narrow = run(it, "status", width=80).stdout.splitlines()
    assert "usual run" not in narrow[2]
    assert max(map(len, narrow)) <= 80
    assert not any("…" in line for line in narrow)


def test_the_queue_names_the_models(it: Scene) -> None:
    it.pace(ollama=30)
    it.chat("code:20b")
    it.broker.await_line(1)
    it.chat("titles:1b")
    it.broker.await_line(2)
    try:
        shown = run(it, "queue").stdout.splitlines()
        assert [line.split()[3] for line in shown[1:]] == ["code:20b", "titles:1b"]
        picture = run(it, "top", "--once").stdout
        assert "ollama (code:20b) llm for 127.0.0.1" in picture
        narrow = run(it, "queue", width=80).stdout.splitlines()
        assert "client" not in narrow[0].split()
        assert "titles:1b" in narrow[2]
    finally:
        for entry in reversed(it.broker.broker.card.scheduler.queue()):
            it.broker.delete(f"/v1/queue/{entry.ticket}")


def test_one_model_is_planned_pinned_unloaded_and_forgotten(it: Scene) -> None:
    it.used("titles:1b", "code:20b")
    eventually(lambda: it.shown("code:20b")["learned"]["needed"]["mib"] == 6000)
    plan = run(it, "plan", "llm", "--model", "code:20b").stdout
    assert plan.startswith("ollama's model code:20b needs 6000 MiB and holds 6000; ")
    longer = run(it, "plan", "llm", "--model", "code:20b", "--context", "8192").stdout
    assert int(longer.split(" needs ")[1].split()[0]) > 6000
    assert "  ollama's model code:20b" in run(it, "plan", "tts").stdout
    assert run(it, "plan", "llm", "--context", "0").exit_code == 2
    assert run(it, "plan", "llm", "--model", "").exit_code == 1
    pinned = run(it, "pin", "ollama", "--model", "code:20b")
    assert pinned.stdout == "ollama's model code:20b is pinned: it is not evicted\n"
    assert it.shown("code:20b")["pinned"] is True
    assert it.shown("titles:1b")["pinned"] is False
    assert run(it, "plan", "tts").exit_code == 1
    assert run(it, "unpin", "ollama", "--model", "code:20b").exit_code == 0
    assert it.shown("code:20b")["pinned"] is False
    unloaded = run(it, "unload", "ollama", "--model", "code:20b")
    assert unloaded.stdout.startswith("ollama's model code:20b: released, 6000 MiB in ")
    assert it.shown("titles:1b")["loaded"] is True
    forgotten = run(it, "forget", "ollama", "--model", "code:20b")
    assert forgotten.stdout.startswith("ollama's model code:20b: forgotten; room is made for ")
    assert "peak_mib" not in it.shown("code:20b")["learned"]
    assert "peak_mib" in it.shown("titles:1b")["learned"]
    refused = run(it, "unload", "voice", "--model", "x")
    assert (refused.exit_code, "does not tell its models apart" in refused.stderr) == (1, True)
    assert run(it, "pin", "voice").stdout == "voice is pinned: it is not evicted\n"
    assert run(it, "unpin", "voice").stdout == "voice is unpinned: it may be evicted\n"
