"""What is shown of the models of a consumer that tells them apart: in the list of models, in the
metrics, and on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.scene import Scene, models
from tests.support.threads import eventually

pytestmark = pytest.mark.timeout(60)

SIZES = {"titles:1b": 1000, "code:20b": 9000, "chat:8b": 3000}


@pytest.fixture
def it() -> Iterator[Scene]:
    with models(SIZES) as scene:
        yield scene


def listed(it: Scene) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in it.broker.get("/v1/models").json()["data"]}


def test_the_list_of_models_says_what_each_needs_as_soon_as_it_was_seen(it: Scene) -> None:
    eventually(lambda: listed(it).keys() == {*SIZES, "voice"})
    assert not any(each["loaded"] or "vram_mib" in each for each in listed(it).values())
    it.used("titles:1b", "code:20b")
    eventually(lambda: listed(it)["code:20b"].get("vram_mib") == 9000)
    found = listed(it)
    assert found["titles:1b"]["vram_source"] == found["code:20b"]["vram_source"] == "measured"
    assert (found["titles:1b"]["vram_mib"], found["titles:1b"]["loaded"]) == (1000, True)
    assert "vram_mib" not in found["chat:8b"]
    assert it.broker.post("/v1/consumers/ollama/unload?model=code:20b").status_code == 200
    assert {name: each["loaded"] for name, each in listed(it).items()} == {
        "titles:1b": True,
        "code:20b": False,
        "chat:8b": False,
        "voice": False,
    }
    assert listed(it)["code:20b"]["vram_mib"] == 9000


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
    eventually(lambda: of_models(it)["needed_bytes"].get("code:20b") == 9000 * MIB)
    assert it.job("tts").result(30).status_code == 200  # the large one has to go for it
    eventually(lambda: not it.shown("code:20b")["loaded"])
    found = of_models(it)
    assert found["held_bytes"] == {"titles:1b": 1000 * MIB, "code:20b": 0}
    assert found["needed_bytes"] == {"titles:1b": 1000 * MIB, "code:20b": 9000 * MIB}
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
