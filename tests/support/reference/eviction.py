"""Eviction as a wrapper over any exclusive scheduler.

Room is made after the grant and before the job, on the thread that holds the ticket: no victim
can be running then, and nobody else changes what is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.errors import BrokerError
from gpumanager.model import Job, QueueEntry, Stats, Turn
from gpumanager.scheduling.interface import Scheduler, Ticket


class MakesRoom(Protocol):
    """What the wrapper needs done between the grant and the job."""

    @property
    def evictions(self) -> int:
        """Consumers unloaded so far."""

    def ready(self, consumer: str) -> bool:
        """Whether there is nothing to do for a consumer, by what is known already: makes no call
        and does not wait."""

    def make_room(self, ticket: Ticket) -> None:
        """Have the ticket's consumer fit and be loaded, or raise a BrokerError."""

    def relieve(self, ticket: Ticket) -> bool:
        """Unload all others that may go; True if that gave something back."""


class Evicting:
    """A Scheduler whose tickets are ready only once their consumer has room.

    Raises ValueError for an inner scheduler that is not exclusive: a victim could be running.
    """

    exclusive = True

    def __init__(self, inner: Scheduler, room: MakesRoom, clock: Clock) -> None:
        if not inner.exclusive:  # type: ignore[attr-defined]
            raise ValueError("eviction needs a scheduler that runs one job at a time")
        self._inner = inner
        self._room = room
        self._clock = clock

    def enqueue(self, job: Job) -> EvictingTicket:
        return EvictingTicket(self._inner.enqueue(job), self._room, self._clock)

    def cancel(self, ticket: int, error: BrokerError) -> bool:
        return self._inner.cancel(ticket, error)

    def queue(self) -> tuple[QueueEntry, ...]:
        return self._inner.queue()

    def upcoming(self) -> tuple[str, ...]:
        return self._inner.upcoming()

    def estimate(self, job: Job) -> Turn:
        return self._inner.estimate(job)

    def stats(self) -> Stats:
        return replace(self._inner.stats(), evictions=self._room.evictions)

    def drain(self) -> None:
        self._inner.drain()

    def wait_idle(self, timeout: float) -> bool:
        return self._inner.wait_idle(timeout)


class EvictingTicket:
    """A Ticket that makes room when its turn has come."""

    __slots__ = ("_begun", "_clock", "_inner", "_prepared_s", "_room")

    def __init__(self, inner: Ticket, room: MakesRoom, clock: Clock) -> None:
        self._inner = inner
        self._room = room
        self._clock = clock
        self._prepared_s = 0.0
        self._begun = False

    @property
    def number(self) -> int:
        return self._inner.number

    @property
    def job(self) -> Job:
        return self._inner.job

    @property
    def waited_s(self) -> float:
        return self._inner.waited_s

    @property
    def prepared_s(self) -> float:
        return self._prepared_s

    def wait(self) -> None:
        self._inner.wait()
        if self._begun or not self.job.makes_room:
            return
        began = self._clock.monotonic()
        try:
            self._room.make_room(self)
        finally:
            self._prepared_s = self._clock.monotonic() - began

    def pause(self, seconds: float) -> None:
        self._inner.pause(seconds)

    def relieve(self) -> bool:
        return self._room.relieve(self)

    def cancel(self, error: BrokerError) -> bool:
        return self._inner.cancel(error)

    def when_cancelled(self, action: Callable[[BrokerError], object]) -> None:
        self._inner.when_cancelled(action)

    def when_granted(self, begin: Callable[[], bool]) -> None:
        def begin_if_ready() -> bool:
            if self.job.makes_room and not self._room.ready(self.job.consumer):
                return False
            self._begun = begin()
            return self._begun

        self._inner.when_granted(begin_if_ready)

    def close(self) -> None:
        self._inner.close()
