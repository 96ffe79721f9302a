"""Of which models the metrics tell: few, whatever names there are, and none that is gone."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gpumanager.telemetry import modelmetrics
from gpumanager.telemetry.events import Loaded
from gpumanager.telemetry.modelmetrics import MOST_LABELLED, OTHER_MODELS, Models
from tests.support.events import evicted, job

MIB = modelmetrics.MIB


def model(name: str, held_mib: int = 0, *, used: int = 0, known: bool = True) -> dict[str, Any]:
    learned: dict[str, Any] = {"needed": {"mib": 700, "source": "measured"}}
    if known:
        learned["peak_mib"] = 700
    return {
        "name": name,
        "loaded": held_mib > 0,
        "held_mib": held_mib,
        "learned": learned,
        "last_used": f"2026-11-24T12:00:{used:02}Z",
    }


class Scraped:
    """The models of one consumer, and what is scraped of them."""

    def __init__(self, *models: dict[str, Any]) -> None:
        self.status: dict[str, Any] = {
            "consumers": [{"name": "ollama", "models": list(models)}, {"name": "it"}]
        }
        self.models = Models(lambda: self.status)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self.models)

    def show(self, *models: dict[str, Any]) -> None:
        self.status["consumers"][0]["models"] = list(models)

    def __call__(self, metric: str) -> dict[str, float]:
        text = generate_latest(self.registry).decode()
        return {
            sample.labels["model"]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"gpumanager_model_{metric}"
        }


def test_the_loaded_ones_are_told_of_and_the_last_used_and_the_rest_in_sum() -> None:
    loaded = [model(f"loaded-{i}", 100 + i) for i in range(5)]
    idle = [model(f"idle-{i}", used=i) for i in range(50)]
    scraped = Scraped(*idle, *loaded)
    last_used = [f"idle-{i}" for i in range(49, 49 - (MOST_LABELLED - 5), -1)]
    assert set(scraped("held_bytes")) == {*last_used, *(each["name"] for each in loaded)}
    many = [model(f"loaded-{i}", 100) for i in range(MOST_LABELLED + 7)]
    scraped.show(*many)
    held = scraped("held_bytes")
    assert len(held) == MOST_LABELLED + 1
    assert held[OTHER_MODELS] == 7 * 100 * MIB
    assert len(scraped("needed_bytes")) == MOST_LABELLED


def test_what_never_held_memory_is_no_label() -> None:
    assert set(Scraped(model("made up", known=False), model("it"))("held_bytes")) == {"it"}


def test_who_is_gone_is_told_of_no_more_and_counted_on_when_it_is_back() -> None:
    scraped = Scraped(model("it", 500))
    scraped.models.take(Loaded(consumer="ollama", model="it", ms=3))
    scraped.models.take(evicted("ollama", model="it"))
    assert (scraped("loads_total"), scraped("evictions_total")) == ({"it": 1}, {"it": 1})
    scraped.show()
    for metric in ("held_bytes", "needed_bytes", "loads_total", "evictions_total"):
        assert scraped(metric) == {}
    scraped.models.take(job(consumer="ollama", model="it", cold=True))
    scraped.show(model("it", 500))
    assert scraped("loads_total") == {"it": 2}


def test_only_a_job_that_loaded_its_model_counts_as_a_load() -> None:
    scraped = Scraped(model("it", 500))
    for more in (
        {"cold": None},
        {"cold": True, "status": 404},
        {"cold": True, "status": None, "failure": "consumer_timeout"},
        {"cold": True, "model": None},
    ):
        scraped.models.take(job(**{"consumer": "ollama", "model": "it", **more}))
    scraped.models.take(evicted("ollama"))
    assert scraped("loads_total") == scraped("evictions_total") == {"it": 0}


def test_it_remembers_so_many_counts_and_no_more(monkeypatch: Any) -> None:
    monkeypatch.setattr(modelmetrics, "MOST_COUNTED", 3)
    scraped = Scraped(*(model(f"m{i}", 500) for i in range(5)))
    for i in (0, 1, 2, 0, 3, 4):
        scraped.models.take(Loaded(consumer="ollama", model=f"m{i}", ms=3))
    assert scraped("loads_total") == {"m0": 2, "m1": 0, "m2": 0, "m3": 1, "m4": 1}
