"""Random runs of the whole queue in virtual time: jobs that come, leave, run out of memory and time
out, operators that load and unload, consumers that are slow, keep memory, never give it back or
work for somebody else. One thread, no sleeping; what happens is written down, so that the same run
of two implementations can be compared line by line."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from gpumanager.config import Config, EvictionMethod, parse_config
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import (
    BrokerError,
    ClientGone,
    ConsumerUnhealthy,
    ConsumerUnreachable,
    QueueTimeout,
)
from gpumanager.model import (
    GpuProcess,
    GpuState,
    Holdings,
    Job,
    MemoryReading,
    ProbeReport,
    StoppedBy,
)
from gpumanager.residency.room import RoomMaker
from gpumanager.scheduling import factory
from gpumanager.telemetry.events import Event
from tests.support.clock import FakeClock
from tests.support.reference import eviction, policy, queue
from tests.support.reference.room import RoomMaker as OldRoomMaker

SAMPLE_S = 1.0
OPERATIONS = ("unload", "load")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job that comes `at` a time (seconds from the start). It is cancelled `leaves` seconds
    later, if it is not over by then; `early`: it may be begun by who hands the GPU over; `fails`:
    it runs out of memory."""

    at: float
    job: Job
    run_s: float
    leaves: float | None
    early: bool
    fails: bool


class World:
    """Consumers and a card, from a seed."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.clock = FakeClock()
        self.log: list[object] = []
        self.measured = chance.choice(("by process", "by process", "in total", "not", "never"))
        self.names = [f"c{index}" for index in range(chance.randint(2, 7))]
        self.takes = {name: chance.randrange(500, 8000, 100) for name in self.names}
        most, every = max(self.takes.values()), sum(self.takes.values())
        self.total = chance.randrange(max(most, 2000), max(most, 2000, every) + 500, 50)
        self.config = self._make_config()
        assumed = {name: chance.random() < 0.4 for name in self.names}
        self.registry = Registry(self.config, self.clock, lambda each: assumed[each.model or ""])
        self.learned = Learned(self.names, now=self.clock.monotonic)
        self.learned.publish(self.registry.learn)
        self.holds = {name: self.takes[name] for name, loaded in assumed.items() if loaded}
        self.leaks = {name for name in self.names if chance.random() < 0.2}
        self.keeps = {name: chance.choice((0, 0, 100, 700)) for name in self.names}
        self.lag = {name: chance.choice((0.0, 0.0, 0.3, 4.0)) for name in self.names}
        self.fails = chance.choice((0.0, 0.0, 0.1))
        self.works = {name: self._spells(0.5) for name in self.names}
        self.broken = {name: self._spells(0.1) for name in self.names}
        self.foreign = self._spells(0.4)
        self.foreign_mib = chance.choice((0, 300, 2000))
        self._coming: list[tuple[float, str]] = []
        self.arrivals = self._make_arrivals()

    def _make_config(self) -> Config:
        chance = self.chance
        consumers: dict[str, Any] = {}
        for name in self.names:
            declared = round(self.takes[name] * chance.choice((0.0, 0.7, 1.0, 1.0, 1.0, 1.3)))
            declared = min(declared, self.total - 1000)
            if not declared and self.measured != "by process":
                # What nobody knows the size of goes by now; before, it was taken to hold nothing.
                declared = min(round(self.takes[name] * 0.7), self.total - 1000)
            consumers[name] = {
                "url": "http://127.0.0.1:1",
                "model": name,
                "vram_resident_mib": declared,
                "priority": chance.randint(0, 2),
                "pinned": chance.random() < 0.1,
                "vram_managed": chance.random() < 0.1,
                "can_coexist_with": [
                    each for each in self.names if each != name and chance.random() < 0.15
                ],
                **({"unload": "/unload"} if chance.random() < 0.9 else {}),
                **({"load": "/load"} if chance.random() < 0.5 else {}),
                **({"floor_mib": 300} if chance.random() < 0.2 else {}),
                **({"probe": {"path": "/p", "busy": "busy"}} if chance.random() < 0.7 else {}),
            }
            if "unload" in consumers[name] and chance.random() < 0.3:
                consumers[name]["evict"] = ["http", {"unit": f"{name}.service"}]
        known = self.measured != "never"
        gpu = {"reserved_mib": chance.choice((0, 200, 1000)), "release_timeout": 2}
        if self.measured == "not":
            gpu["total_mib"] = self.total
        top = {"eviction": chance.choice(("lru", "cost")), "gpu": gpu if known else {}}
        return parse_config(yaml.safe_dump({**top, "consumers": consumers}))

    def _spells(self, likely: float) -> list[tuple[float, float]]:
        """Times at which something outside is so, from the start."""
        if self.chance.random() > likely:
            return []
        starts = (self.chance.uniform(0, 100) for _ in range(3))
        return [(start, start + self.chance.uniform(1, 40)) for start in starts]

    def _make_arrivals(self) -> list[Arrival]:
        chance, at, arrivals = self.chance, 0.0, []
        for number in range(chance.randint(5, 30)):
            at += chance.choice((0.0, 0.2, 3.0, 20.0)) * chance.random()
            kind = chance.choices(("tts", *OPERATIONS), (10, 1, 1))[0]
            job = Job(
                chance.choice(self.names),
                kind,
                request_id=str(number),
                max_wait=chance.choice((None, None, None, 2.0)),
                makes_room=kind != "unload",
                runs=kind not in OPERATIONS,
            )
            arrivals.append(
                Arrival(
                    at,
                    job,
                    run_s=chance.uniform(0.1, 4),
                    leaves=chance.uniform(0.1, 20) if chance.random() < 0.2 else None,
                    early=chance.random() < 0.5,
                    fails=chance.random() < 0.1,
                )
            )
        return arrivals

    # -- what is asked of it ---------------------------------------------------------------

    def measure(self) -> MemoryReading | None:
        if self.measured in ("not", "never"):
            self.registry.set_gpu(GpuState(None, self.clock.monotonic(), "no driver"))
            return None
        now = self.clock.monotonic()
        for at, name in list(self._coming):
            if at <= now:
                self._coming.remove((at, name))
                self._give_back(name)
        foreign = self.foreign_mib * self._in(self.foreign)
        used = min(self.total, sum(self.holds.values()) + foreign)
        reading = MemoryReading(self.total, used, self.total - used)
        if self.measured == "by process":
            processes = [
                GpuProcess(10 + self.names.index(name), mib)
                for name, mib in self.holds.items()
                if mib
            ]
            game = (GpuProcess(999, foreign, "game"),) if foreign else ()
            holdings = Holdings(
                {name: self.holds.get(name, 0) for name in self.names},
                {self.names[each.pid - 10]: (each.pid,) for each in processes},
                game,
            )
            reading = MemoryReading(
                self.total,
                used,
                self.total - used,
                processes=(*processes, *game),
                holdings=holdings,
            )
        self.registry.set_gpu(GpuState(reading, now, last=reading))
        return reading

    def load(self, name: str, *_: object) -> None:
        self._call("load", name)
        self._take(name)

    warm = load

    def unload(self, name: str, *_: object) -> bool:
        self._call("unload", name)
        if name not in self.leaks:
            self._coming.append((self.clock.monotonic() + self.lag[name], name))
        return True

    def stop(self, name: str, method: EvictionMethod) -> StoppedBy:
        self._call(method.name, name)
        self.holds.pop(name, None)
        return StoppedBy(method.name)

    def bring_back(self, name: str, stopped_by: StoppedBy) -> bool:
        self._call("start", name)
        return False

    def busy(self, name: str, *_: object) -> bool | None:
        return self._in(self.works[name])

    def settled(self, name: str, *_: object) -> bool:
        return True

    def probe(self, name: str, *_: object) -> ProbeReport:
        return ProbeReport(resident_mib=self.holds.get(name, 0))

    def admit(self, name: str) -> None:
        """A job is about to be sent to it."""
        if self._in(self.broken[name]):
            raise ConsumerUnhealthy(f"{name} failed several times in a row", consumer=name)

    def work(self, name: str) -> None:
        """A job of it begins."""
        self._take(name)

    # -- inside ----------------------------------------------------------------------------

    def _in(self, spells: list[tuple[float, float]]) -> bool:
        now = self.clock.monotonic() - 1000
        return any(begin <= now < end for begin, end in spells)

    def _take(self, name: str) -> None:
        self._coming = [each for each in self._coming if each[1] != name]
        self.holds[name] = self.takes[name]

    def _give_back(self, name: str) -> None:
        self.holds[name] = min(self.holds.get(name, 0), self.keeps[name])

    def _call(self, what: str, name: str) -> None:
        self.log.append((what, name, round(self.clock.monotonic(), 6)))
        if self.chance.random() < self.fails:
            raise ConsumerUnreachable(f"{name} is not there", consumer=name)


class Rehearsal:
    """One run. `old`: by the implementation of before."""

    def __init__(self, seed: int, *, old: bool) -> None:
        self.world = world = World(seed)
        self.clock = world.clock
        self.log = world.log
        make: Any = partial(OldRoomMaker, world.config) if old else RoomMaker
        self.room = make(
            world.registry,
            world.learned,
            world,
            world,
            world.measure,
            world.admit,
            self.clock,
            self._emit,
            self._upcoming,
        )
        size: dict[str, Any] = {"max_queue": 12, "max_wait": 60, "clock": self.clock}
        if old:
            old_queue: Any = queue.Queue  # not all that a Scheduler has by now
            self.inner = old_queue(policy.FirstComeFirstServed(1), **size)
            self.scheduler: Any = eviction.Evicting(self.inner, _Patient(self), self.clock)
        else:
            self.inner = self.scheduler = factory.locked(**size, room=_Patient(self))
        self._arrivals = list(world.arrivals)
        self._open: dict[int, tuple[Any, Arrival, float]] = {}
        self._sampled = -SAMPLE_S

    def _upcoming(self) -> tuple[str, ...]:
        upcoming: tuple[str, ...] = self.inner.upcoming()
        return upcoming

    def run(self) -> list[object]:
        """Play it to its end; returns what happened."""
        self._pass(0.0)
        while self._open or self._arrivals:
            number = next(iter(self.inner._running), None)
            if number is None:
                self._pass(self._arrivals[0].at + 1000 - self.clock.monotonic())
                continue
            ticket, arrival, _ = self._open[number]
            try:
                self._serve(ticket, arrival)
            except BrokerError as error:
                self._note("failed", number, type(error).__name__, error.message)
            finally:
                del self._open[number]
                ticket.close()
        self.log.append(self.scheduler.stats())
        return self.log

    def _serve(self, ticket: Any, arrival: Arrival) -> None:
        ticket.wait()
        job, name = arrival.job, arrival.job.consumer
        if job.runs:
            self.world.admit(name)
        self._note("runs", ticket.number, job.kind, name)
        patient = _Pausing(ticket, self)
        if job.kind in OPERATIONS:
            getattr(self.room, job.kind)(name, patient)
            return
        registry = self.world.registry
        before = registry.job_started(name)
        try:
            self.world.work(name)
            self._pass(arrival.run_s)
            if arrival.fails:
                self._note("relieved", ticket.number, ticket.relieve())
        finally:
            registry.job_finished(name, worked=not arrival.fails)
        self.world.learned.ran(name, arrival.run_s, cold=not before.loaded)

    # -- time ------------------------------------------------------------------------------

    def _pass(self, seconds: float) -> None:
        """Time passes, and what is due happens."""
        until = self.clock.monotonic() + seconds
        while True:
            now = self.clock.monotonic()
            self._happen(now)
            if now >= until:
                return
            due = [until, self._sampled + SAMPLE_S]
            due += [self._arrivals[0].at + 1000] if self._arrivals else []
            due += [gone for _, _, gone in self._open.values() if gone > now]
            due += [place.deadline for place in self.inner._waiting.values()]
            self.clock.advance(max(1e-6, min(due) - now))

    def _happen(self, now: float) -> None:
        if now >= self._sampled + SAMPLE_S:
            self._sampled = now
            self.world.measure()
        while self._arrivals and self._arrivals[0].at + 1000 <= now:
            self._come(self._arrivals.pop(0), now)
        for number, (ticket, arrival, gone) in list(self._open.items()):
            waits = number in self.inner._waiting
            if gone <= now and ticket.cancel(ClientGone("left")) and waits:
                self._note("left", number)
                del self._open[number]
                ticket.close()
            elif waits and self.inner._waiting[number].deadline <= now:
                try:
                    ticket.wait()
                except QueueTimeout as error:
                    self._note("late", number, error.message)
                del self._open[number]
                ticket.close()
            elif gone <= now:
                self._open[number] = (ticket, arrival, float("inf"))

    def _come(self, arrival: Arrival, now: float) -> None:
        try:
            ticket = self.scheduler.enqueue(arrival.job)
        except BrokerError as error:
            self._note("refused", arrival.job.request_id, type(error).__name__)
            return
        gone = float("inf") if arrival.leaves is None else now + arrival.leaves
        self._open[ticket.number] = (ticket, arrival, gone)
        # Where the accounting decides, one that is begun early used to leave assumptions alone that
        # cannot be true.
        if arrival.early and arrival.job.runs and self.world.measured != "not":
            ticket.when_granted(lambda: self._begin(ticket.number, arrival.job.consumer))

    def _begin(self, number: int, name: str) -> bool:
        try:
            self.world.admit(name)
        except BrokerError:
            return False
        self._note("begun", number)
        return True

    def _note(self, *what: object) -> None:
        self.log.append((*what, round(self.clock.monotonic(), 6)))

    def _emit(self, event: Event) -> None:
        self.log.append(event)


class _Patient:
    """The room, whose pauses pass in virtual time."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal

    @property
    def evictions(self) -> int:
        evictions: int = self._rehearsal.room.evictions
        return evictions

    def outlook(self) -> Any:
        raise NotImplementedError

    def ready(self, asked: Any) -> bool:
        """Asked with a job; before, with a consumer."""
        ready: bool = self._rehearsal.room.ready(asked)
        return ready

    def sharing(self, job: Any) -> Any:
        return self._rehearsal.room.sharing(job)

    def prospect(self, job: Any) -> Any:
        return self._rehearsal.room.prospect(job)

    def make_room(self, ticket: Any) -> None:
        self._rehearsal.room.make_room(_Pausing(ticket, self._rehearsal))

    def relieve(self, ticket: Any) -> bool:
        relieved: bool = self._rehearsal.room.relieve(_Pausing(ticket, self._rehearsal))
        return relieved


class _Pausing:
    """A ticket whose pauses pass in virtual time."""

    def __init__(self, ticket: Any, rehearsal: Rehearsal) -> None:
        self._ticket = ticket
        self._rehearsal = rehearsal

    def pause(self, seconds: float) -> None:
        self._rehearsal._pass(seconds)
        self._ticket.pause(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ticket, name)
