"""The broker's own queue, room maker and estimates, in virtual time: clients that send jobs one
after the other, consumers that take their time, and what was told to each job of its wait, beside
what came of it. One thread, no sleeping; a replay of the same seed is the same."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

import yaml

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
    Turn,
)
from gpumanager.residency.room import RoomMaker
from gpumanager.scheduling.estimate import Outlook
from gpumanager.scheduling.factory import locked
from gpumanager.scheduling.queue import Granted
from tests.support.clock import FakeClock
from tests.support.events import ignore

CARD_MIB = 12_000
SAMPLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Server:
    """A consumer: what it needs, and what loading, unloading and a usual job take it, in seconds.
    `lazy`: it loads with its first job."""

    mib: int
    load_s: float
    unload_s: float
    run_s: float
    lazy: bool = False
    weight: float = 1.0


SERVERS = {
    "voice": Server(3000, 4.0, 0.5, 1.5, weight=3),
    "whisper": Server(2500, 3.0, 0.5, 1.0, lazy=True, weight=2),
    "ollama": Server(6000, 8.0, 1.0, 6.0, lazy=True, weight=3),
    "comfyui": Server(5000, 12.0, 1.5, 20.0, lazy=True),
    "vllm": Server(5500, 30.0, 2.0, 4.0, weight=0.5),
}
SPREAD = 0.3
"""Of the logarithm of what a job, a load or an unload takes."""


@dataclass(frozen=True, slots=True)
class Told:
    """A job that had to wait: what it was told when it came, and what came of it, in seconds.
    `surely_s` of that was no guess."""

    consumer: str
    told_s: float
    waited_s: float
    surely_s: float

    @property
    def error(self) -> float:
        """As a share of what it waited."""
        return abs(self.told_s - self.waited_s) / self.waited_s


class Replay:
    """Eight clients (or so many) that think for a while between their jobs, which are mixed; or,
    with `burst`, all of whose jobs come at once."""

    def __init__(
        self,
        seed: int,
        *,
        clients: int = 8,
        think_s: float = 10.0,
        learned: Learned | None = None,
        servers: dict[str, Server] = SERVERS,
    ) -> None:
        self.clock = FakeClock()
        self.chance = random.Random(seed)
        self.servers = servers
        self.clients = clients
        self.think_s = think_s
        config = {
            "gpu": {"reserved_mib": 200},
            "consumers": {
                name: {
                    "url": "http://127.0.0.1:1",
                    "unload": "/unload",
                    "vram_resident_mib": server.mib,
                    **({} if server.lazy else {"load": "/load"}),
                }
                for name, server in servers.items()
            },
        }
        self.config = parse_config(yaml.safe_dump(config))
        self.registry = Registry(self.config, self.clock, lambda consumer: False)
        self.learned = Learned(servers) if learned is None else learned
        self.learned.publish(self.registry.learn)
        self.holds: dict[str, int] = {}
        self.queue = locked(max_queue=2000, max_wait=1e6, clock=self.clock, outlook=self.outlook)
        self.room = RoomMaker(
            self.registry,
            self.learned,
            self,
            self,
            self.measure,
            lambda name: None,
            self.clock,
            ignore,
            self.queue.upcoming,
        )
        self.told: list[Told] = []
        self._arrivals: list[tuple[float, int]] = []
        self._tickets: deque[tuple[Granted, int, Turn, float]] = deque()
        self._left = 0
        self.measure()

    def outlook(self) -> Outlook:
        return self.room.outlook()  # which is made around the queue

    # -- what the room maker asks of the world -------------------------------------------------

    def measure(self) -> MemoryReading:
        used = sum(self.holds.values())
        names = list(self.servers)
        processes = tuple(
            GpuProcess(names.index(name) + 1, mib) for name, mib in self.holds.items()
        )
        holdings = Holdings({name: self.holds.get(name, 0) for name in names})
        reading = MemoryReading(
            CARD_MIB, used, CARD_MIB - used, processes=processes, holdings=holdings
        )
        self._sampled = self.clock.monotonic()
        self.registry.set_gpu(GpuState(reading, self._sampled))
        return reading

    def load(self, name: str, *_: object) -> None:
        self._advance(self._about(self.servers[name].load_s))
        self.holds[name] = self.servers[name].mib

    warm = load

    def unload(self, name: str, *_: object) -> bool:
        self._advance(self._about(self.servers[name].unload_s))
        self.holds.pop(name, None)
        return True

    def trim(self, name: str, *_: object) -> None:
        raise NotImplementedError

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

    # -- clients ---------------------------------------------------------------------------------

    def run(self, jobs: int, *, burst: bool = False) -> list[Told]:
        """Play so many jobs; returns what was told to those that had to wait."""
        now = self.clock.monotonic()
        self._left = jobs
        for client in range(jobs if burst else self.clients):
            at = now if burst else now + self.chance.expovariate(1 / self.think_s)
            heapq.heappush(self._arrivals, (at, client))
        while self._left or self._tickets or self._arrivals:
            self._come()
            if not self._tickets:
                if not self._left:
                    break
                self._advance(self._arrivals[0][0] - self.clock.monotonic())
                continue
            ticket, client, told, came = self._tickets[0]
            self._serve(ticket, told, came)
            self._tickets.popleft()
            ticket.close()
            if not burst:
                think = self.chance.expovariate(1 / self.think_s)
                heapq.heappush(self._arrivals, (self.clock.monotonic() + think, client))
        return self.told

    def _come(self) -> None:
        """Have those send their jobs whose time has come."""
        while self._left and self._arrivals and self._arrivals[0][0] <= self.clock.monotonic():
            _, client = heapq.heappop(self._arrivals)
            self._left -= 1
            weights = [server.weight for server in self.servers.values()]
            (name,) = self.chance.choices(list(self.servers), weights)
            ticket = self.queue.enqueue(Job(name, "tts"))
            (entry,) = (each for each in self.queue.queue() if each.ticket == ticket.number)
            came = self.clock.monotonic()
            self._tickets.append((ticket, client, entry.turn, came))

    def _serve(self, ticket: Granted, told: Turn, came: float) -> None:
        name = ticket.job.consumer
        waited = self.clock.monotonic() - came
        if waited > 0:
            self.told.append(Told(name, told.wait_s, waited, told.surely_s))
        self.room.make_room(_Pausing(ticket, self._advance))
        before = self.registry.job_started(name)
        began = self.clock.monotonic()
        if name not in self.holds:
            self.load(name)
        self._advance(self._about(self.servers[name].run_s))
        self.registry.job_finished(name)
        self.learned.ran(name, self.clock.monotonic() - began, cold=not before.loaded)

    def _about(self, seconds: float) -> float:
        return seconds * self.chance.lognormvariate(0, SPREAD)

    def _advance(self, seconds: float) -> None:
        """Time passes, and jobs come meanwhile."""
        until = self.clock.monotonic() + seconds
        while True:
            self._come()
            now = self.clock.monotonic()
            due = self._arrivals[0][0] if self._left and self._arrivals else math.inf
            step = min(until, due, self._sampled + SAMPLE_S)
            if step > now:
                self.clock.advance(step - now)
            if self.clock.monotonic() >= self._sampled + SAMPLE_S:
                self.measure()
            if self.clock.monotonic() >= until:
                return


class _Pausing:
    """A ticket whose pauses pass in virtual time."""

    def __init__(self, ticket: Granted, advance: Any) -> None:
        self.number, self.job, self.waited_s, self.prepared_s = ticket.number, ticket.job, 0.0, 0.0
        self.wait, self.cancel, self.close = ticket.wait, ticket.cancel, ticket.close
        self.when_cancelled, self.relieve = ticket.when_cancelled, ticket.relieve
        self.when_granted = ticket.when_granted
        self.next_step, self.idle_others = ticket.next_step, ticket.idle_others
        self.idle_trims = ticket.idle_trims
        self.pause = advance


def median_error(told: list[Told]) -> float:
    return median(each.error for each in told)
