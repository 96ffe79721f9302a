"""Making room, on a stand-in for the card: who is unloaded, in which order, and when it stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import yaml

from gpumanager.config import ConsumerConfig, EvictionMethod, parse_config
from gpumanager.config.live import LiveConfig
from gpumanager.consumers.admission import Admission
from gpumanager.consumers.breaker import Breakers
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import InUse, Registry
from gpumanager.errors import (
    BrokerError,
    ClientGone,
    ConsumerTimeout,
    ConsumerUnhealthy,
    ConsumerUnreachable,
    InsufficientVram,
    NoConsumer,
)
from gpumanager.model import (
    GpuProcess,
    GpuState,
    Growth,
    Holdings,
    Job,
    MemoryReading,
    ProbeReport,
    StoppedBy,
)
from gpumanager.residency.census import Census
from gpumanager.residency.room import RoomMaker
from gpumanager.scheduling.factory import locked
from gpumanager.scheduling.interface import Release
from gpumanager.scheduling.queue import Granted
from gpumanager.telemetry.events import (
    Event,
    Evicted,
    LoadGivenUp,
    TriedAnyway,
    TrimFailed,
    Trimmed,
)
from gpumanager.upstream.calls import GivingUp
from tests.support.clock import FakeClock


class Bench:
    """A RoomMaker over consumers that obey, on a card that may be slow, or not measurable.

    `lag` is the number of looks at the card before an unload shows; None means never. `keeps` is
    what a consumer holds on to, `stolen` what a foreign process takes as soon as anything comes
    back; `attributed`: the card tells figures per process; `reporting`: the consumers tell what
    they hold.
    """

    def __init__(
        self,
        consumers: dict[str, dict[str, Any]],
        *,
        total: int,
        measured: bool = True,
        assumed: bool = False,
        **top: Any,
    ) -> None:
        self.clock = FakeClock()
        self.total = total
        self.measured = measured
        self.lag: int | None = 0
        self.foreign = 0
        self.calls: list[str] = []
        self.failing: dict[str, BrokerError] = {}
        self.pauses: list[float] = []
        self.leave_after: int | None = None
        self.on_pause: Callable[[], None] = lambda: None
        self.on_measure: Callable[[], None] = lambda: None
        self.holds: dict[str, int] = {}
        self.attributed = False
        self.reporting = False
        self.keeps: dict[str, int] = {}
        self.caches: dict[str, int] = {}
        self.stolen = 0
        self.leaking: set[str] = set()
        self.works_until: dict[str, float] = {}
        self.mute: set[str] = set()
        self.utilization: int | None = None
        self.unsettled = 0
        self.asked_at: list[float] = []
        self.failing_methods: dict[str, BrokerError] = {}
        self.not_ready: list[BrokerError] = []
        self.measurements = 0
        self._pending: list[list[Any]] = []
        call = {"path": "/x"}
        config = {
            "gpu": {"total_mib": 0 if measured else total, "reserved_mib": 200},
            "routing": {},
            **top,
            "consumers": {
                name: {"url": "http://127.0.0.1:1", "unload": call, **settings}
                for name, settings in consumers.items()
            },
        }
        self.config = LiveConfig(lambda: self.registry.now.config).seen
        self.queue: list[str] = []
        self.told: list[Event] = []
        self.registry = Registry(
            parse_config(yaml.safe_dump(config)), self.clock, lambda consumer: assumed
        )
        self.learned = Learned(consumers)
        self.learned.publish(self.registry.learn)
        admission = Admission(self.registry, Breakers(self.clock, self.told.append), retry_s=5)
        self.room = RoomMaker(
            self.registry,
            self.learned,
            self,
            self,
            self.measure,
            admission.check,
            self.clock,
            self.told.append,
            lambda: self.queue,
        )
        self.scheduler = locked(max_queue=9, max_wait=60, clock=self.clock)

    # -- the card and the consumers -----------------------------------------------------------

    def measure(self) -> MemoryReading | None:
        self.measurements += 1
        self.on_measure()
        if not self.measured:
            return None
        for entry in self._pending:
            entry[1] -= 1
        for name, looks in list(self._pending):
            if looks < 0 and not self.busy(name):
                self._pending.remove([name, looks])
                self._release(name)
        return self._reading()

    def _release(self, name: str) -> None:
        held = self.holds.pop(name, 0)
        if kept := self.keeps.get(name, 0):
            self.holds[name] = min(held, kept)
        self.foreign += self.stolen
        self.stolen = 0

    def _reading(self) -> MemoryReading:
        held = {name: max(0, mib) for name, mib in self.holds.items()}
        used = sum(held.values()) + self.foreign
        reading = MemoryReading(
            self.total, used, self.total - used, utilization_percent=self.utilization
        )
        if not self.attributed:
            return reading
        names = list(self.config.consumers)
        processes = [GpuProcess(10 + names.index(name), mib) for name, mib in held.items() if mib]
        if self.foreign:
            processes.append(GpuProcess(999, self.foreign, "game"))
        holdings = Holdings(
            {name: held.get(name, 0) for name in names},
            {name: (10 + names.index(name),) for name in held if held[name]},
            tuple(each for each in processes if each.pid == 999),
        )
        return replace(reading, processes=tuple(processes), holdings=holdings)

    def stop(self, name: str, method: EvictionMethod) -> StoppedBy:
        self.calls.append(f"{method.name} {name}")
        if name in self.failing_methods:
            raise self.failing_methods[name]
        self.holds.pop(name, None)
        return StoppedBy(method.name)

    def bring_back(self, name: str, stopped_by: StoppedBy) -> bool:
        self.calls.append(f"start {name} by {stopped_by.method}")
        self.holds[name] = self.config.consumers[name].vram_resident_mib
        return stopped_by.method == "checkpoint"

    def probe(self, name: str, *_: object) -> ProbeReport:
        if self.registry.get(name).stopped_by is not None:
            self.calls.append(f"probe {name}")
        if self.not_ready:
            raise self.not_ready.pop(0)
        return ProbeReport(resident_mib=self.holds.get(name, 0) if self.reporting else None)

    def busy(self, name: str, *_: object) -> bool | None:
        if name in self.mute:
            raise ConsumerTimeout(f"{name} does not answer")
        return self.clock.monotonic() < self.works_until.get(name, 0)

    def settled(self, name: str, *_: object) -> bool:
        self.asked_at.append(self.clock.monotonic())
        if self.unsettled:
            self.unsettled -= 1
            return False
        return True

    def warm(self, name: str, *_: object) -> None:
        self.calls.append(f"warm {name}")
        self.holds[name] = self.config.consumers[name].vram_resident_mib

    def load(self, name: str, *_: object) -> None:
        self.calls.append(f"load {name}")
        if name in self.failing:
            raise self.failing[name]
        self.holds[name] = self.config.consumers[name].vram_resident_mib

    def trim(self, name: str, *_: object) -> None:
        self.calls.append(f"trim {name}")
        if name in self.failing:
            raise self.failing[name]
        self.holds[name] -= self.caches.pop(name, 0)

    def unload(self, name: str, *_: object) -> bool:
        self.calls.append(f"unload {name}")
        if name in self.failing:
            raise self.failing[name]
        if self.lag is not None and name not in self.leaking:
            self._pending.append([name, self.lag])
        return True

    # -- the test's hands ---------------------------------------------------------------------

    def resident(self, name: str, *, used: float | None = None) -> None:
        """`name` is loaded and holds what it declares; its last job was `used` s ago."""
        mib = self.config.consumers[name].vram_resident_mib
        self.holds[name] = mib
        self.registry.set_loaded(name, True)
        if used is not None:
            self.clock.advance(-used)
            self.registry.job_started(name)
            self.registry.job_finished(name)
            self.clock.advance(used)

    def grown(self, name: str, mib: int, cache: int | None = None) -> None:
        """It was seen to grow by so much since its load; of that it can give back its `cache`."""
        growths, fresh = self.learned.growths, self.holds[name]
        growths.at_rest(name, fresh, 0, 0.0)
        self.holds[name] += mib
        self.caches[name] = mib if cache is None else cache
        _, growth = growths.at_rest(name, fresh + mib, 5, 0.0)
        self.registry.note_growth(name, growth)

    def reload(self, *, added: str | None = None, removed: str | None = None) -> None:
        """Put a config in force that has one consumer more, or less."""
        consumers = dict(self.registry.now.consumers)
        if added is not None:
            consumers[added] = consumers["tts"]
            self.learned.add(added)
        if removed is not None:
            del consumers[removed]
        new = self.registry.now.config.model_copy(update={"consumers": consumers})
        self.registry.reshape(new)

    def reset(self, name: str, **settings: Any) -> None:
        """Put a config in force that says something else of one consumer."""
        config = self.registry.now.config
        changed = config.consumers[name].model_copy(update=settings)
        consumers = {**config.consumers, name: changed}
        self.registry.reshape(config.model_copy(update={"consumers": consumers}))

    def ticket(self, name: str) -> Granted:
        """A ticket that was granted, and whose pauses pass at once."""
        settings = self.registry.now.consumers[name]
        ticket = self.scheduler.enqueue(Job(name, "tts", settings=settings))
        behind = [self.scheduler.enqueue(Job(each, "tts")) for each in self.queue]
        bench = self

        class Watched:
            number, job, waited_s, prepared_s = ticket.number, ticket.job, 0.0, 0.0
            wait, cancel = ticket.wait, ticket.cancel
            next_step, idle_others = ticket.next_step, ticket.idle_others
            idle_trims = ticket.idle_trims
            when_cancelled, relieve = ticket.when_cancelled, ticket.relieve
            when_granted = ticket.when_granted

            def pause(self, seconds: float) -> None:
                bench.clock.advance(seconds)
                bench.pauses.append(seconds)
                bench.on_pause()
                if bench.leave_after is not None and len(bench.pauses) > bench.leave_after:
                    ticket.cancel(ClientGone("left"))
                ticket.pause(0)

            def close(self) -> None:
                for each in (*behind, ticket):
                    each.close()

        return Watched()

    def make_room(self, name: str) -> None:
        ticket = self.ticket(name)
        try:
            self.room.make_room(ticket)
        finally:
            ticket.close()

    def relieve(self, name: str) -> bool:
        ticket = self.ticket(name)
        try:
            return self.room.relieve(ticket)
        finally:
            ticket.close()

    def unload_for_operator(self, name: str) -> Release:
        ticket = self.ticket(name)
        try:
            return self.room.unload(name, ticket)
        finally:
            ticket.close()


THREE = {
    "tts": {"vram_resident_mib": 3000},
    "stt": {"vram_resident_mib": 2000},
    "llm": {"vram_resident_mib": 6000},
}


SETTLING: dict[str, dict[str, Any]] = {
    **THREE,
    "tts": {
        "vram_resident_mib": 3000,
        "settled": {"path": "/s", "until": "idle", "every": 1, "timeout": 12},
    },
}


def test_what_fits_touches_nobody() -> None:
    bench = Bench(THREE, total=24000)
    bench.resident("tts", used=5)
    bench.make_room("llm")
    assert bench.calls == []
    assert bench.room.evictions == 0


def sampled(bench: Bench) -> None:
    """The sampler has just looked."""
    bench.registry.set_gpu(GpuState(bench._reading(), bench.clock.monotonic()))


def test_one_that_holds_what_it_needs_by_a_fresh_sample_costs_no_look_at_the_card() -> None:
    bench = Bench(THREE, total=24000)
    bench.attributed = True
    bench.resident("llm", used=5)
    sampled(bench)
    bench.make_room("llm")
    assert bench.measurements == 0


@pytest.mark.parametrize("stopped_by", [False, True])
def test_ready_is_who_has_nothing_to_be_done_for_it(stopped_by: bool) -> None:
    bench = Bench(THREE, total=24000)
    bench.attributed = True
    bench.resident("llm", used=5)
    sampled(bench)
    assert not bench.room.ready(Job("llm", "tts"))  # the first probes may say otherwise yet
    bench.clock.advance(5)
    sampled(bench)
    assert bench.room.ready(Job("llm", "tts"))
    assert not bench.room.ready(Job("tts", "tts"))
    if stopped_by:
        bench.registry.mark_stopped("llm", StoppedBy("signal"))
    else:
        bench.registry.probe_failed("llm", "refused")
    assert not bench.room.ready(Job("llm", "tts"))
    assert bench.measurements == 0


def test_none_is_ready_while_others_are_assumed_to_be_loaded_that_cannot_be() -> None:
    bench = Bench(THREE, total=7000, measured=False, assumed=True)
    bench.registry.set_gpu(GpuState(err="no driver"))
    bench.resident("llm")
    bench.clock.advance(5)
    assert not bench.room.ready(Job("llm", "tts"))
    bench.make_room("llm")
    assert not bench.registry.get("tts").loaded
    assert bench.room.ready(Job("llm", "tts"))


def test_whether_a_job_is_ready_is_told_by_the_settings_of_its_admission() -> None:
    bench = Bench(THREE, total=24000)
    bench.attributed = True
    bench.resident("llm", used=5)
    bench.clock.advance(5)
    sampled(bench)
    settings = bench.registry.now.config.consumers["llm"]
    larger = settings.model_copy(update={"vram_resident_mib": 9000})
    assert bench.room.ready(Job("llm", "tts", settings=settings))
    assert not bench.room.ready(Job("llm", "tts", settings=larger))


def test_a_stale_sample_is_not_believed() -> None:
    bench = Bench(THREE, total=24000)
    bench.attributed = True
    bench.resident("llm", used=5)
    sampled(bench)
    bench.clock.advance(2.5)
    bench.make_room("llm")
    assert bench.measurements == 1


def test_a_sample_from_before_an_eviction_is_not_believed() -> None:
    bench = Bench(THREE, total=9000)
    bench.attributed = True
    bench.resident("llm", used=5)
    sampled(bench)
    bench.make_room("tts")
    assert bench.calls == ["unload llm"]
    bench.registry.set_loaded("llm", True)
    bench.holds["tts"] = 3000
    bench.make_room("llm")
    assert bench.calls == ["unload llm", "unload tts"]


def test_without_a_card_to_ask_the_ledgers_word_is_enough() -> None:
    bench = Bench(THREE, total=9000, measured=False)
    bench.resident("llm", used=5)
    bench.registry.set_gpu(GpuState(err="no driver"))
    bench.make_room("llm")
    assert bench.measurements == 0


def test_the_reserve_is_promised_to_nobody() -> None:
    bench = Bench(THREE, total=9000)  # 3000 + 6000 fit, but not with the reserve
    bench.resident("tts", used=5)
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_the_least_recently_used_goes_and_no_more_than_needed() -> None:
    bench = Bench(THREE, total=9500)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]
    assert not bench.registry.get("tts").loaded
    assert bench.registry.get("stt").loaded
    assert bench.room.evictions == 1


def test_the_next_goes_only_if_it_still_does_not_fit() -> None:
    bench = Bench(THREE, total=7000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unload stt"]


def test_a_victim_that_frees_more_than_declared_saves_the_next() -> None:
    bench = Bench(THREE, total=9500)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.holds["tts"] = 4000  # more than the 3000 it declares
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


@pytest.mark.parametrize("lag", [1, 5, 30])
def test_memory_that_comes_back_late_is_waited_for_not_another_victim(lag: int) -> None:
    bench = Bench(THREE, total=9500)
    bench.lag = lag
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]
    assert bench.pauses


def test_memory_that_never_comes_back_is_waited_for_only_so_long() -> None:
    bench = Bench(THREE, total=9100)
    bench.lag = None
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    began = bench.clock.monotonic()
    with pytest.raises(InsufficientVram):
        bench.make_room("llm")
    assert bench.clock.monotonic() - began <= bench.config.gpu.release_timeout + 1
    assert bench.calls == ["unload tts"]  # the other one alone would not have been enough


def test_in_vain_nobody_is_unloaded_and_the_refusal_names_the_holders() -> None:
    bench = Bench(THREE, total=7000)
    bench.resident("tts", used=50)
    bench.foreign = 3000
    with pytest.raises(InsufficientVram) as refused:
        bench.make_room("llm")
    assert bench.calls == []
    message = refused.value.message
    assert refused.value.consumer == "llm"
    assert refused.value.retry_after is not None
    # 7000 - 3000 foreign - 200 reserve = 3800 at best for the 6000 it needs
    assert "2200 MiB short" in message
    assert "tts 3000 MiB" in message
    assert "others 3000 MiB" in message


def test_one_that_is_spared_is_never_unloaded() -> None:
    bench = Bench(
        {
            "managed": {"vram_resident_mib": 3000, "vram_managed": True},
            "friend": {"vram_resident_mib": 1000},
            "fixed": {"vram_resident_mib": 1000, "unload": None},
            "victim": {"vram_resident_mib": 2000},
            "llm": {"vram_resident_mib": 2000, "can_coexist_with": ["friend"]},
        },
        total=8000,
    )
    for name in ("managed", "friend", "fixed"):
        bench.resident(name)
    bench.resident("victim", used=0)
    bench.make_room("llm")
    assert bench.calls == ["unload victim"]


def test_whose_job_waits_is_not_unloaded_for_another() -> None:
    bench = Bench(THREE, total=9500)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.queue = ["tts", "removed by a reload"]
    (victim,) = bench.room.preview(Job("llm", "llm")).victims
    assert (victim.name, victim.wanted) == ("stt", None)
    bench.queue = ["tts", "stt"]
    (victim,) = bench.room.preview(Job("llm", "llm")).victims
    assert (victim.name, victim.wanted) == ("stt", 2)
    bench.make_room("llm")
    assert bench.calls == ["unload stt"]


def test_one_that_was_never_seen_to_load_is_taken_to_load_as_the_others_do() -> None:
    bench = Bench(THREE, total=24000)

    def reload_s() -> dict[str, float]:
        residents = Census(bench.registry.now, bench.clock.monotonic()).residents()
        return {each.name: each.reload_s for each in residents}

    assert reload_s() == {"tts": 5, "stt": 5, "llm": 5}
    bench.learned.loaded("tts", 0.01)  # too little to tell it from any other
    bench.learned.loaded("llm", 9)
    assert reload_s() == {"tts": 1, "stt": 5, "llm": 9}


def test_an_unload_that_fails_leaves_the_next_to_try() -> None:
    bench = Bench(THREE, total=9300)  # without either of them it fits
    bench.resident("stt", used=50)
    bench.resident("tts", used=10)
    bench.failing["stt"] = ConsumerUnreachable("stt answered 500")
    bench.make_room("llm")
    assert bench.calls == ["unload stt", "unload tts"]
    assert bench.registry.get("stt").loaded
    assert bench.room.evictions == 1


def test_a_failed_unload_is_tried_once_a_job() -> None:
    bench = Bench(THREE, total=8000)
    bench.resident("tts", used=10)
    bench.failing["tts"] = ConsumerTimeout("tts: no answer within 30 s")
    for _ in range(2):
        with pytest.raises(InsufficientVram):
            bench.make_room("llm")
    assert bench.calls == ["unload tts", "unload tts"]


def test_a_target_that_was_unloaded_is_loaded_before_its_job() -> None:
    bench = Bench({**THREE, "llm": {"vram_resident_mib": 6000, "load": "/load"}}, total=9000)
    bench.resident("tts", used=5)
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "load llm"]
    assert bench.registry.get("llm").loaded
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "load llm"]


def test_a_load_that_fails_is_the_jobs_failure() -> None:
    bench = Bench({"llm": {"vram_resident_mib": 6000, "load": "/load"}}, total=9000)
    bench.failing["llm"] = ConsumerTimeout("llm: no answer within 120 s")
    with pytest.raises(ConsumerTimeout):
        bench.make_room("llm")
    assert not bench.registry.get("llm").loaded


def test_nobody_goes_for_a_target_that_died_in_line() -> None:
    bench = Bench(THREE, total=9000)
    bench.resident("tts", used=5)
    bench.registry.probe_failed("llm", "refused", process_gone=True)
    with pytest.raises(ConsumerUnhealthy):
        bench.make_room("llm")
    assert bench.calls == []


def test_a_client_that_leaves_while_room_is_made_stops_it() -> None:
    bench = Bench(THREE, total=9000)
    bench.lag = None
    bench.leave_after = 3
    bench.resident("tts", used=50)
    with pytest.raises(ClientGone):
        bench.make_room("llm")
    assert len(bench.pauses) == 4
    assert bench.scheduler.stats().in_flight == 0


def test_what_the_target_reports_to_hold_counts() -> None:
    bench = Bench(THREE, total=9000)
    bench.resident("tts", used=5)
    bench.holds["llm"] = 1000
    bench.registry.probe_succeeded("llm", ProbeReport(False, 1000), seen_version=0)
    # 9000 - 3000 - 1000 - 200 = 4800 for the 5000 it still needs
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_without_a_measurement_the_ledger_decides() -> None:
    bench = Bench(THREE, total=9000, measured=False)
    bench.resident("tts", used=5)
    bench.resident("stt", used=1)
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]
    assert set(bench.pauses) == {0}  # there is nothing to wait for


def test_in_the_ledger_a_report_outweighs_a_declaration() -> None:
    bench = Bench(THREE, total=9000, measured=False)
    bench.resident("tts", used=5)
    version = bench.registry.get("tts").residency_version
    bench.registry.probe_succeeded("tts", ProbeReport(True, 100), seen_version=version)
    bench.make_room("llm")
    assert bench.calls == []


def test_without_a_measurement_and_a_total_nothing_is_decided() -> None:
    bench = Bench(THREE, total=0, measured=False)
    bench.resident("tts", used=5)
    bench.make_room("llm")
    assert bench.calls == []


def test_a_card_that_is_lost_while_waiting_for_it_hands_over_to_the_ledger() -> None:
    bench = Bench(THREE, total=9000)
    bench.resident("tts", used=50)

    def lose_the_card(name: str, *_: object) -> bool:
        bench.calls.append(f"unload {name}")
        bench.measured = False
        return True

    bench.unload = lose_the_card  # type: ignore[method-assign]
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_evictions_are_events() -> None:
    bench = Bench(THREE, total=9000)
    bench.resident("tts", used=5)
    bench.make_room("llm")
    (event,) = evictions(bench)
    assert (event.consumer, event.target, event.mib) == ("tts", "llm", 3000)
    assert (event.method, event.outcome) == ("http", "released")


def test_what_is_assumed_gives_way_to_the_first_probes() -> None:
    """At the start both are taken for loaded; only one is, and there is no room for both."""
    probed = {"health": "/health", "load": "/load"}
    bench = Bench(
        {
            "tts": {"vram_resident_mib": 3000, **probed},
            "llm": {"vram_resident_mib": 6000, **probed},
        },
        total=8000,
    )
    bench.registry.set_loaded("tts", True)
    bench.registry.set_loaded("llm", True)
    bench.holds["tts"] = 3000

    def probes_answer() -> None:
        for name, held in (("tts", 3000), ("llm", 0)):
            version = bench.registry.get(name).residency_version
            bench.registry.probe_succeeded(name, ProbeReport(held > 0, held), seen_version=version)

    bench.on_pause = probes_answer
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "load llm"]


def test_a_probe_that_never_answers_is_waited_for_only_so_long() -> None:
    bench = Bench({"tts": {"vram_resident_mib": 3000, "health": "/health"}}, total=8000)
    began = bench.clock.monotonic()
    bench.make_room("tts")
    assert 3 < bench.clock.monotonic() - began < 5
    began = bench.clock.monotonic()
    bench.make_room("tts")
    assert bench.clock.monotonic() == began


def test_a_victim_whose_process_is_gone_took_its_memory_along() -> None:
    bench = Bench(THREE, total=9000, measured=False)
    bench.resident("tts", used=5)
    bench.failing["tts"] = ConsumerUnreachable("tts refused", nothing_listens=True)
    bench.make_room("llm")
    assert not bench.registry.get("tts").loaded
    assert bench.room.evictions == 0


def test_a_client_that_leaves_while_the_model_loads_has_nothing_sent() -> None:
    bench = Bench({"llm": {"vram_resident_mib": 6000, "load": "/load"}}, total=9000)
    bench.leave_after = 0
    with pytest.raises(ClientGone):
        bench.make_room("llm")
    assert bench.calls == ["load llm"]


# -- by the victim's own memory, and method by method ---------------------------------------------

METHODS = ["http", {"unit": "tts.service"}]


def attributed(consumers: dict[str, dict[str, Any]], *, total: int, **top: Any) -> Bench:
    bench = Bench(consumers, total=total, **top)
    bench.attributed = True
    return bench


def evictions(bench: Bench) -> list[Evicted]:
    return [event for event in bench.told if isinstance(event, Evicted)]


def outcome(bench: Bench) -> list[tuple[str, str]]:
    return [(event.method, event.outcome) for event in evictions(bench)]


def test_the_room_itself_is_what_the_processes_hold() -> None:
    bench = attributed(THREE, total=9500)
    bench.resident("tts", used=50)
    bench.holds["tts"] = 200  # whatever it declares
    bench.make_room("llm")
    assert bench.calls == []


def test_what_leaks_goes_to_its_next_method() -> None:
    bench = attributed({**THREE, "tts": {"vram_resident_mib": 3000, "evict": METHODS}}, total=9000)
    bench.lag = None
    bench.resident("tts", used=50)
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unit tts"]
    assert outcome(bench) == [("http", "leaked"), ("unit", "released")]
    state = bench.registry.get("tts")
    assert (state.stopped_by, state.quarantine, state.loaded) == (StoppedBy("unit"), "", False)
    assert bench.room.evictions == 1


def test_what_its_unload_leaves_behind_is_freed_by_the_method_that_ends_its_process() -> None:
    bench = attributed({**THREE, "tts": {"vram_resident_mib": 3000, "evict": METHODS}}, total=9000)
    bench.registry.note_growth("tts", Growth("leaks", "loads", mib_per_load=200))
    bench.resident("tts", used=50)
    bench.make_room("llm")
    assert bench.calls == ["unit tts"]


def test_what_leaks_with_its_jobs_is_unloaded_by_its_call() -> None:
    bench = attributed({**THREE, "tts": {"vram_resident_mib": 3000, "evict": METHODS}}, total=9000)
    bench.registry.note_growth("tts", Growth("leaks", "jobs", mib_per_job=5.0))
    bench.resident("tts", used=50)
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_what_has_leaked_too_much_for_its_own_next_job_is_loaded_anew_for_it() -> None:
    settings = {"vram_resident_mib": 3000, "load": "/load", "pinned": False}
    bench = attributed({**THREE, "tts": settings}, total=9000)
    bench.resident("tts", used=5)
    for _ in range(3):
        bench.learned.held("tts", 4000)  # at work
        bench.learned.ran("tts", 1)
    bench.holds["tts"] = 8500
    growth = Growth("leaks", "jobs", 3000, grown_mib=5500, mib_per_job=100.0, jobs=55)
    bench.registry.note_growth("tts", growth)
    bench.make_room("tts")
    assert bench.calls == ["unload tts", "load tts"]
    assert outcome(bench) == [("http", "released")]


def test_what_leaks_by_every_method_is_quarantined_and_the_next_goes() -> None:
    bench = attributed(THREE, total=11_500)
    bench.leaking = {"tts"}
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.foreign = 400
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unload stt"]
    reason = bench.registry.get("tts").quarantine
    assert reason == "gave back 0 of 3000 MiB after http, and holds 3000 MiB"
    # From now on it is not asked, and a plan without it is made.
    bench.resident("stt", used=10)
    bench.holds.pop("llm", None)
    bench.calls.clear()
    bench.make_room("llm")
    assert bench.calls == ["unload stt"]


def late_by(bench: Bench, seconds: float) -> None:
    """What is unloaded comes back so late."""
    due: dict[str, float] = {}
    bench.lag = None
    unload = bench.unload

    def note(name: str, *_: object) -> bool:
        unload(name)
        due[name] = bench.clock.monotonic() + seconds
        return True

    def come() -> None:
        for name in [name for name, at in due.items() if bench.clock.monotonic() >= at]:
            del due[name]
            bench.holds.pop(name, None)

    bench.unload, bench.on_pause = note, come  # type: ignore[method-assign]


def test_memory_that_comes_later_than_a_release_may_take_refuses_nobody() -> None:
    """A driver that shows it 12 s later, where 10 s are allowed."""
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=50)
    late_by(bench, 12)
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert 12 <= bench.clock.monotonic() - began < 13
    assert bench.calls == ["unload tts"]


def test_memory_that_never_comes_is_waited_for_so_long_once_only() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=50)
    bench.lag = None

    def waits() -> float:
        began = bench.clock.monotonic()
        with pytest.raises(InsufficientVram):
            bench.make_room("llm")
        return bench.clock.monotonic() - began

    assert 30 <= waits() < 31
    assert waits() < 1  # it is in quarantine
    bench.clock.advance(120)
    assert 10 <= waits() < 11  # it was late before
    assert bench.calls == ["unload tts", "unload tts"]


def test_after_a_leak_nobody_goes_in_vain_and_the_refusal_names_it() -> None:
    bench = attributed(THREE, total=11_500)
    bench.lag = None
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.foreign = 2400
    with pytest.raises(InsufficientVram) as refused:
        bench.make_room("llm")
    assert bench.calls == ["unload tts"]
    message = refused.value.message
    assert message.startswith("tts was unloaded, but gave nothing back; llm needs 6000 MiB")
    assert "100 MiB short" in message
    assert "tts 3000 MiB" in message
    assert "game (pid 999) 2400 MiB" in message


def asleep(bench: Bench, name: str, holds: int) -> None:
    """`name` says that it has nothing loaded, and its process holds so much all the same."""
    bench.holds[name] = holds
    version = bench.registry.get(name).residency_version
    bench.registry.probe_succeeded(name, ProbeReport(loaded=False), seen_version=version)


def test_one_that_sleeps_is_not_asked_to_again() -> None:
    bench = attributed(THREE, total=9500)
    asleep(bench, "tts", 900)  # by itself, as llama.cpp's server does
    bench.resident("stt", used=10)
    bench.foreign = 500
    bench.make_room("llm")
    assert bench.calls == ["unload stt"]
    assert bench.registry.get("tts").quarantine == ""


def test_one_that_sleeps_may_still_be_stopped() -> None:
    bench = attributed({**THREE, "tts": {"vram_resident_mib": 3000, "evict": METHODS}}, total=7000)
    asleep(bench, "tts", 900)
    bench.make_room("llm")
    assert bench.calls == ["unit tts"]


def test_one_that_was_put_to_sleep_and_kept_much_is_not_asked_again() -> None:
    """Nor where it cannot tell whether it sleeps."""
    bench = attributed(THREE, total=12_000)
    bench.keeps["tts"] = 900
    bench.resident("tts", used=50)
    bench.unload_for_operator("tts")
    bench.resident("stt", used=10)
    bench.total = 900 + 2000 + 6000
    bench.calls.clear()
    bench.make_room("llm")
    assert bench.calls == ["unload stt"]


def test_one_that_cannot_tell_and_was_loaded_by_others_is_asked() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=50)
    bench.make_room("llm")
    bench.holds["tts"] = 2900  # as a user of ComfyUI's own page does
    bench.calls.clear()
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_one_that_leaked_is_asked_again_after_a_while_and_forgiven() -> None:
    bench = attributed(THREE, total=9000)
    bench.lag = None
    for seconds in (60, 120):
        bench.resident("tts", used=50)
        bench.calls.clear()
        for calls in (["unload tts"], ["unload tts"]):
            with pytest.raises(InsufficientVram):
                bench.make_room("llm")
            assert bench.calls == calls
        bench.clock.advance(seconds)
    bench.lag = 0
    bench.resident("tts", used=50)
    bench.make_room("llm")
    state = bench.registry.get("tts")
    assert (state.quarantine, state.leaks) == ("", 0)


def test_one_that_did_not_listen_is_asked_again_though_it_was_unloaded() -> None:
    """It said yes, held on to all of it, and cannot tell whether it is loaded."""
    bench = attributed(THREE, total=9000)
    bench.lag = None
    bench.resident("tts", used=50)
    with pytest.raises(InsufficientVram):
        bench.make_room("llm")
    bench.lag = 0
    bench.clock.advance(60)
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unload tts"]


def test_a_quarantine_says_when_most_has_come_back() -> None:
    """vLLM asleep keeps more than a bare process: that is no reason to stay in it."""
    llm = {"vram_resident_mib": 7000, "floor_mib": 5800}
    bench = attributed({"llm": llm, "tts": {"vram_resident_mib": 1000}}, total=7500)
    bench.lag = None
    bench.resident("llm", used=50)
    with pytest.raises(InsufficientVram):
        bench.make_room("tts")
    assert bench.registry.get("llm").quarantine_mib == 7000 - 600


def test_in_quarantine_it_still_does_its_own_jobs() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=50)
    bench.registry.quarantine("tts", "gave nothing back")
    bench.make_room("tts")
    assert bench.calls == []


def test_a_method_that_cannot_be_carried_out_leads_to_the_next() -> None:
    eviction_methods = ["http", {"container": "tts"}]
    bench = attributed(
        {**THREE, "tts": {"vram_resident_mib": 3000, "evict": eviction_methods}}, total=9000
    )
    bench.resident("tts", used=50)
    bench.failing["tts"] = ConsumerUnreachable("tts answered 500")
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "container tts"]


def test_methods_that_all_fail_leave_the_next_candidate() -> None:
    bench = attributed({**THREE, "tts": {"vram_resident_mib": 3000, "evict": METHODS}}, total=9500)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.failing["tts"] = ConsumerUnreachable("tts answered 500")
    bench.failing_methods["tts"] = ConsumerUnreachable("no such unit")
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unit tts", "unload stt"]
    assert bench.registry.get("tts").loaded


@pytest.mark.parametrize("method", [{"unit": "tts.service"}, {"checkpoint": True}])
def test_who_was_stopped_is_brought_back_for_its_job(method: dict[str, Any]) -> None:
    tts = {"vram_resident_mib": 3000, "evict": [method], "health": "/health"}
    bench = attributed({**THREE, "tts": tts}, total=9000)
    bench.registry.probe_succeeded("tts", ProbeReport(), seen_version=0)
    bench.resident("tts", used=50)
    bench.make_room("llm")
    kind = next(iter(method))
    assert bench.calls == [f"{kind} tts"]
    bench.resident("llm", used=10)
    bench.not_ready = [ConsumerUnreachable("tts refused")] * 3
    bench.calls.clear()
    bench.make_room("tts")
    probes = [] if kind == "checkpoint" else ["probe tts"] * 4
    assert bench.calls == ["unload llm", f"start tts by {kind}", *probes]
    state = bench.registry.get("tts")
    assert (state.stopped_by, state.healthy) == (None, True)
    assert bench.learned.figures("tts").load_s is not None


def test_who_never_gets_ready_is_the_jobs_failure() -> None:
    tts = {"vram_resident_mib": 3000, "evict": [{"unit": "t.service"}], "ready_timeout": 2}
    bench = attributed({**THREE, "tts": tts}, total=9000)
    bench.registry.mark_stopped("tts", StoppedBy("unit"))
    bench.not_ready = [ConsumerUnreachable("tts refused")] * 100
    with pytest.raises(ConsumerTimeout, match="not ready within 2 s: tts refused"):
        bench.make_room("tts")
    assert bench.registry.get("tts").stopped_by == StoppedBy("unit")


def test_a_release_in_two_steps_is_waited_for_not_another_victim() -> None:
    """Nine tenths come at once, and that is not enough; the rest comes a little later."""
    bench = attributed(THREE, total=11_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.holds["tts"] = 3000
    bench.keeps["tts"] = 250
    bench.foreign = 0

    def the_rest_comes() -> None:
        if bench.pauses.count(0.1) >= 2:
            bench.holds.pop("tts", None)

    bench.on_pause = the_rest_comes
    bench.total = 3000 + 2000 + 3200  # 6000 and the reserve need all of tts
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def in_two_steps(bench: Bench, slow: str, first: int, seconds: float) -> None:
    """From now on `slow` gives `first` MiB back at once, and the rest so much later."""
    unload = bench.unload

    def begin(name: str, *_: object) -> bool:
        unload(name)
        if name != slow:
            return True
        bench.keeps[name] = bench.holds[name] - first
        due = bench.clock.monotonic() + seconds

        def go_on() -> None:
            if bench.clock.monotonic() >= due:
                bench.keeps.pop(name, None)
                bench.holds.pop(name, None)

        bench.on_pause = go_on
        return True

    bench.unload = begin  # type: ignore[method-assign]


@pytest.mark.parametrize("others", [True, False])
def test_a_release_that_begins_small_is_waited_for_and_poisons_nothing(
    others: bool,
) -> None:
    """A fifth at once, the rest 1.2 s later."""
    bench = attributed(THREE, total=8500)
    in_two_steps(bench, "tts", 600, 1.2)
    for _ in range(3):
        bench.resident("tts", used=50)
        if others:
            bench.resident("stt", used=10)
        bench.calls.clear()
        bench.make_room("llm")
        assert bench.calls == ["unload tts"]
        assert bench.learned.figures("tts").residue_mib in (None, 0)
    assert outcome(bench) == [("http", "released")] * 3


def test_what_comes_late_is_waited_for_before_anybody_is_refused() -> None:
    """The first victim's release was cut short, as another had to go anyway; that one's is not
    enough without the rest of it."""
    bench = attributed(THREE, total=6300)
    in_two_steps(bench, "tts", 600, 3)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unload stt"]
    assert bench.learned.figures("tts").residue_mib is None


def test_a_release_that_was_enough_before_its_end_teaches_no_residue() -> None:
    bench = attributed(THREE, total=9000)
    in_two_steps(bench, "tts", 600, 1.2)
    bench.resident("tts", used=50)
    bench.foreign = 0
    bench.total = 3000 + 6200 - 500  # a fifth of tts is enough
    bench.make_room("llm")
    assert bench.holds["tts"] == 2400
    assert bench.learned.figures("tts").residue_mib is None


def test_what_a_victim_keeps_is_known_the_next_time() -> None:
    bench = attributed(THREE, total=6500)
    bench.keeps["tts"] = 900
    bench.resident("tts", used=50)
    began = bench.clock.monotonic()
    with pytest.raises(InsufficientVram, match="600 MiB short"):
        bench.make_room("llm")  # 3000 from tts would do, 2100 do not
    assert bench.clock.monotonic() - began >= bench.config.gpu.release_timeout
    assert bench.learned.figures("tts").residue_mib == 900
    bench.resident("tts", used=50)
    bench.foreign = 1400
    began = bench.clock.monotonic()
    bench.told.clear()
    bench.make_room("stt")  # needs 100 of it, and no wait for what is known to stay
    assert bench.clock.monotonic() - began < 1
    assert outcome(bench) == [("http", "released")]


def test_what_a_victim_kept_once_refuses_nobody_untried() -> None:
    bench = attributed(THREE, total=6500)
    bench.learned.unloaded("tts", 1.0, 900)
    bench.resident("tts", used=50)
    assert [each.name for each in bench.room.preview(Job("llm", "llm")).victims] == ["tts"]
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]
    assert bench.learned.figures("tts").residue_mib == 0


def test_what_is_declared_to_stay_is_not_expected_back() -> None:
    llm = {"vram_resident_mib": 7000, "floor_mib": 5800}
    bench = attributed({"llm": llm, "tts": {"vram_resident_mib": 1000}}, total=7500)
    bench.keeps["llm"] = 5800
    bench.resident("llm", used=50)
    bench.make_room("tts")
    assert outcome(bench) == [("http", "released")]


def test_a_thief_is_named_and_the_plan_made_anew() -> None:
    bench = attributed(THREE, total=8500)
    bench.stolen = 3000
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    with pytest.raises(InsufficientVram):
        bench.make_room("llm")
    assert outcome(bench) == [("http", "stolen")]
    assert bench.registry.get("tts").quarantine == ""
    assert bench.registry.get("stt").loaded  # its 2000 would not be enough either


def test_memory_that_somebody_else_gives_back_lets_the_job_run() -> None:
    bench = attributed(THREE, total=9500)
    bench.lag = None
    bench.resident("tts", used=50)
    bench.foreign = 3000

    def the_game_ends() -> None:
        bench.foreign = 0

    bench.on_pause = the_game_ends
    began = bench.clock.monotonic()
    bench.total = 12_000
    bench.make_room("llm")
    assert bench.clock.monotonic() - began < 2
    assert bench.registry.get("tts").quarantine == ""
    # That it has given nothing back yet does not say that it keeps all of it.
    assert bench.learned.figures("tts").kept_mib is None


@pytest.mark.parametrize("measured", [True, False])
def test_the_consumers_own_word_is_waited_for_too(measured: bool) -> None:
    bench = Bench(SETTLING, total=9000, measured=measured)
    bench.resident("tts", used=50)
    bench.unsettled = 7
    bench.make_room("llm")
    assert bench.unsettled == 0
    assert bench.registry.get("tts").quarantine == ""
    # It is asked as often as it is said to, however often the card is looked at.
    gaps = [later - now for now, later in pairwise(bench.asked_at)]
    assert len(gaps) == 7
    assert [round(gap) for gap in gaps] == [1] * 7, gaps


@pytest.mark.parametrize("measured", [True, False])
def test_one_that_does_not_say_so_is_not_waited_for_for_ever(measured: bool) -> None:
    bench = Bench(SETTLING, total=9000, measured=measured)
    bench.resident("tts", used=50)
    bench.unsettled = 1000
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert 12 <= bench.clock.monotonic() - began < 12.2


@pytest.mark.parametrize("word", ["at once", "never"])
def test_a_server_that_needs_longer_than_the_card_is_given_its_own_time(word: str) -> None:
    """Its `settled` says 12 s, though `gpu.release_timeout` says 10."""
    bench = attributed(SETTLING, total=9000)
    bench.lag = None
    bench.resident("tts", used=50)
    bench.unsettled = 0 if word == "at once" else 1000
    began = bench.clock.monotonic()

    def the_memory_comes() -> None:
        if bench.clock.monotonic() - began >= 11:
            bench.holds.pop("tts", None)

    bench.on_pause = the_memory_comes
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]
    assert bench.registry.get("tts").quarantine == ""


def test_after_a_stop_there_is_nobody_left_to_ask() -> None:
    tts = {**SETTLING["tts"], "evict": [{"unit": "tts.service"}]}
    bench = attributed({**THREE, "tts": tts}, total=9000)
    bench.resident("tts", used=50)
    bench.unsettled = 1000
    bench.make_room("llm")
    assert bench.asked_at == []


def test_what_jobs_were_seen_to_hold_counts_as_needed() -> None:
    bench = attributed(THREE, total=10_000)
    bench.resident("tts", used=50)
    bench.learned.held("llm", 6900)
    bench.make_room("llm")  # 6000 would fit beside the 3000 of tts
    assert bench.calls == ["unload tts"]


def test_what_was_learned_never_asks_for_more_than_the_card_has() -> None:
    bench = attributed(THREE, total=7000)
    bench.learned.ran_out("llm", 6000)  # 7500 from now on
    bench.make_room("llm")


def test_relief_unloads_all_others_but_those_that_may_not_go() -> None:
    bench = attributed(
        {
            **THREE,
            "pinned": {"vram_resident_mib": 500, "pinned": True},
            "friend": {"vram_resident_mib": 500},
            "llm": {"vram_resident_mib": 3000, "can_coexist_with": ["friend"]},
        },
        total=20_000,
    )
    for name in ("tts", "stt", "pinned", "friend", "llm"):
        bench.resident(name, used=5)
    assert bench.relieve("llm")
    assert sorted(bench.calls) == ["unload friend", "unload stt", "unload tts"]
    assert not bench.relieve("llm")  # nobody is left


def test_relief_that_gives_nothing_back_is_none() -> None:
    bench = attributed(THREE, total=20_000)
    bench.lag = None
    bench.resident("tts", used=5)
    assert not bench.relieve("llm")


# -- what can be given back while it stays loaded ------------------------------------------------

TRIMMED = {
    name: {**settings, "trim": "/trim"} if name != "llm" else settings
    for name, settings in THREE.items()
}


def trims(bench: Bench) -> list[tuple[str, str, int, int]]:
    return [
        (each.consumer, each.outcome, each.mib, each.expected_mib)
        for each in bench.told
        if isinstance(each, Trimmed)
    ]


def test_a_trim_that_is_enough_comes_before_an_unload() -> None:
    bench = attributed(TRIMMED, total=12_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000)
    preview = bench.room.preview(Job("llm", "llm"))
    assert [(each.name, each.method, each.mib) for each in preview.victims] == [
        ("stt", "trim", 1000)
    ]
    assert not preview.fits
    bench.make_room("llm")
    assert bench.calls == ["trim stt"]
    assert trims(bench) == [("stt", "released", 1000, 1000)]
    assert evictions(bench) == []
    assert bench.room.evictions == 0
    assert bench.registry.get("stt").loaded
    assert bench.registry.get("stt").quarantine == ""


@pytest.mark.parametrize("cannot_go", [{"pinned": True}, {"unload": None}], ids=["pinned", "never"])
def test_who_stays_may_be_trimmed_all_the_same(cannot_go: dict[str, Any]) -> None:
    bench = attributed({**TRIMMED, "stt": {**TRIMMED["stt"], **cannot_go}}, total=9000)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000)
    bench.make_room("llm")
    assert bench.calls == ["trim stt"]


def test_who_may_coexist_may_be_trimmed_all_the_same() -> None:
    llm = {**THREE["llm"], "can_coexist_with": ["stt"]}
    bench = attributed({**TRIMMED, "llm": llm}, total=9000)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000)
    bench.make_room("llm")
    assert bench.calls == ["trim stt"]


def test_a_trim_that_would_not_be_enough_is_left_out() -> None:
    bench = attributed(TRIMMED, total=10_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.grown("stt", 500)
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_before_a_refusal_all_are_trimmed_that_may_be_enough() -> None:
    pinned = {**TRIMMED["stt"], "pinned": True}
    bench = attributed({**TRIMMED, "stt": pinned}, total=8500)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.holds["tts"] = 2000  # by the card it holds less than it declares
    bench.grown("stt", 1000)
    bench.make_room("llm")
    assert bench.calls == ["trim stt", "unload tts"]


@pytest.mark.parametrize("gives", [0, 50])
def test_a_trim_that_gave_nothing_is_not_tried_again_and_is_no_leak(gives: int) -> None:
    bench = attributed(TRIMMED, total=12_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000, cache=gives)
    bench.make_room("llm")
    assert bench.calls == ["trim stt", "unload tts"]
    assert trims(bench) == [("stt", "leaked", gives, 1000)]
    assert bench.registry.get("stt").quarantine == ""
    bench.holds.pop("llm", None)
    bench.registry.set_loaded("llm", False)
    bench.resident("tts", used=50)
    bench.calls.clear()
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]  # nothing is expected of it any more


def test_a_trim_that_gave_part_is_taken_to_give_what_has_grown_since() -> None:
    bench = attributed(TRIMMED, total=12_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000, cache=600)
    bench.make_room("llm")
    assert bench.calls == ["trim stt"]
    assert trims(bench) == [("stt", "partial", 600, 1000)]
    assert bench.registry.get("stt").growth.trims_to_mib == 2400
    card = Census(bench.registry.now.seeing(bench.measure()), bench.clock.monotonic()).card()
    assert card.standing("stt").resident.trim_mib == 0
    bench.holds["stt"] += 300
    card = Census(bench.registry.now.seeing(bench.measure()), bench.clock.monotonic()).card()
    assert card.standing("stt").resident.trim_mib == 300


def test_one_that_cannot_be_asked_is_passed_over() -> None:
    bench = attributed(TRIMMED, total=12_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000)
    bench.failing["stt"] = ConsumerUnreachable("stt answered 400", consumer="stt")
    bench.make_room("llm")
    assert bench.calls == ["trim stt", "unload tts"]
    assert [each.reason for each in bench.told if isinstance(each, TrimFailed)] == [
        "stt answered 400"
    ]


def test_one_that_works_for_somebody_else_is_not_trimmed() -> None:
    busy = {"path": "/h", "busy": "busy"}
    bench = attributed({**TRIMMED, "stt": {**TRIMMED["stt"], "probe": busy}}, total=12_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000)
    bench.works_until["stt"] = bench.clock.monotonic() + 60
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


@pytest.mark.parametrize(
    "why", ["manages its memory", "leaks", "is only assumed", "has no call", "works", "noise"]
)
def test_who_is_not_trimmed(why: str) -> None:
    stt = dict(TRIMMED["stt"])
    if why == "manages its memory":
        stt["vram_managed"] = True
    if why == "has no call":
        del stt["trim"]
    bench = attributed({**TRIMMED, "stt": stt}, total=12_000 if why != "noise" else 11_040)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000 if why != "noise" else 40)
    if why == "leaks":
        growth = replace(bench.registry.get("stt").growth, verdict="leaks", over="jobs")
        bench.registry.note_growth("stt", growth)
    if why == "is only assumed":
        state = bench.registry.get("stt")
        bench.registry._change("stt", lambda _: replace(state, assumed=0.0))
    if why == "works":
        bench.registry.job_started("stt")
    card = Census(bench.registry.now.seeing(bench.measure()), bench.clock.monotonic()).card()
    assert card.standing("stt").resident.trim_mib == 0
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_relief_has_those_that_stay_give_back_what_they_can() -> None:
    bench = attributed(
        {**TRIMMED, "tts": {**TRIMMED["tts"], "pinned": True}, "llm": {"vram_resident_mib": 3000}},
        total=20_000,
    )
    for name in ("tts", "stt", "llm"):
        bench.resident(name, used=5)
    bench.grown("tts", 1000)
    bench.grown("stt", 1000)
    assert bench.relieve("llm")
    assert bench.calls == ["unload stt", "trim tts"]


def test_a_trim_ends_with_its_ticket() -> None:
    bench = attributed(TRIMMED, total=12_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=5)
    bench.grown("stt", 1000, cache=0)
    bench.leave_after = 3
    with pytest.raises(ClientGone):
        bench.make_room("llm")
    assert bench.calls == ["trim stt"]


def test_a_preview_acts_on_nothing() -> None:
    bench = attributed({**THREE, "llm": {"vram_resident_mib": 6000, "load": "/l"}}, total=9500)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    preview = bench.room.preview(Job("llm", "llm"))
    assert (preview.fits, preview.short_mib, preview.must_load) == (False, 0, True)
    assert [(victim.name, victim.mib) for victim in preview.victims] == [("tts", 3000)]
    assert (preview.needed_mib, preview.held_mib, preview.balance.free_mib) == (6000, 0, 4500)
    bench.foreign = 3600
    preview = bench.room.preview(Job("llm", "llm"))
    assert (preview.fits, preview.victims, preview.short_mib) == (False, (), 300)
    assert bench.calls == []


def test_who_is_pinned_never_goes() -> None:
    bench = attributed({**THREE, "tts": {"vram_resident_mib": 3000, "pinned": True}}, total=9000)
    bench.resident("tts", used=50)
    with pytest.raises(InsufficientVram):
        bench.make_room("llm")
    assert bench.calls == []


def test_an_operators_unload_lifts_a_quarantine_that_was_in_error() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=5)
    bench.registry.quarantine("tts", "gave nothing back")
    release = bench.unload_for_operator("tts")
    assert (release.outcome, release.mib) == ("released", 3000)
    assert bench.registry.get("tts").quarantine == ""


def test_an_operators_unload_that_cannot_be_is_told() -> None:
    bench = attributed({**THREE, "tts": {"vram_resident_mib": 3000, "unload": None}}, total=9000)
    with pytest.raises(NoConsumer, match="no way to be unloaded"):
        bench.unload_for_operator("tts")
    bench.failing["stt"] = ConsumerUnreachable("stt answered 500")
    with pytest.raises(ConsumerUnreachable, match="could not be unloaded"):
        bench.unload_for_operator("stt")


def test_who_works_on_a_job_is_not_unloaded_under_it() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=5)
    bench.registry.job_started("tts")  # as with the passthrough scheduler
    with pytest.raises(ConsumerUnhealthy, match="works on a job"):
        bench.unload_for_operator("tts")
    assert bench.calls == []


def test_an_operators_load_warms_who_loads_with_its_first_job() -> None:
    bench = attributed({**THREE, "llm": {"vram_resident_mib": 6000, "warm": "/w"}}, total=9000)
    bench.make_room("llm")
    assert bench.calls == []
    bench.room.load("llm", bench.ticket("llm"))
    assert bench.calls == ["warm llm"]
    assert bench.registry.get("llm").loaded


def test_the_cheapest_to_reload_goes_first_where_that_is_wanted() -> None:
    bench = attributed(THREE, total=9500, eviction="cost")
    bench.resident("tts", used=50)
    bench.resident("stt", used=40)
    bench.learned.loaded("tts", 60)
    bench.learned.loaded("stt", 1)
    bench.total = 3000 + 2000 + 5200  # 6200 with the reserve: either would do
    bench.make_room("llm")
    assert bench.calls == ["unload stt"]


@pytest.mark.parametrize("how", ["failing", "silent"])
def test_where_nobody_measured_it_one_that_gave_nothing_back_may_have_had_nothing(
    how: str,
) -> None:
    bench = Bench(THREE, total=8500)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.holds["tts"] = 0  # it declares 3000, but its job failed
    if how == "failing":
        bench.not_ready = [ConsumerUnreachable("busy")]
    bench.foreign = 1500
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unload stt"]
    assert bench.registry.get("tts").quarantine == ""


def test_the_consumers_own_figure_of_that_moment_is_evidence() -> None:
    bench = Bench(THREE, total=11_500)
    bench.reporting = True
    bench.lag = None
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.foreign = 400
    with pytest.raises(InsufficientVram, match="tts was unloaded, but gave nothing back"):
        bench.make_room("llm")
    assert bench.registry.get("tts").quarantine == "gave back 0 of 3000 MiB after http"


# -- what is only assumed ------------------------------------------------------------------------

BOTH = {name: {"vram_resident_mib": 6000, "load": "/load"} for name in ("tts", "llm")}


@pytest.mark.parametrize("first", ["tts", "llm"])
def test_two_that_cannot_both_be_loaded_are_not_let_in_side_by_side(first: str) -> None:
    bench = Bench(BOTH, total=10_000, measured=False, assumed=True)
    bench.registry.set_gpu(GpuState(err="no driver"))
    other = "llm" if first == "tts" else "tts"
    for name, victim in ((first, other), (other, first), (first, other)):
        bench.calls.clear()
        bench.make_room(name)
        bench.registry.job_started(name)
        bench.registry.job_finished(name)
        # Which of them is loaded was never known: so the one is unloaded and the other loaded.
        assert bench.calls == [f"unload {victim}", f"load {name}"]


def test_what_was_confirmed_is_not_unloaded_for_itself_nor_loaded_again() -> None:
    bench = Bench(BOTH, total=13_000, measured=False, assumed=True)
    bench.registry.set_gpu(GpuState(err="no driver"))
    bench.make_room("llm")
    assert bench.calls == []  # both may be there


def test_an_assumption_that_a_job_disproved_is_dropped() -> None:
    bench = Bench(BOTH, total=10_000, measured=False, assumed=True)
    bench.registry.set_gpu(GpuState(err="no driver"))
    bench.registry.job_started("tts")
    bench.registry.job_finished("tts")
    bench.make_room("tts")
    assert not bench.registry.get("llm").loaded
    assert bench.calls == []


@pytest.mark.parametrize("measured", [False, True])
def test_nobody_is_refused_for_what_is_only_assumed(measured: bool) -> None:
    """`fixed` cannot be unloaded, and may not be there at all; or it is, and `llm` is not."""
    fixed = {"vram_resident_mib": 6000, "unload": None}
    bench = Bench(
        {"fixed": fixed, "llm": {"vram_resident_mib": 6000}, "tts": {"vram_resident_mib": 1000}},
        total=10_000,
        measured=measured,
        assumed=True,
    )
    bench.holds = {"fixed": 6000, "tts": 1000}
    bench.make_room("fixed" if measured else "llm")
    assert "unload tts" in bench.calls  # a guess may cost an eviction
    assert bench.scheduler.stats().in_flight == 0


def test_one_that_was_stopped_by_an_old_state_is_asked_before_its_memory_is_promised() -> None:
    """Somebody has started it again while the broker was away."""
    probed = {"vram_resident_mib": 6000, "health": "/health"}
    bench = Bench({"tts": probed, "llm": dict(probed)}, total=10_000, measured=False)
    bench.registry.mark_stopped("tts", StoppedBy("unit"))

    def probes_answer() -> None:
        bench.on_pause = lambda: None
        for name in ("tts", "llm"):
            version = bench.registry.get(name).residency_version
            loaded = ProbeReport(loaded=name == "tts")
            bench.registry.probe_succeeded(name, loaded, seen_version=version)

    bench.on_pause = probes_answer
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


# -- another config meanwhile --------------------------------------------------------------------


def test_a_consumer_that_is_added_while_room_is_made_does_not_disturb_it() -> None:
    bench = Bench(THREE, total=8000)
    bench.resident("llm")
    added: list[str] = []

    def reload() -> None:
        added.append(f"new{len(added)}")
        bench.reload(added=added[-1])

    bench.on_measure = reload
    bench.make_room("tts")
    assert bench.calls == ["unload llm"]
    assert added


def test_room_is_made_by_the_settings_of_the_jobs_admission() -> None:
    bench = Bench(THREE, total=8900)
    bench.resident("llm", used=20)
    bench.resident("stt", used=10)

    def reload() -> None:
        bench.on_measure = lambda: None
        bench.reset("tts", vram_resident_mib=7000)

    bench.on_measure = reload  # while the first look is taken
    bench.make_room("tts")
    assert bench.calls == ["unload llm"]
    bench.make_room("tts")  # the next one is by the new ones
    assert bench.calls == ["unload llm", "unload stt"]


def test_a_job_loads_as_was_configured_at_its_admission() -> None:
    bench = Bench({**THREE, "tts": {"vram_resident_mib": 3000, "load": "/before"}}, total=24000)
    loaded_by: list[str] = []

    def load(name: str, consumer: ConsumerConfig, *_: object) -> None:
        loaded_by.append("" if consumer.load is None else consumer.load.path)

    def reload() -> None:
        bench.on_measure = lambda: None
        bench.reset("tts", load=None)

    bench.load = load  # type: ignore[method-assign,assignment]
    bench.on_measure = reload
    bench.make_room("tts")
    assert loaded_by == ["/before"]
    bench.registry.set_loaded("tts", False)
    bench.make_room("tts")  # it has no such call any more
    assert loaded_by == ["/before"]


def test_who_may_go_for_it_is_what_the_config_in_force_says() -> None:
    """An operator's word that one is not to be evicted counts at once."""
    bench = Bench(THREE, total=8000)
    bench.resident("llm")
    ticket = bench.ticket("tts")
    bench.reset("llm", pinned=True)
    with pytest.raises(InsufficientVram, match="held by llm 6000 MiB"):
        bench.room.make_room(ticket)
    ticket.close()
    assert bench.calls == []


def test_a_victim_is_not_removed_while_it_is_unloaded() -> None:
    bench = Bench(THREE, total=8000)
    bench.resident("llm")
    bench.lag = 2
    refused: list[str] = []

    def reload() -> None:
        bench.on_pause = lambda: None
        with pytest.raises(InUse):
            bench.reload(removed="llm")
        refused.append("llm")

    bench.on_pause = reload
    bench.make_room("tts")
    assert bench.calls == ["unload llm"]
    assert refused == ["llm"]
    bench.reload(removed="llm")  # now it may go


def test_a_victim_that_was_just_removed_is_passed_over() -> None:
    bench = Bench(THREE, total=8000)
    bench.resident("llm")
    bench.resident("stt")

    def reload() -> None:
        bench.on_measure = lambda: None
        bench.reload(removed="llm")

    bench.on_measure = reload  # after the first look, in which it was there
    with pytest.raises(InsufficientVram, match="tts needs 3000 MiB"):
        bench.make_room("tts")  # what it holds is nobody's now, and stt's alone does not do
    assert bench.calls == []


# -- somebody else's job -------------------------------------------------------------------------


def telling(when_busy: str, **more: Any) -> dict[str, dict[str, Any]]:
    """The three; tts says whether it works."""
    tts = {
        "vram_resident_mib": 3000,
        "probe": {"path": "/p", "busy": "busy"},
        "unload": {"path": "/u", "when_busy": when_busy},
        **more,
    }
    return {**THREE, "tts": tts}


def at_work(bench: Bench, name: str, seconds: float) -> None:
    bench.clock.advance(5)  # the first probes have been
    bench.works_until[name] = bench.clock.monotonic() + seconds


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("when_busy", ["drains", "aborts", "unsafe"])
def test_the_end_of_somebody_elses_job_is_waited_for(when_busy: str, measured: bool) -> None:
    """A render of 14 s from ComfyUI's own page: no leak, and no refusal."""
    bench = Bench(telling(when_busy), total=9000, measured=measured)
    bench.attributed = True
    bench.resident("tts", used=50)
    at_work(bench, "tts", 14)
    began = bench.clock.monotonic()
    asked_at: list[float] = []
    unload = bench.unload

    def note(name: str, *_: object) -> bool:
        asked_at.append(bench.clock.monotonic() - began)
        unload(name)
        return True

    bench.unload = note  # type: ignore[method-assign]
    bench.make_room("llm")
    assert 14 <= bench.clock.monotonic() - began < 16
    assert bench.registry.get("tts").quarantine == ""
    (at,) = asked_at
    assert at < 1 if when_busy == "drains" else at >= 14


@pytest.mark.parametrize("when_busy", ["drains", "aborts"])
def test_who_was_left_alone_is_asked_once_the_others_were_not_enough(when_busy: str) -> None:
    """The other one kept more than was known of it; the job of somebody else is over by then."""
    bench = attributed(telling(when_busy), total=9500)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.keeps = {"stt": 1200}
    at_work(bench, "tts", 4)
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert bench.calls == ["unload stt", "unload tts"]
    assert 4 <= bench.clock.monotonic() - began < 25
    assert bench.room.evictions == 2


def test_one_that_somebody_elses_job_loads_again_is_asked_again_after_it() -> None:
    """A render from ComfyUI's own page that comes right after the unload: no leak."""
    bench = attributed(telling("drains"), total=9000)
    bench.resident("tts", used=50)
    bench.clock.advance(5)
    bench.leaking = {"tts"}  # by the time it is looked at, it has loaded again
    unload = bench.unload

    def come_right_after(name: str, *_: object) -> bool:
        unload(name)
        if len(bench.calls) == 1:
            at_work(bench, "tts", 3)
        bench.leaking = set()
        return True

    def prober() -> None:
        if not bench.registry.get("tts").busy and "tts" in bench.holds:
            version = bench.registry.get("tts").residency_version
            bench.registry.probe_succeeded("tts", ProbeReport(loaded=True), seen_version=version)

    bench.unload, bench.on_pause = come_right_after, prober  # type: ignore[method-assign]
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unload tts"]
    assert 3 <= bench.clock.monotonic() - began < 5 + 5
    assert bench.registry.get("tts").quarantine == ""
    assert bench.room.evictions == 1


@pytest.mark.parametrize("renders", [1, 3])
def test_one_that_is_loaded_again_after_its_memory_came_back_goes_again(renders: int) -> None:
    """The other half of it: the render comes when the release was seen already."""
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=50)
    again = ["tts"] * renders

    def render() -> None:
        if again and "tts" not in bench.holds:
            bench.holds[again.pop()] = 3000

    bench.on_pause = render
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert bench.calls == ["unload tts"] * (renders + 1)
    assert bench.clock.monotonic() - began < 3


@pytest.mark.parametrize("renders", [1, 3])
def test_one_that_works_for_somebody_else_after_the_unload_is_asked_again(renders: int) -> None:
    """It cannot tell whether it is loaded, only that it works."""
    bench = attributed(telling("drains"), total=9000)
    bench.resident("tts", used=50)
    bench.clock.advance(5)
    unload = bench.unload

    def come_right_after(name: str, *_: object) -> bool:
        bench.leaking = {"tts"} if len(bench.calls) < renders else set()
        unload(name)
        if bench.leaking:
            at_work(bench, "tts", 2)
        return True

    bench.unload = come_right_after  # type: ignore[method-assign]
    bench.make_room("llm")
    assert bench.calls == ["unload tts"] * (renders + 1)
    assert bench.registry.get("tts").quarantine == ""


def test_one_that_leaks_and_says_it_is_loaded_is_asked_so_often_at_most() -> None:
    bench = attributed(telling("drains"), total=9000)
    bench.resident("tts", used=50)
    bench.leaking = {"tts"}

    def prober() -> None:
        version = bench.registry.get("tts").residency_version
        bench.registry.probe_succeeded("tts", ProbeReport(loaded=True), seen_version=version)

    bench.on_pause = prober
    with pytest.raises(InsufficientVram):
        bench.make_room("llm")
    assert bench.calls == ["unload tts"] * 4
    assert bench.registry.get("tts").quarantine != ""


@pytest.mark.parametrize("when_busy", ["drains", "aborts"])
def test_a_job_of_somebody_else_without_end_is_neither_killed_nor_a_leak(when_busy: str) -> None:
    bench = attributed(telling(when_busy), total=9000)
    bench.resident("tts", used=50)
    at_work(bench, "tts", 10_000)
    began = bench.clock.monotonic()
    with pytest.raises(InsufficientVram):
        bench.make_room("llm")
    assert 120 <= bench.clock.monotonic() - began < 135
    assert bench.calls == (["unload tts"] if when_busy == "drains" else [])
    assert bench.registry.get("tts").quarantine == ""
    assert bench.room.evictions == 0


@pytest.mark.parametrize("when_busy", ["drains", "aborts"])
def test_who_works_for_somebody_else_is_left_alone_where_another_one_can_go(when_busy: str) -> None:
    bench = attributed(telling(when_busy), total=11_000)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    bench.foreign = 500
    bench.total = 3000 + 2000 + 500 + 4700  # either would do
    at_work(bench, "tts", 10_000)
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert bench.clock.monotonic() - began < 1
    assert bench.calls == ["unload stt"]
    assert bench.registry.get("tts").loaded


def test_a_client_that_leaves_while_somebody_elses_job_runs_stops_the_wait() -> None:
    bench = attributed(telling("unsafe"), total=9000)
    bench.resident("tts", used=50)
    at_work(bench, "tts", 10_000)
    bench.leave_after = 3
    with pytest.raises(ClientGone):
        bench.make_room("llm")
    assert bench.calls == []


def test_who_hangs_is_not_asked_to_unload_but_may_be_stopped() -> None:
    bench = attributed(telling("unsafe", evict=METHODS), total=9000)
    bench.resident("tts", used=50)
    bench.clock.advance(5)
    bench.mute = {"tts"}
    bench.make_room("llm")
    assert bench.calls == ["unit tts"]


def test_nobody_is_stopped_in_the_middle_of_somebody_elses_job() -> None:
    bench = attributed(telling("drains", evict=[{"unit": "tts.service"}]), total=9000)
    bench.resident("tts", used=50)
    at_work(bench, "tts", 14)
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert bench.clock.monotonic() - began >= 14
    assert bench.calls == ["unit tts"]


@pytest.mark.parametrize(("utilization", "waits"), [(None, 0), (3, 0), (80, 10), ("falls", 4)])
def test_one_that_cannot_say_whether_it_works_is_given_until_the_card_is_quiet(
    utilization: Any, waits: float
) -> None:
    tts = {"vram_resident_mib": 3000, "unload": {"path": "/u", "when_busy": "aborts"}}
    bench = attributed({**THREE, "tts": tts}, total=9000)
    bench.resident("tts", used=50)
    bench.utilization = 80 if utilization == "falls" else utilization
    began = bench.clock.monotonic()

    def it_ends() -> None:
        if bench.clock.monotonic() - began >= 4:
            bench.utilization = 0

    if utilization == "falls":
        bench.on_pause = it_ends
    bench.make_room("llm")
    assert bench.clock.monotonic() - began == pytest.approx(waits, abs=0.6)
    assert bench.calls == ["unload tts"]


def test_an_idle_unload_leaves_alone_who_works_for_somebody_else() -> None:
    bench = attributed(telling("drains"), total=9000)
    bench.resident("tts", used=50)
    at_work(bench, "tts", 10_000)
    release = bench.room.unload("tts", bench.ticket("tts"), patient=False)
    assert (release.outcome, bench.calls) == ("busy", [])


# -- a guess may cost an eviction, never a refusal ------------------------------------------------


@pytest.mark.parametrize("declared", [0, 3000])
def test_what_is_on_its_way_back_is_waited_for_before_a_job_is_tried(declared: int) -> None:
    """What the job needs is only learned, so it is tried with less; but not with less than comes
    back in time."""
    bench = attributed({**THREE, "llm": {"vram_resident_mib": declared}}, total=9000)
    for _ in range(3):
        bench.learned.held("llm", 6500)
        bench.learned.ran("llm", 1.0)
    bench.lag = 30
    bench.resident("tts", used=50)
    version = bench.registry.get("tts").residency_version
    bench.registry.probe_succeeded("tts", ProbeReport(loaded=True), seen_version=version)


# -- while the card cannot be read, and memory on its way back -----------------------------------


def blind(bench: Bench) -> None:
    """The card cannot be read from now on; the sampler has noticed."""
    last, at = bench._reading(), bench.clock.monotonic()
    bench.measured = False
    bench.registry.set_gpu(GpuState(None, at, "GPU is lost", last))


def test_while_the_card_cannot_be_read_its_last_total_is_the_ledgers() -> None:
    bench = attributed(THREE, total=9000)  # no total is configured
    bench.resident("tts", used=5)
    blind(bench)
    preview = bench.room.preview(Job("llm", "llm"))
    assert (preview.balance.source, preview.balance.total_mib) == ("ledger", 9000)
    assert [victim.name for victim in preview.victims] == ["tts"]
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_what_was_held_last_counts_where_it_is_more_than_is_declared() -> None:
    bench = attributed(THREE, total=13_000)
    bench.resident("tts", used=5)
    bench.holds["tts"] = 5000
    bench.foreign = 2000
    blind(bench)
    preview = bench.room.preview(Job("llm", "llm"))
    assert (preview.fits, preview.balance.used_mib) == (False, 7000)


def test_a_release_is_waited_out_through_a_gap() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=5)
    unload = bench.unload

    def go_blind(name: str, *_: object) -> bool:
        unload(name)
        blind(bench)
        return True

    def come_back() -> None:
        bench.measured = bench.measured or bench.clock.monotonic() > began + 3

    bench.unload = go_blind  # type: ignore[method-assign]
    bench.on_pause = come_back
    bench.lag = 2
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert bench.measured
    assert "tts" not in bench.holds


def test_an_eviction_in_a_gap_is_judged_when_that_is_over() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=5)
    blind(bench)

    def come_back() -> None:
        bench.measured = True

    bench.on_pause = come_back
    bench.lag = 3
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]
    assert "tts" not in bench.holds


def test_what_it_holds_is_measured_when_the_wait_is_over() -> None:
    """A render of somebody else took more than was there before it."""
    bench = attributed(telling("aborts"), total=9000)
    bench.resident("tts", used=50)
    at_work(bench, "tts", 14)

    def it_takes_more() -> None:
        if not bench.calls:
            bench.holds["tts"] = 4000

    bench.on_pause = it_takes_more
    bench.make_room("llm")
    (event,) = evictions(bench)
    assert (event.mib, event.expected_mib) == (4000, 4000)


def test_who_works_for_somebody_else_is_waited_for_before_a_job_is_tried_with_less() -> None:
    bench = attributed({**telling("drains"), "llm": {"vram_resident_mib": 3000}}, total=9000)
    for _ in range(3):
        bench.learned.held("llm", 8700)
        bench.learned.ran("llm", 1.0)
    bench.resident("tts", used=50)
    bench.resident("stt", used=10)
    at_work(bench, "tts", 14)
    bench.make_room("llm")
    assert bench.calls == ["unload tts", "unload stt"]
    assert bench.holds == {}


def test_what_was_seen_to_stay_does_not_keep_a_job_from_being_tried_alone() -> None:
    bench = attributed({**THREE, "llm": {"vram_resident_mib": 6900}}, total=7000)
    bench.learned.unloaded("tts", 1.0, 900)
    bench.resident("tts", used=50)
    bench.make_room("llm")  # declared a little too high for the reserve
    assert bench.calls == ["unload tts"]


def test_a_job_that_is_tried_all_the_same_is_told_of() -> None:
    bench = attributed({**THREE, "llm": {"vram_resident_mib": 6900}}, total=7000)
    assert bench.room.preview(Job("llm", "llm")).fits
    bench.make_room("llm")
    assert TriedAnyway(consumer="llm", needed_mib=6900, short_mib=100) in bench.told


def test_a_card_that_is_gone_for_long_is_not_waited_for() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("tts", used=5)
    blind(bench)
    bench.clock.advance(120)
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]
    assert bench.clock.monotonic() == began


def test_memory_that_a_consumer_is_giving_back_is_not_its_own() -> None:
    bench = attributed(THREE, total=9000)
    bench.resident("llm", used=5)
    bench.registry.set_loaded("llm", False)  # unloaded, but the card is slow
    began = bench.clock.monotonic()

    def it_comes_back() -> None:
        if bench.clock.monotonic() >= began + 3:
            bench.holds.pop("llm", None)

    bench.on_pause = it_comes_back
    bench.make_room("llm")
    assert "llm" not in bench.holds
    assert bench.calls == []


def test_memory_on_its_way_back_is_waited_for_rather_than_another_victim() -> None:
    bench = attributed(THREE, total=11_500)
    bench.resident("tts", used=5)
    bench.resident("llm", used=5)
    bench.registry.set_loaded("llm", False)

    def it_comes_back() -> None:
        bench.holds.pop("llm", None)

    bench.on_pause = it_comes_back
    bench.make_room("llm")
    assert bench.calls == []


def test_memory_that_never_comes_back_is_its_own_again_in_the_end() -> None:
    """Or was taken anew by somebody else's job: then it is tried, and before long at once."""
    bench = attributed(THREE, total=9000)
    bench.resident("llm", used=5)
    bench.registry.set_loaded("llm", False)
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert 9 < bench.clock.monotonic() - began < 12
    bench.clock.advance(60)
    began = bench.clock.monotonic()
    bench.make_room("llm")
    assert bench.clock.monotonic() == began


def test_what_it_is_known_to_keep_is_its_own() -> None:
    bench = attributed({"llm": {"vram_resident_mib": 6000, "floor_mib": 1200}}, total=7000)
    bench.holds["llm"] = 1200
    bench.registry.set_loaded("llm", False)
    preview = bench.room.preview(Job("llm", "llm"))
    assert (preview.held_mib, preview.fits) == (1200, True)


# -- a load that is not wanted any more ---------------------------------------------------------


def leaves_while_it_loads(bench: Bench, *waiting: str) -> list[object]:
    """Have a job of tts made room for whose client leaves while its consumer loads, with jobs of
    others waiting. Returns what came of the load: an error, or None."""
    came: list[object] = []
    bench.queue = [*waiting]
    ticket = bench.ticket("tts")

    def load(name: str, _: object, model: str | None, giving_up: GivingUp) -> None:
        ticket.cancel(ClientGone("left"))
        threads_over("load-watch" if "tts" not in waiting else "")
        came.append(giving_up.error)
        if giving_up.error is not None:
            raise giving_up.error

    bench.load = load  # type: ignore[method-assign,assignment]
    with pytest.raises(ClientGone):
        bench.room.make_room(ticket)
    ticket.close()
    threads_over("load-watch")
    return came


def threads_over(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(5)


LOADS: dict[str, dict[str, Any]] = {
    "tts": {"vram_resident_mib": 3000, "load": "/load"},
    "llm": {"vram_resident_mib": 100},
}


def test_a_load_that_nobody_waits_for_is_given_up_and_undone() -> None:
    bench = Bench(LOADS, total=24_000)
    (error,) = leaves_while_it_loads(bench, "llm")
    assert isinstance(error, ClientGone)
    assert bench.calls == ["unload tts"]
    assert not bench.registry.get("tts").loaded
    assert LoadGivenUp(consumer="tts") in bench.told


def test_a_load_that_others_wait_for_is_theirs() -> None:
    bench = Bench(LOADS, total=24_000)
    assert leaves_while_it_loads(bench, "llm", "tts") == [None]
    assert bench.calls == []
    assert bench.registry.get("tts").loaded


def test_a_load_that_could_not_be_undone_is_waited_for() -> None:
    bench = Bench({"tts": {**LOADS["tts"], "unload": None}}, total=24_000)
    assert leaves_while_it_loads(bench) == [None]
    assert bench.registry.get("tts").loaded
