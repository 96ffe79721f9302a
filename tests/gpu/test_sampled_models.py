"""What the sampler learns of single models."""

from __future__ import annotations

import yaml

from gpumanager.config import parse_config
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.gpu.device import GpuMemory
from gpumanager.gpu.sampler import Sampler
from gpumanager.model import Declared, LoadedModel, ProbeReport
from tests.gpu.test_sampler import ScriptedCard, Told, attributed
from tests.support.clock import FakeClock
from tests.support.events import ignore


class OfModels:
    """A sampler over one consumer, `llm`. `apart`: it says what is loaded, and unloads one model
    alone; else what a job needs depends on its model all the same."""

    def __init__(self, *, apart: bool = True) -> None:
        keys = {
            "probe": {"path": "/ps", "items": "models"},
            "unload": {"path": "/u", "for_each": "items", "json": {"model": "{item}"}},
        }
        consumer = {"url": "http://127.0.0.1:1", **(keys if apart else {"request_model": "name"})}
        config = parse_config(yaml.safe_dump({"consumers": {"llm": consumer}}))
        self.clock, self.learned = FakeClock(), Learned(["llm"])
        self.registry = Registry(config, self.clock, lambda consumer: False)
        self.learned.publish(self.registry.learn)
        self.card = ScriptedCard()
        memory = GpuMemory(self.card, self.clock, Told())
        self.sampler = Sampler(
            memory, self.registry, self.learned, self.clock, ignore, interval=2.0
        )

    def look(self, mib: int | None) -> None:
        """None: the card is out of view."""
        self.card.answers.append("gone" if mib is None else attributed(llm=mib))
        self.sampler.look()

    def job(self, model: str, mib: int | None, rest_mib: int | None = None) -> None:
        self.clock.advance(60)
        self.registry.job_started("llm", model)
        self.look(mib)
        self.registry.job_finished("llm", model=model)
        for name in ("llm", f"llm/{model}"):
            self.learned.ran(name, 1.0)
        if rest_mib is not None:
            self.look(rest_mib)

    def says(self, **details: LoadedModel) -> None:
        on_cpu = tuple(
            name for name, said in details.items() if (said.mib or 0) < (said.needs_mib or 0)
        )
        report = ProbeReport(
            loaded=bool(details), items=tuple(details), details=details, on_cpu=on_cpu
        )
        version = self.registry.get("llm").residency_version
        self.registry.probe_succeeded("llm", report, seen_version=version)

    def peak(self, model: str) -> tuple[int, str] | None:
        peak = self.learned.figures(f"llm/{model}").peak
        return None if peak is None else (peak.mib, peak.source)

    def held(self) -> dict[str, int]:
        models = self.registry.get("llm").models
        return {name: each.held_mib for name, each in models.items() if each.loaded}


def test_of_each_model_its_own_share_is_learned() -> None:
    it = OfModels()
    it.job("large", 9000, 9000)
    it.job("small", 10_200, 10_200)
    it.says(large=LoadedModel(), small=LoadedModel())
    it.job("large", 10_400, 10_400)
    assert it.peak("large") == (9200, "measured")
    assert it.peak("small") == (1200, "measured")
    assert it.learned.needed("llm", Declared()).mib == 10_400


def test_a_model_that_is_loaded_again_is_not_taken_to_hold_what_the_other_does() -> None:
    it = OfModels()
    it.job("large", 9000, 9000)
    it.says(large=LoadedModel())
    it.registry.set_loaded("llm", False, "large")
    it.look(0)
    it.job("small", 1000, 1000)
    it.says(small=LoadedModel())
    it.job("large", 10_000, 10_000)
    assert it.held() == {"small": 1000, "large": 9000}
    assert it.peak("small") == (1000, "measured")


def test_while_memory_is_on_its_way_back_nothing_is_learned_of_a_model() -> None:
    it = OfModels()
    it.job("large", 9000)
    it.job("small", 10_000)
    it.registry.set_loaded("llm", False, "large")
    it.look(10_000)  # not back yet
    assert it.peak("small") == (1000, "measured")
    it.look(1000)
    assert it.held() == {"small": 1000}


def test_what_a_model_holds_that_is_partly_on_the_cpu_is_not_what_it_needs() -> None:
    it = OfModels()
    it.says(large=LoadedModel(6000, 15_000))
    it.job("large", 6000, 6000)
    assert it.peak("large") is None


def test_without_the_cards_figures_what_the_server_says_is_learned() -> None:
    it = OfModels()
    it.job("large", None)
    it.says(large=LoadedModel(9000, 9000, 8192), small=LoadedModel(1000))
    it.look(None)
    assert it.peak("large") == (9000, "reported")
    assert it.peak("small") == (1000, "reported")


def test_of_one_that_cannot_tell_all_that_it_holds_is_the_jobs_models() -> None:
    it = OfModels(apart=False)
    it.job("sdxl", 9000, 9000)
    it.job("sd15", 9000, 4000)  # it has swapped them
    it.job("sd15", 4000, 4000)
    assert it.peak("sdxl") == (9000, "measured")
    assert it.registry.get("llm").loaded_models == ()
    for _ in range(20):
        it.job("sd15", 4000, 4000)
    assert it.registry.now.needed("llm/sd15").mib == 4000
    assert it.registry.now.needed("llm/sdxl").mib == 9000


def test_a_job_that_names_no_model_teaches_nothing_of_one() -> None:
    it = OfModels()
    it.job("small", 1000, 1000)
    it.says(small=LoadedModel())
    it.registry.job_started("llm")
    it.look(9000)
    it.registry.job_finished("llm")
    it.learned.ran("llm", 1.0)
    it.look(9000)
    assert it.peak("small") == (1000, "measured")
    it.says(small=LoadedModel(), other=LoadedModel())
    it.look(9000)
    assert it.held() == {"small": 1000, "other": 8000}
    assert it.peak("small") == (1000, "measured")
