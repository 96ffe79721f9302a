"""A broker's own queue, room maker and registry, in virtual time, serving a trace: one thread, no
sleeping. What it tells goes into an event log, as a broker's does."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import yaml

from gpumanager.clock import rfc3339, wall_time
from gpumanager.config import EvictionMethod, parse_config
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.model import (
    GpuProcess,
    GpuState,
    Holdings,
    Job,
    MemoryReading,
    ProbeReport,
    StoppedBy,
    parts_of,
    resident_name,
)
from gpumanager.residency.room import RoomMaker
from gpumanager.scheduling.policy import Policy
from gpumanager.scheduling.queue import Queue
from gpumanager.simulation.trace import Task, Trace
from gpumanager.telemetry.eventlog import EventLog
from gpumanager.telemetry.events import JobEnded
from tests.support.clock import FakeClock

SAMPLE_S = 0.5


def config_of(trace: Trace) -> str:
    """The config that a broker for this trace has."""
    consumers: dict[str, Any] = {}
    for resident, size in trace.footprints.items():
        name, model = parts_of(resident)
        has: dict[str, Any] = {"url": "http://127.0.0.1:1", "load": "/load", "unload": "/unload"}
        if model is None:
            has |= {"max_parallel": size.parallel, "priority": size.priority}
            consumers[name] = {**has, "vram_resident_mib": size.mib}
            continue
        has |= {"probe": {"path": "/ps", "items": "models[].name"}, "models": []}
        has["unload"] = {"path": "/unload", "for_each": "items", "json": {"model": "{item}"}}
        consumer = consumers.setdefault(name, has)
        consumer["models"].append({"name": model, "vram_mib": size.mib})
    gpu = {"reserved_mib": trace.reserved_mib}
    return yaml.safe_dump({"eviction": trace.order, "gpu": gpu, "consumers": consumers})


class VirtualBroker:
    """Serves the trace's tasks, by `policy`. It knows from the start what loads and unloads take,
    as one that has run for a while does."""

    def __init__(self, trace: Trace, policy: Policy) -> None:
        self.trace = trace
        self.clock = FakeClock()
        self.events = EventLog(self.clock, keep=100_000)
        self.config = parse_config(config_of(trace))
        self.registry = Registry(self.config, self.clock, lambda consumer: False)
        self.learned = Learned(self.config.consumers)
        self.learned.publish(self.registry.learn)
        self.holds: dict[str, int] = {}
        self._began = self.clock.monotonic()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._began_at: dict[int, float] = {}
        self._order = count()
        self._behind: dict[int, list[Task]] = {}
        self._open: dict[int, tuple[Any, Task]] = {}
        self._sampled = 0.0
        for name, size in trace.footprints.items():
            self.learned.loaded(name, size.load_s)
            self.learned.unloaded(name, size.unload_s, 0)
        for task in sorted(trace.tasks, key=lambda each: (each.at, each.number)):
            if task.after is None:
                self._comes_at(self._began + task.at, task)
            else:
                self._behind.setdefault(task.after, []).append(task)
        self.measure()
        self.queue = Queue(
            policy, max_queue=10_000, max_wait=1e7, clock=self.clock, room=_Patient(self)
        )
        self.room = RoomMaker(
            self.registry,
            self.learned,
            self,
            self,
            self.measure,
            lambda name: None,
            self.clock,
            self.events.emit,
            self.queue.upcoming,
        )
        self.room._probes_due = 0.0

    def run(self) -> None:
        """Serve all of them."""
        while self._due or self._open:
            self._begin_all()
            if self._due:
                self._pass(max(0.0, self._due[0][0] - self.clock.monotonic()))

    def _begin_all(self) -> None:
        """Have all jobs run that were given the GPU; those that have to wait for their room first
        take the time that takes."""
        while new := [each for each in self.queue._running if each not in self._began_at]:
            ticket, task = self._open[new[0]]
            ticket.wait()
            name, model = parts_of(task.needs)
            assert self.registry.job_started(name, model).has_loaded(model)
            assert task.needs in self.holds
            self._began_at[ticket.number] = now = self.clock.monotonic()
            self._at(now + task.run_s, partial(self._end, ticket, task))

    def _end(self, ticket: Any, task: Task) -> None:
        (name, model), now = parts_of(task.needs), self.clock.monotonic()
        began = self._began_at[ticket.number]
        self.registry.job_finished(name, model=model)
        del self._open[ticket.number]
        ticket.close()
        for each in dict.fromkeys((name, task.needs)):
            self.learned.ran(each, now - began)  # once the next job has the GPU, as `Hold` does
        self._tell(ticket, task, began)
        for behind in self._behind.pop(task.number, ()):
            self._comes_at(max(self._began + behind.at, now + behind.think_s), behind)

    def _tell(self, ticket: Any, task: Task, began: float) -> None:
        job, came = ticket.job, began - ticket.prepared_s - ticket.waited_s
        self.events.emit(
            JobEnded(
                consumer=job.consumer,
                model=job.model,
                kind=job.kind,
                ticket=ticket.number,
                arrived=rfc3339(wall_time(self.clock, came)),
                urgency=job.urgency,
                requester=job.requester,
                session=job.session,
                client=job.client,
                address="127.0.0.1",
                request_id=job.request_id,
                status=200,
                wait_ms=round(ticket.waited_s * 1000, 1),
                prepare_ms=round(ticket.prepared_s * 1000, 1),
                run_ms=round((self.clock.monotonic() - began) * 1000, 1),
                needed_mib=self.registry.now.needed(task.needs).mib,
                total_mib=self.trace.total_mib,
            )
        )

    # -- time ------------------------------------------------------------------------------------

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), happen))

    def _comes_at(self, when: float, task: Task) -> None:
        self._at(when, lambda: self._come(task))

    def _come(self, task: Task) -> None:
        consumer, model = parts_of(task.needs)
        job = Job(
            consumer,
            task.kind,
            model=model,
            client=task.requester,
            request_id=str(task.number),
            urgency=task.urgency,
            requester=task.requester,
            session=task.session,
        )
        ticket = self.queue.enqueue(job)
        self._open[ticket.number] = ticket, task

    def _pass(self, seconds: float) -> None:
        until = self.clock.monotonic() + seconds
        while True:
            while self._due and self._due[0][0] <= self.clock.monotonic():
                heapq.heappop(self._due)[2]()
            now = self.clock.monotonic()
            if now >= self._sampled + SAMPLE_S:
                self.measure()
            if now >= until:
                return
            due = [until, self._sampled + SAMPLE_S, *(each for each, *_ in self._due[:1])]
            self.clock.seconds = max(now, min(due))  # exactly: no sums of differences

    # -- what the room maker asks of the world ---------------------------------------------------

    def measure(self) -> MemoryReading:
        total, used = self.trace.total_mib, sum(self.holds.values())
        held = dict.fromkeys(self.config.consumers, 0)
        for resident, mib in self.holds.items():
            held[parts_of(resident)[0]] += mib
        processes = tuple(GpuProcess(pid, mib) for pid, mib in enumerate(held.values(), 1) if mib)
        holdings = Holdings(held)
        reading = MemoryReading(total, used, total - used, processes=processes, holdings=holdings)
        self._sampled = self.clock.monotonic()
        self.registry.set_gpu(GpuState(reading, self._sampled))
        return reading

    def load(self, name: str, _: object, model: str | None = None, *__: object) -> None:
        resident = resident_name(name, model)
        self._pass(self.trace.footprints[resident].load_s)
        self.holds[resident] = self.trace.footprints[resident].mib

    warm = load

    def unload(self, name: str, _: object, model: str | None = None) -> bool:
        resident = resident_name(name, model)
        self._pass(self.trace.footprints[resident].unload_s)
        self.holds.pop(resident, None)
        return True

    def trim(self, name: str, *_: object) -> None:
        raise AssertionError

    def busy(self, name: str, *_: object) -> bool | None:
        return None

    def settled(self, name: str, *_: object) -> bool:
        return True

    def probe(self, name: str, *_: object) -> ProbeReport:
        return ProbeReport()

    def stop(self, name: str, method: EvictionMethod) -> StoppedBy:
        raise AssertionError

    def bring_back(self, name: str, stopped_by: StoppedBy) -> bool:
        raise AssertionError


class _Patient:
    """The room, whose pauses pass in virtual time."""

    def __init__(self, broker: VirtualBroker) -> None:
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker.room, name)

    def make_room(self, ticket: Any) -> None:
        self._broker.room.make_room(_Pausing(ticket, self._broker))


class _Pausing:
    """A ticket whose pauses pass in virtual time."""

    def __init__(self, ticket: Any, broker: VirtualBroker) -> None:
        self._ticket = ticket
        self._broker = broker

    def pause(self, seconds: float) -> None:
        self._broker._pass(seconds)
        self._ticket.pause(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ticket, name)
