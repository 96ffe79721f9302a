"""Making room where a consumer tells its models apart: on a stand-in for the card, and for servers
that load models, and unload one of them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from gpumanager.config import EvictionMethod
from gpumanager.errors import InsufficientVram, NoConsumer
from gpumanager.gpu.device import GpuMemory, GpuUnavailable
from gpumanager.gpu.sampler import Sampler
from gpumanager.model import (
    Job,
    LoadedModel,
    MemoryReading,
    ModelListing,
    ProbeReport,
    StoppedBy,
    parts_of,
    resident_name,
)
from gpumanager.residency.housekeeper import Housekeeper
from gpumanager.scheduling.interface import Preview, Release
from gpumanager.telemetry.events import Evicted
from tests.residency.test_room import Bench

APART: dict[str, Any] = {
    "probe": {"path": "/ps", "items": "models[].name"},
    "unload": {"path": "/unload", "json": {"model": "{item}"}, "for_each": "items"},
}


class ModelBench(Bench):
    """A Bench whose consumers hold what their models do, and `bare` on top once they have loaded
    one. `telling`: they say what each model holds. The card's figures go the real way, through a
    sampler."""

    def __init__(self, consumers: dict[str, dict[str, Any]], **settings: Any) -> None:
        super().__init__(consumers, **settings)
        self.attributed = True
        self.models: dict[str, dict[str, int]] = {name: {} for name in consumers}
        self.listed: dict[str, list[str]] = {name: [] for name in consumers}
        self.bare = 0
        self.telling = False
        self.stuck: set[str] = set()
        card = cast("GpuMemory", self)
        self.sampler = Sampler(
            card, self.registry, self.learned, self.clock, self.told.append, interval=1
        )

    # -- the card and the consumers -----------------------------------------------------------

    def measure(self) -> MemoryReading | None:
        self.clock.advance(0.001)
        return self.sampler.look()

    def read(self) -> MemoryReading:
        for name, models in self.models.items():
            if models or self.config.consumers[name].tells_models_apart:
                self.holds[name] = sum(models.values()) + (self.bare if models else 0)
        reading = super().measure()
        if reading is None:
            raise GpuUnavailable("no NVML")
        return reading

    def _release(self, name: str) -> None:
        owner, model = parts_of(name)
        if model is None:
            super()._release(name)
            return
        self.models[owner].pop(model, None)
        self.holds[owner] = sum(self.models[owner].values())

    def stop(self, name: str, method: EvictionMethod) -> StoppedBy:
        self.models[name].clear()
        self.listed[name].clear()
        return super().stop(name, method)

    def unload(self, name: str, *rest: object) -> bool:
        if not self.config.consumers[name].tells_models_apart:
            return super().unload(name)
        model = rest[1] if len(rest) > 1 else None
        found = [each for each in self.listed[name] if model in (None, each)]
        for each in found:
            self.calls.append(f"unload {name}/{each}")
            if each not in self.stuck:
                self.listed[name].remove(each)
                self._pending.append([resident_name(name, each), self.lag])
        return bool(found)

    def settled(self, name: str, *rest: object) -> bool:
        model = rest[1] if len(rest) > 1 else None
        return not (self.listed[name] if model is None else model in self.listed[name])

    def probe(self, name: str, *rest: object) -> ProbeReport:
        if not self.config.consumers[name].tells_models_apart:
            return super().probe(name, *rest)
        items, models = tuple(self.listed[name]), self.models[name]
        details = {each: LoadedModel(models[each]) for each in items if self.telling}
        return ProbeReport(loaded=bool(items), items=items, details=details)

    # -- the test's hands ---------------------------------------------------------------------

    def lists(self, **sizes: int) -> None:
        """Ollama has said how large its models are."""
        self.registry.listed("ollama", ModelListing(tuple(sizes), sizes=sizes))

    def says(self, *names: str) -> None:
        """Each says what it has loaded."""
        for name in names or tuple(self.models):
            version = self.registry.get(name).residency_version
            self.registry.probe_succeeded(name, self.probe(name, None), seen_version=version)

    def run(
        self, name: str, model: str | None, mib: int, *, at: str = "", context: int | None = None
    ) -> None:
        """A job: room is made, and it loads its model, which holds so much then. `at` is the model
        that the consumer takes for it, if the job does not say."""
        place = at or model or ""
        job = Job(name, "llm", model=model, context=context)
        ticket = self.scheduler.enqueue(job)
        try:
            bench = self

            class Watched:
                number, waited_s, prepared_s = ticket.number, 0.0, 0.0
                wait, cancel, close = ticket.wait, ticket.cancel, ticket.close
                next_step, idle_others = ticket.next_step, ticket.idle_others
                idle_trims, relieve = ticket.idle_trims, ticket.relieve
                when_cancelled, when_granted = ticket.when_cancelled, ticket.when_granted
                job = ticket.job

                def pause(self, seconds: float) -> None:
                    bench.clock.advance(seconds)
                    bench.pauses.append(seconds)

            self.room.make_room(Watched())
            self.registry.job_started(name, model)
            if place not in self.listed[name]:
                self.listed[name].append(place)
            self.models[name][place] = mib
            self.measure()
            self.clock.advance(1)
            self.registry.job_finished(name, model=model, context=context)
            for each in dict.fromkeys((name, job.resident)):
                self.learned.ran(each, 1.0, context=context)
        finally:
            ticket.close()
        self.says(name)
        self.measure()
        self.clock.advance(10)

    def unload_model(self, name: str, model: str | None = None) -> Release:
        ticket = self.ticket(name)
        try:
            return self.room.unload(resident_name(name, model), ticket)
        finally:
            ticket.close()

    def preview(self, name: str, model: str | None, context: int | None = None) -> Preview:
        self.measure()
        return self.room.preview(Job(name, "llm", model=model, context=context))

    def held(self, name: str) -> dict[str, int]:
        models = self.registry.get(name).models
        return {model: each.held_mib for model, each in models.items() if each.loaded}

    def unloads(self) -> list[str]:
        return [call.removeprefix("unload ") for call in self.calls if call.startswith("unload")]


OLLAMA_AND_TTS = {
    "ollama": {**APART, "vram_resident_mib": 9000},
    "tts": {"vram_resident_mib": 3000},
}


def loaded(**settings: Any) -> ModelBench:
    """Ollama has had jobs for a large and a small model, on a card of 12 GB."""
    bench = ModelBench(OLLAMA_AND_TTS, total=12_000, **settings)
    bench.lists(large=7500, small=400, other=6500)
    bench.run("ollama", "large", 9000)
    bench.run("ollama", "small", 1000)
    assert bench.held("ollama") == {"large": 9000, "small": 1000}
    return bench


def test_a_small_model_stays_while_the_large_one_goes() -> None:
    bench = loaded()
    bench.make_room("tts")
    assert bench.unloads() == ["ollama/large"]
    assert bench.held("ollama") == {"small": 1000}
    assert bench.registry.get("ollama").loaded
    (evicted,) = [each for each in bench.told if isinstance(each, Evicted)]
    assert (evicted.consumer, evicted.model, evicted.mib) == ("ollama", "large", 9000)


def test_a_small_model_needs_no_more_room_than_it_was_seen_to_hold() -> None:
    bench = loaded()
    bench.unload_model("ollama", "small")
    bench.unload_model("ollama", "large")
    bench.resident("tts", used=1)
    bench.foreign = 6000  # only 2800 are free for a job
    bench.calls.clear()
    bench.run("ollama", "small", 1000)
    assert bench.unloads() == []
    bench.foreign = 0
    bench.run("ollama", "large", 9000)
    assert bench.unloads() == ["tts"]


def test_the_jobs_own_other_model_goes() -> None:
    bench = loaded()
    bench.run("ollama", "other", 8000)
    assert bench.unloads() == ["ollama/large"]
    assert bench.held("ollama") == {"small": 1000, "other": 8000}


def test_the_model_of_the_job_does_not_go_for_it() -> None:
    bench = loaded()
    bench.resident("tts", used=1)
    bench.total = 13_500
    bench.run("ollama", "large", 10_000)  # a longer context
    bench.run("ollama", "large", 10_000)
    assert "ollama/large" not in bench.unloads()


def test_an_operator_unloads_one_model() -> None:
    bench = loaded()
    release = bench.unload_model("ollama", "small")
    assert (release.outcome, release.mib) == ("released", 1000)
    assert bench.held("ollama") == {"large": 9000}
    assert bench.unload_model("ollama").mib == 9000  # all of it
    assert not bench.registry.get("ollama").loaded
    with pytest.raises(NoConsumer, match="tts has no way to unload one model alone"):
        bench.unload_model("tts", "voice")


def test_one_model_that_is_not_given_back_takes_its_consumer_along() -> None:
    evict = ["http", {"unit": "ollama.service"}]
    bench = ModelBench(
        {**OLLAMA_AND_TTS, "ollama": {**OLLAMA_AND_TTS["ollama"], "evict": evict}}, total=12_000
    )
    bench.lists(small=400)
    bench.run("ollama", "large", 9000)
    bench.run("ollama", "small", 1000)
    bench.stuck.add("large")
    bench.make_room("tts")
    assert bench.calls == ["unload ollama/large", "unit ollama"]
    assert bench.held("ollama") == {}
    assert bench.registry.get("ollama").stopped_by is not None


def test_a_model_that_is_not_given_back_counts_as_held_on() -> None:
    bench = loaded()
    bench.stuck.add("large")
    with pytest.raises(InsufficientVram):
        bench.make_room("tts")
    assert bench.registry.get("ollama").quarantine
    bench.says("ollama")
    bench.measure()
    assert bench.held("ollama")["large"] > 0  # it says so


@pytest.mark.parametrize("by", ["config", "operator"])
def test_a_pinned_model_stays(by: str) -> None:
    pins = [{"name": "large", "pinned": by == "config"}, "*"]
    bench = ModelBench(
        {**OLLAMA_AND_TTS, "ollama": {**OLLAMA_AND_TTS["ollama"], "models": pins}}, total=12_000
    )
    bench.lists(small=1300)
    bench.run("ollama", "large", 8000)
    bench.run("ollama", "small", 2000)
    if by == "operator":
        bench.registry.pin("ollama", True, "large")
    bench.make_room("tts")
    assert bench.unloads() == ["ollama/small"]
    bench.reset("tts", vram_resident_mib=6000)
    with pytest.raises(InsufficientVram):
        bench.make_room("tts")


def test_what_another_model_needs_refuses_no_job() -> None:
    pins = [{"name": "large", "pinned": True}, "*"]
    bench = ModelBench(
        {**OLLAMA_AND_TTS, "ollama": {**OLLAMA_AND_TTS["ollama"], "models": pins}}, total=12_000
    )
    bench.run("ollama", "large", 8000)
    bench.run("ollama", "never-seen", 1000)  # it may need 9000, as the large one does
    assert bench.held("ollama") == {"large": 8000, "never-seen": 1000}


def test_a_declared_model_needs_what_is_declared() -> None:
    models = [{"name": "large", "vram_mib": 8000}, {"name": "small", "vram_mib": 900}]
    bench = ModelBench(
        {**OLLAMA_AND_TTS, "ollama": {**OLLAMA_AND_TTS["ollama"], "models": models}}, total=12_000
    )
    bench.resident("tts", used=1)
    assert bench.preview("ollama", "small").needed_mib == 900
    bench.run("ollama", "small", 900)
    bench.run("ollama", "large", 7900)
    assert bench.unloads() == ["tts"]


def test_a_longer_context_needs_more_room() -> None:
    bench = loaded()
    assert bench.preview("ollama", "small").needed_mib == 1000
    assert bench.preview("ollama", "small", 32_768).needed_mib == 2750
    bench.run("ollama", "small", 2600, context=32_768)
    assert bench.preview("ollama", "small", 32_768).needed_mib == 2600
    assert bench.preview("ollama", "small", 16_384).needed_mib == 2600


# -- what is not known ----------------------------------------------------------------------------


def test_a_job_whose_model_is_not_known_needs_what_the_largest_does() -> None:
    bench = loaded()
    bench.resident("tts", used=5)
    bench.total = 14_000
    preview = bench.preview("ollama", None)
    assert preview.needed_mib >= 9000
    assert preview.fits  # its models hold that
    bench.calls.clear()
    bench.run("ollama", None, 9000, at="large")
    assert bench.unloads() == []
    assert bench.held("ollama") == {"large": 9000, "small": 1000}


def test_a_job_whose_model_is_not_known_loads_another_one() -> None:
    bench = ModelBench(OLLAMA_AND_TTS, total=24_000)
    bench.run("ollama", "large", 9000)
    bench.run("ollama", None, 4000, at="unheard-of")
    assert bench.held("ollama") == {"large": 9000, "unheard-of": 4000}
    assert bench.registry.now.needed("ollama/large").mib == 9000


def test_one_that_has_not_said_what_it_has_loaded_goes_as_a_whole() -> None:
    bench = ModelBench(OLLAMA_AND_TTS, total=12_000)
    bench.listed["ollama"] = ["a", "b"]
    bench.models["ollama"] = {"a": 5000, "b": 5000}
    bench.registry.set_loaded("ollama", True)
    bench.make_room("tts")
    assert bench.unloads() == ["ollama/a", "ollama/b"]
    assert not bench.registry.get("ollama").loaded


def test_models_that_somebody_else_has_loaded_are_known_by_what_it_says() -> None:
    bench = ModelBench(OLLAMA_AND_TTS, total=12_000)
    bench.telling = True
    bench.listed["ollama"] = ["a", "b"]
    bench.models["ollama"] = {"a": 7000, "b": 2000}
    bench.says("ollama")
    bench.make_room("tts")
    assert bench.unloads() == ["ollama/a"]


def test_what_a_consumer_keeps_is_no_models() -> None:
    bench = ModelBench(
        {**OLLAMA_AND_TTS, "ollama": {**OLLAMA_AND_TTS["ollama"], "floor_mib": 400}},
        total=12_000,
    )
    bench.bare = 400
    bench.run("ollama", "large", 9000)
    assert bench.held("ollama") == {"large": 9000}
    assert bench.registry.now.needed("ollama/large").mib == 9000


# -- without the card's figures -------------------------------------------------------------------


def unmeasured(**settings: Any) -> ModelBench:
    bench = ModelBench(OLLAMA_AND_TTS, total=12_000, measured=False, **settings)
    bench.measure()
    bench.lists(large=7000, small=500)
    return bench


def test_without_measurement_each_model_counts_by_what_it_needs() -> None:
    bench = unmeasured()
    bench.run("ollama", "large", 8500)
    bench.run("ollama", "small", 1000)
    assert bench.unloads() == []  # 8562 and 1087, by their sizes
    bench.make_room("tts")
    assert bench.unloads() == ["ollama/large"]
    assert bench.registry.get("ollama").loaded_models == ("small",)


def test_without_measurement_a_consumers_own_figures_count() -> None:
    bench = unmeasured()
    bench.telling = True
    bench.run("ollama", "large", 5000)
    bench.run("ollama", "small", 1000)
    bench.make_room("tts")
    assert bench.unloads() == []
    assert bench.registry.now.needed("ollama/large").mib == 5000


# -- in quiet times ------------------------------------------------------------------------------


def test_a_model_that_is_idle_goes_alone() -> None:
    consumers = {**OLLAMA_AND_TTS, "ollama": {**OLLAMA_AND_TTS["ollama"], "idle_unload": "60s"}}
    bench = ModelBench(consumers, total=24_000)
    bench.run("ollama", "large", 9000)
    bench.run("ollama", "small", 1000)
    keeper = Housekeeper(
        bench.registry, bench.scheduler, Patient(bench), bench.clock, bench.told.append
    )
    keeper.tidy()
    bench.clock.advance(50)
    bench.run("ollama", "small", 1000)
    bench.clock.advance(15)
    keeper.tidy()
    assert bench.unloads() == ["ollama/large"]
    assert bench.held("ollama") == {"small": 1000}
    for _ in range(3):
        bench.clock.advance(40)
        keeper.tidy()
    assert bench.unloads() == ["ollama/large", "ollama/small"]
    assert not bench.registry.get("ollama").loaded


class Patient:
    """A room maker whose waits pass at once."""

    def __init__(self, bench: ModelBench) -> None:
        self._bench = bench
        self.preview: Callable[[Job], Preview] = bench.room.preview
        self.load = bench.room.load

    def unload(self, name: str, _ticket: object, *, patient: bool = True) -> Release:
        owner = parts_of(name)[0]
        ticket = self._bench.ticket(owner)
        try:
            return self._bench.room.unload(name, ticket, patient=patient)
        finally:
            ticket.close()
