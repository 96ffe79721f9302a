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


# -- growth and leaks ----------------------------------------------------------------------------


class Leaky:
    """A sampler over one consumer, which is seen at rest after each of its jobs."""

    def __init__(self, *, attributed: bool = True) -> None:
        self.clock = FakeClock()
        self.learned = Learned(["tts"], lambda: self.clock.now().timestamp())
        self.registry = registry_of({"tts": True}, self.clock)
        self.told: list[events.Event] = []
        self.attributed = attributed
        self.card = ScriptedCard()
        memory = GpuMemory(self.card, self.clock, Told())
        self.sampler = Sampler(
            memory, self.registry, self.learned, self.clock, self.told.append, interval=2.0
        )

    def look(self, mib: int) -> None:
        self.card.answers.append(attributed(tts=mib) if self.attributed else attributed())
        self.sampler.look()

    def job(self, at_work_mib: int, at_rest_mib: int) -> None:
        self.clock.advance(1)
        self.registry.job_started("tts")
        self.look(at_work_mib)
        self.clock.advance(1)
        self.learned.ran("tts", 1)
        self.registry.job_finished("tts")
        if not self.attributed:
            report = ProbeReport(loaded=True, resident_mib=at_rest_mib)
            version = self.registry.get("tts").residency_version
            self.registry.probe_succeeded("tts", report, seen_version=version)
        self.look(at_rest_mib)


@pytest.mark.parametrize("per_process", [True, False], ids=["measured", "reported"])
def test_a_leak_is_told_once(per_process: bool) -> None:
    it = Leaky(attributed=per_process)
    for job in range(60):
        it.job(4000 + 20 * job, 3000 + 20 * job)
    told = [event for event in it.told if isinstance(event, events.Leaking)]
    assert [(each.over, each.each_mib) for each in told] == [("jobs", 20)]
    growth = it.registry.get("tts").growth
    assert (growth.verdict, growth.grown_mib) == ("leaks", 59 * 20)


def test_what_has_leaked_is_not_what_its_jobs_need() -> None:
    """They need what a fresh one needs: after the next load it holds no more than that."""
    it = Leaky()
    for job in range(39):
        it.job(4000 + 90 * job, 3000 + 90 * job)
    assert it.learned.needed("tts", Declared()).mib > 7000  # nobody can tell yet
    for job in range(39, 140):
        it.job(4000 + 90 * job, 3000 + 90 * job)
        assert it.learned.needed("tts", Declared()).mib == pytest.approx(4000, abs=100)


def test_what_a_cache_keeps_is_what_its_jobs_need() -> None:
    it = Leaky()
    for job in range(140):
        it.job(4000 + min(1000, 100 * job), 3000 + min(1000, 100 * job))
    assert it.registry.get("tts").growth.verdict == "grows"
    assert it.learned.needed("tts", Declared()).mib == 5000


def test_what_is_seen_while_a_job_ends_is_not_at_rest() -> None:
    """The reading may be of before the job's end."""
    it = Leaky()
    it.registry.job_started("tts")
    read = it.sampler._memory.read

    def slow() -> MemoryReading:
        reading = read()
        it.registry.job_finished("tts")
        return reading

    it.sampler._memory.read = slow  # type: ignore[method-assign]
    it.look(9000)
    assert it.registry.get("tts").growth.fresh_mib == 0


def test_a_leak_over_unloads_is_told() -> None:
    it = Leaky()
    for load in range(8):
        for _ in range(3):
            it.job(4000, 3000 + 50 * load)
        it.registry.set_loaded("tts", False)
        it.look(500 + 50 * load)
        it.registry.set_loaded("tts", True)
    (told,) = [event for event in it.told if isinstance(event, events.Leaking)]
    assert (told.over, told.each_mib) == ("loads", 50)


def test_its_own_figures_are_not_compared_with_the_cards() -> None:
    """They leave out what the driver adds."""
    it = Leaky(attributed=False)
    for _ in range(6):
        it.job(4000, 2500)
    it.attributed = True
    for _ in range(6):
        it.job(4000, 3000)
    growth = it.registry.get("tts").growth
    assert (growth.verdict, growth.fresh_mib, growth.grown_mib) == ("steady", 3000, 0)
    assert growth.trims_to_mib == 3000
