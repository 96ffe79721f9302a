"""Making room, on a stand-in for the card: who is unloaded, in which order, and when it stops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml

from gpumanager.admission import Admission
from gpumanager.breaker import Breakers
from gpumanager.config import Rung, parse_config
from gpumanager.errors import (
    BrokerError,
    ClientGone,
    ConsumerTimeout,
    ConsumerUnhealthy,
    ConsumerUnreachable,
    InsufficientVram,
)
from gpumanager.learning import Learned
from gpumanager.model import GpuProcess, Holdings, Job, MemoryReading, Parked, ProbeReport
from gpumanager.registry import Registry
from gpumanager.scheduling.factory import locked
from gpumanager.scheduling.room import RoomMaker
from tests.support.clock import FakeClock


class Bench:
    """A RoomMaker over consumers that obey, on a card that may be slow, or not measurable.

    `lag` is the number of looks at the card before an unload shows; None means never. `keeps` is
    what a consumer holds on to, `stolen` what a foreign process takes as soon as anything comes
    back; `attributed`: the card tells figures per process.
    """

    def __init__(
        self, consumers: dict[str, dict[str, Any]], *, total: int, measured: bool = True
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
        self.holds: dict[str, int] = {}
        self.attributed = False
        self.keeps: dict[str, int] = {}
        self.stolen = 0
        self.unsettled = 0
        self.failing_rungs: dict[str, BrokerError] = {}
        self.not_ready: list[BrokerError] = []
        self._pending: list[list[Any]] = []
        call = {"path": "/x"}
        config = {
            "gpu": {"total_mib": 0 if measured else total, "reserved_mib": 200},
            "routing": {},
            "consumers": {
                name: {"url": "http://127.0.0.1:1", "unload": call, **settings}
                for name, settings in consumers.items()
            },
        }
        self.config = parse_config(yaml.safe_dump(config))
        self.registry = Registry(dict.fromkeys(consumers, False), self.clock)
        self.learned = Learned(consumers)
        admission = Admission(self.registry, Breakers(self.clock), retry_s=5)
        self.room = RoomMaker(
            self.config,
            self.registry,
            self.learned,
            self,
            self,
            self.measure,
            admission.check,
            self.clock,
        )
        self.scheduler = locked(max_queue=9, max_wait=60, clock=self.clock)

    # -- the card and the consumers -----------------------------------------------------------

    def measure(self) -> MemoryReading | None:
        if not self.measured:
            return None
        for entry in self._pending:
            entry[1] -= 1
        for name, looks in list(self._pending):
            if looks < 0:
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
        reading = MemoryReading(self.total, used, self.total - used)
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

    def park(self, name: str, rung: Rung) -> Parked:
        self.calls.append(f"{rung.name} {name}")
        if name in self.failing_rungs:
            raise self.failing_rungs[name]
        self.holds.pop(name, None)
        return Parked(rung.name)

    def bring_back(self, name: str, parked: Parked) -> bool:
        self.calls.append(f"start {name} by {parked.rung}")
        self.holds[name] = self.config.consumers[name].vram_resident_mib
        return parked.rung == "checkpoint"

    def probe(self, name: str) -> None:
        self.calls.append(f"probe {name}")
        if self.not_ready:
            raise self.not_ready.pop(0)

    def settled(self, name: str) -> bool:
        if self.unsettled:
            self.unsettled -= 1
            return False
        return True

    def warm(self, name: str) -> None:
        self.calls.append(f"warm {name}")
        self.holds[name] = self.config.consumers[name].vram_resident_mib

    def load(self, name: str) -> None:
        self.calls.append(f"load {name}")
        if name in self.failing:
            raise self.failing[name]
        self.holds[name] = self.config.consumers[name].vram_resident_mib

    def unload(self, name: str) -> None:
        self.calls.append(f"unload {name}")
        if name in self.failing:
            raise self.failing[name]
        if self.lag is not None:
            self._pending.append([name, self.lag])

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

    def make_room(self, name: str) -> None:
        ticket = self.scheduler.enqueue(Job(name, "tts"))
        bench = self

        class Watched:
            number, job, waited_s, prepared_s = ticket.number, ticket.job, 0.0, 0.0
            wait, cancel, close = ticket.wait, ticket.cancel, ticket.close
            when_cancelled, relieve = ticket.when_cancelled, ticket.relieve

            def pause(self, seconds: float) -> None:
                bench.clock.advance(seconds)
                bench.pauses.append(seconds)
                bench.on_pause()
                if bench.leave_after is not None and len(bench.pauses) > bench.leave_after:
                    ticket.cancel(ClientGone("left"))
                ticket.pause(0)

        try:
            self.room.make_room(Watched())
        finally:
            ticket.close()


THREE = {
    "tts": {"vram_resident_mib": 3000},
    "stt": {"vram_resident_mib": 2000},
    "llm": {"vram_resident_mib": 6000},
}


def test_what_fits_touches_nobody() -> None:
    bench = Bench(THREE, total=24000)
    bench.resident("tts", used=5)
    bench.make_room("llm")
    assert bench.calls == []
    assert bench.room.evictions == 0


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


def test_an_unload_that_fails_leaves_the_next_to_try() -> None:
    bench = Bench(THREE, total=8500)
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

    def lose_the_card(name: str) -> None:
        bench.calls.append(f"unload {name}")
        bench.measured = False

    bench.unload = lose_the_card  # type: ignore[method-assign]
    bench.make_room("llm")
    assert bench.calls == ["unload tts"]


def test_evictions_are_events(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(THREE, total=9000)
    bench.resident("tts", used=5)
    with caplog.at_level(logging.INFO):
        bench.make_room("llm")
    (event,) = [record for record in caplog.records if record.message == "evicted"]
    fields = vars(event)
    assert (fields["consumer"], fields["target"], fields["mib"]) == ("tts", "llm", 3000)
    assert (fields["rung"], fields["outcome"]) == ("http", "released")


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
