"""What the sampler leaves in the registry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpumanager.consumers.footprint import Figure
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.gpu.device import GpuMemory, GpuUnavailable
from gpumanager.gpu.sampler import Sampler
from gpumanager.model import Declared, GpuProcess, GpuState, Holdings, MemoryReading, ProbeReport
from gpumanager.telemetry import events
from tests.support.clock import FakeClock
from tests.support.events import ignore
from tests.support.known import registry_of

READING = MemoryReading(8000, 1000, 7000)


class ScriptedCard:
    def __init__(self, *answers: MemoryReading | str) -> None:
        self.answers = list(answers)

    def read(self) -> MemoryReading:
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            raise GpuUnavailable(answer)
        return answer

    def close(self) -> None:
        pass


def make(
    *answers: MemoryReading | str, emit: events.Emit = ignore
) -> tuple[Sampler, Registry, FakeClock]:
    clock = FakeClock()
    registry = registry_of({}, clock)
    memory = GpuMemory(ScriptedCard(*answers), clock)
    return Sampler(memory, registry, Learned(()), clock, emit, interval=2.0), registry, clock


def test_a_sample_is_published_with_its_time() -> None:
    sampler, registry, clock = make(READING)
    assert sampler.sample() == 2.0
    assert registry.now.gpu.reading == READING
    assert registry.now.gpu.sampled_at == clock.monotonic()
    assert registry.now.gpu.err == ""


def test_its_time_is_when_the_card_was_asked_not_when_it_had_answered() -> None:
    """It may show what was so before an eviction that ended meanwhile."""
    sampler, registry, clock = make(READING)
    asked = clock.monotonic()
    read = sampler._memory.read

    def slow() -> MemoryReading:
        reading = read()
        clock.advance(1)
        return reading

    sampler._memory.read = slow  # type: ignore[method-assign]
    sampler.sample()
    assert registry.now.gpu.sampled_at == asked


def test_an_older_sample_does_not_replace_a_younger() -> None:
    _, registry, _ = make()
    registry.set_gpu(GpuState(READING, 5.0))
    registry.set_gpu(GpuState(MemoryReading(8000, 9, 7991), 4.0))
    assert registry.now.gpu.reading == READING


def test_a_failing_field_shows_as_err_beside_the_figures() -> None:
    sampler, registry, _ = make(MemoryReading(8000, 1000, 7000, fault="name: Unknown Error"))
    sampler.sample()
    assert registry.now.gpu.reading is not None
    assert registry.now.gpu.err == "name: Unknown Error"


def test_a_lost_card_shows_as_err_keeps_no_stale_figures_and_recovers() -> None:
    told: list[events.Event] = []
    sampler, registry, clock = make(READING, "GPU is lost", READING, emit=told.append)
    sampler.sample()
    before = registry.now.gpu.sampled_at
    clock.advance(2)
    sampler.sample()
    assert registry.now.gpu.reading is None
    assert registry.now.gpu.err == "GPU is lost"
    assert registry.now.gpu.sampled_at == before
    assert registry.now.gpu.last == READING  # as what was so before, no more
    sampler.sample()  # put off
    assert registry.now.gpu.last == READING
    clock.advance(2)
    sampler.sample()
    assert registry.now.gpu == GpuState(READING, clock.monotonic())
    assert told == [
        events.GpuUnavailable(reason="GPU is lost"),
        events.GpuAvailable(),
    ]


def attributed(**held: int) -> MemoryReading:
    used = sum(held.values())
    return MemoryReading(8000, used, 8000 - used, holdings=Holdings(held))


def test_what_loaded_consumers_hold_is_learned() -> None:
    clock = FakeClock()
    registry = registry_of({"tts": True, "llm": False}, clock)
    learned = Learned(["tts", "llm"])
    memory = GpuMemory(ScriptedCard(attributed(tts=3000, llm=500)), clock, Told())
    Sampler(memory, registry, learned, clock, ignore, interval=2.0).look()
    assert learned.needed("tts", Declared()).mib == 3000
    assert learned.figures("llm").peak is None  # a residue is no footprint


@pytest.mark.parametrize(("mib", "lifted"), [(1700, False), (1600, True), (0, True)])
def test_who_has_released_most_in_the_end_may_be_asked_again(mib: int, lifted: bool) -> None:
    clock = FakeClock()
    registry = registry_of({"tts": False}, clock)
    registry.quarantine("tts", "gave nothing back", 1600)
    memory = GpuMemory(ScriptedCard(attributed(tts=mib)), clock, Told())
    Sampler(memory, registry, Learned(["tts"]), clock, ignore, interval=2.0).look()
    assert (registry.get("tts").quarantine == "") is lifted


@pytest.mark.parametrize("at_rest", [True, False])
def test_what_an_unloaded_one_holds_is_the_most_that_it_keeps(at_rest: bool) -> None:
    clock, learned = FakeClock(), Learned(["tts"])
    registry = registry_of({"tts": False}, clock)
    learned.unloaded("tts", 1.0, 900)
    memory = GpuMemory(ScriptedCard(attributed(tts=300)), clock, Told())
    sampler = Sampler(memory, registry, learned, clock, ignore, interval=2.0)
    if at_rest:
        sampler.look()
    else:
        with registry.busy("tts"):  # as while it loads
            sampler.look()
    assert learned.figures("tts").residue_mib == (300 if at_rest else 900)


def test_while_a_job_runs_samples_come_more_often() -> None:
    clock = FakeClock()
    registry = registry_of({"tts": False}, clock)
    memory = GpuMemory(ScriptedCard(READING, READING), clock)
    sampler = Sampler(memory, registry, Learned(["tts"]), clock, ignore, interval=2.0)
    registry.job_started("tts")
    assert sampler.sample() == 0.5
    registry.job_finished("tts")
    assert sampler.sample() == 2.0


def learn(
    *readings: MemoryReading | str, active: bool = False, report: ProbeReport | None = None
) -> Learned:
    """What is learned from these looks at the card, of a loaded consumer."""
    clock, learned = FakeClock(), Learned(["tts"])
    registry = registry_of({"tts": True}, clock)
    if report is not None:
        registry.probe_succeeded("tts", report, seen_version=0)
    if active:
        registry.job_started("tts")
    sampler = Sampler(
        GpuMemory(ScriptedCard(*readings), clock, Told()),
        registry,
        learned,
        clock,
        ignore,
        interval=2.0,
    )
    for _ in readings:
        sampler.look()
    learned.ran("tts", 1)
    return learned


@pytest.mark.parametrize("active", [True, False])
def test_nothing_held_at_work_is_a_measurement_nothing_at_rest_is_none(active: bool) -> None:
    learned = learn(attributed(tts=0), active=active)
    assert learned.figures("tts").peak == (
        Figure(0, "measured", learned.figures("tts").peak.at) if active else None  # type: ignore[union-attr]
    )


def test_a_process_that_is_nobodys_may_be_the_one_that_holds_it() -> None:
    game = GpuProcess(9, 3000, "python")
    hidden = replace(attributed(tts=0), holdings=Holdings({"tts": 0}, foreign=(game,)))
    assert learn(hidden, active=True).figures("tts").peak is None


def test_what_is_partly_on_the_cpu_is_no_footprint() -> None:
    report = ProbeReport(loaded=True, on_cpu=("llama3:70b",))
    assert learn(attributed(tts=3000), report=report).figures("tts").peak is None


@pytest.mark.parametrize("reading", [attributed(), "no driver"])
def test_where_nobody_measures_it_its_own_figure_counts(reading: MemoryReading | str) -> None:
    peak = learn(reading, report=ProbeReport(loaded=True, resident_mib=3000)).figures("tts").peak
    assert peak is not None
    assert (peak.mib, peak.source) == (3000, "reported")


class Told:
    """An attributor that leaves what the card says."""

    def attribute(self, reading: MemoryReading) -> Holdings:
        assert reading.holdings is not None
        return reading.holdings
