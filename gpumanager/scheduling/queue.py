"""The queue: who waits, who runs, and counters. What happens next is decided by `decision`.

Every ticket waits on a Condition of its own, all on one lock, so that a grant wakes exactly the
thread it is for, with one waiter or a thousand.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import chain
from typing import Protocol

from gpumanager.clock import Clock, wall_time
from gpumanager.errors import BrokerError, QueueFull, ShuttingDown
from gpumanager.model import Job, QueueEntry, Stats, Turn
from gpumanager.scheduling.backlog import Backlog
from gpumanager.scheduling.decision import (
    Decision,
    Picture,
    Prepare,
    SoFar,
    Start,
    Wait,
    decide,
)
from gpumanager.scheduling.estimate import Forecast, Granting, Outlook, forecast
from gpumanager.scheduling.interface import Ticket
from gpumanager.scheduling.memory import Card
from gpumanager.scheduling.policy import Affinity, Policy, Prospect, Running, Waiting
from gpumanager.scheduling.sharing import ALONE, Sharing, may_join
from gpumanager.scheduling.ticket import QueueTicket
from gpumanager.scheduling.victims import Resident

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 300.0
_RETRY_REUSED_S = 0.25
"""For so long what was estimated for one refusal is told to the next, of a queue as long as it was:
a full one is asked again and again."""


class Granted(Ticket, Protocol):
    """A ticket that has the GPU, to whoever makes room for its job."""

    def next_step(self, card: Card, so_far: SoFar) -> Decision:
        """What to do for it now, by the card as it is and what was done for it `so_far`."""

    def idle_others(self, card: Card) -> list[Resident]:
        """All consumers but its own that may go."""

    def idle_trims(self, card: Card) -> list[Resident]:
        """All consumers but its own that give back something while they stay loaded."""


class Room(Protocol):
    """What has to be done on the card before a job can start."""

    @property
    def evictions(self) -> int:
        """Consumers unloaded so far."""

    def ready(self, job: Job) -> bool:
        """Whether there is nothing to do for a job, by what is known already: makes no call and
        does not wait, since it is asked under the queue's lock."""

    def prospect(self, job: Job) -> Prospect:
        """What a job would find, by what is known already; as `ready`."""

    def sharing(self, job: Job) -> Sharing:
        """With whom a job shares the GPU, by its consumer's settings; as `ready`."""

    def make_room(self, ticket: Granted) -> None:
        """Have the ticket's consumer fit and be loaded, or raise a BrokerError."""

    def relieve(self, ticket: Granted) -> bool:
        """Unload all others that may go; True if that gave something back."""


class Queue:
    """A Scheduler in one process.

    `max_queue` bounds how many may wait (those running not counted) and `max_wait`, in seconds,
    how long. `outlook` draws the picture of the card that estimates are made of; it is asked, and
    they are made, outside the lock. Without a `room` nothing is decided by memory; with one, the
    `policy` has to run one job at a time, but for those that share the GPU by their consumers'
    settings, or ValueError is raised.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_queue: int,
        max_wait: float,
        clock: Clock,
        outlook: Callable[[], Outlook] = Outlook,
        room: Room | None = None,
    ) -> None:
        if room is not None and policy.limit != 1:
            raise ValueError("eviction needs a policy that runs one job at a time")
        self._policy = policy
        self._outlook = outlook
        self._room = room
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._clock = clock
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._seen = None if room is None else _Seen(room)
        self._backlog = backlog = Backlog(policy, self._seen)
        self._waiting = backlog.waiting
        self._running = backlog.running
        self._tickets: dict[int, QueueTicket] = {}
        self._last_number = 0
        self._draining = False
        self._retry: tuple[int, float, float] | None = None

    def enqueue(self, job: Job) -> QueueTicket:
        max_wait = self._max_wait if job.max_wait is None else min(job.max_wait, self._max_wait)
        with self._lock:
            if not self._draining:
                now = self._clock.monotonic()
                self._last_number = number = self._last_number + 1
                place = Waiting(number, job, now, now + max_wait, self._sharing(job))
                ticket = QueueTicket(self, place)
                self._backlog.add(place)
                self._tickets[number] = ticket
                self._grant_locked(now)
                if number not in self._waiting or len(self._waiting) <= self._max_queue:
                    return ticket
                self._close_locked(number)
            draining = self._draining
        raise (ShuttingDown if draining else QueueFull)(
            "the broker is shutting down"
            if draining
            else f"{self._max_queue} requests wait already",
            consumer=job.consumer,
            retry_after=self._retry_after(),
        )

    def cancel(self, ticket: int, error: BrokerError) -> bool:
        with self._lock:
            found = self._tickets.get(ticket)
        return found is not None and found.cancel(error)

    def refuse(self, ticket: int, error: BrokerError) -> bool:
        with self._lock:
            if ticket not in self._waiting:
                return False
            self._cancel_locked(self._tickets[ticket], error)
            return True

    def queue(self) -> tuple[QueueEntry, ...]:
        waiting, running, now = self._places()
        expected = self._forecast(waiting, running, now)
        return (
            *(
                QueueEntry(r.ticket, r.job, "running", r.since, turn=expected.running[r.ticket])
                for r in running
            ),
            *(
                QueueEntry(w.ticket, w.job, "waiting", w.since, position, turn)
                for position, (w, turn) in enumerate(
                    zip(waiting, expected.turns, strict=True), start=1
                )
            ),
        )

    def upcoming(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(place.job.resident for place in self._backlog.upcoming())

    def estimate(self, job: Job) -> Turn:
        waiting, running, now = self._places()
        place = Waiting(0, job, now, now, self._sharing(job))
        turn = self._forecast([*waiting, place], running, now).turns[-1]
        free = self._policy.next_up([*waiting, place], running, now) is place
        joins = not waiting and may_join(place, running)
        if free or (joins and any(each.job.resident == job.resident for each in running)):
            return replace(turn, wait_s=0.0, overdue=False, surely_s=0.0)
        return turn

    def stats(self) -> Stats:
        with self._lock:
            backlog = self._backlog
            oldest = backlog.oldest
            return Stats(
                queue_depth=len(self._waiting),
                in_flight=len(self._running),
                total_jobs=backlog.total_jobs,
                last_wait_ms=round(backlog.last_wait_s * 1000),
                last_run_ms=round(backlog.last_run_s * 1000),
                oldest_queued=None if oldest is None else wall_time(self._clock, oldest.since),
                evictions=0 if self._room is None else self._room.evictions,
                longest_overtake=backlog.longest_overtake,
                longest_overtake_s=backlog.longest_overtake_s,
            )

    def drain(self) -> None:
        retry_after = self._retry_after()  # once: it looks at the whole queue
        with self._lock:
            self._draining = True
            for place in list(self._waiting.values()):
                error = ShuttingDown(
                    "the broker is shutting down",
                    consumer=place.job.consumer,
                    retry_after=retry_after,
                )
                self._cancel_locked(self._tickets[place.ticket], error)

    def wait_idle(self, timeout: float) -> bool:
        with self._lock:
            return self._idle.wait_for(lambda: not self._running, timeout)

    # -- inside ----------------------------------------------------------------------------

    def _grant_locked(self, now: float, to_begin: list[QueueTicket] | None = None) -> None:
        """Have those start, or be prepared, whose turn it is. Those that can start, and asked to be
        begun by who grants, are put into `to_begin`, where there is one, and woken later."""
        backlog = self._backlog
        while backlog.may_grant:
            decision = decide(backlog.picture(now), self._policy)
            if isinstance(decision, Start):
                for number in decision.tickets:
                    self._give_locked(number, now, to_begin)
            elif isinstance(decision, Prepare):
                self._tickets[decision.ticket]._unprepared = True
                self._give_locked(decision.ticket, now, prepared=False)
            else:
                if isinstance(decision, Wait) and decision.why == "hold":
                    self._tickets[decision.ticket]._hold_locked(decision.until)
                return

    def _give_locked(
        self,
        number: int,
        now: float,
        to_begin: list[QueueTicket] | None = None,
        *,
        prepared: bool = True,
    ) -> None:
        """The GPU is this one's."""
        ticket = self._tickets[number]
        place = self._backlog.grant(number, now, prepared=prepared)
        ticket._waited_s = now - place.since
        if to_begin is not None and ticket._begin is not None:
            ticket._beginning = True
            to_begin.append(ticket)
        else:
            ticket._turn.notify()

    def _besides(self, number: int) -> bool:
        """Close the pool for one that has to run alone; True if others have yet to end."""
        with self._lock:
            self._backlog.close_pool(number)
            return bool(self._backlog.besides(number))

    def _prepared(self, number: int) -> None:
        """What a job needs that has the GPU is ready: others may join it."""
        with self._lock:
            self._backlog.prepared(number)
            if self._waiting:
                self._grant_locked(self._clock.monotonic())

    def _preparing_locked(self, number: int, card: Card, so_far: SoFar) -> Picture:
        """For a ticket that has the GPU, and whose consumer has yet to get its room."""
        if number not in self._running:
            raise RuntimeError(f"ticket {number} was closed already")
        return self._backlog.preparing(number, self._clock.monotonic(), card, so_far)

    def _cancel_locked(self, ticket: QueueTicket, error: BrokerError) -> None:
        if ticket._error is None:
            ticket._error = error
        if ticket.number in self._waiting:
            self._close_locked(ticket.number)
        ticket._turn.notify()

    def _close_locked(self, number: int, to_begin: list[QueueTicket] | None = None) -> None:
        ticket = self._tickets.pop(number, None)
        if ticket is None:
            return
        now = self._clock.monotonic()
        if (place := self._backlog.remove(number)) is not None:
            ticket._waited_s = now - place.since
        else:
            self._backlog.end(number, now)
            if not self._running:
                self._idle.notify_all()
        if self._waiting:
            self._grant_locked(now, to_begin)

    def _sharing(self, job: Job) -> Sharing:
        return ALONE if self._seen is None else self._seen.sharing(job)

    def _places(self) -> tuple[list[Waiting], list[Running], float]:
        """Who waits, in the order of the queue, and who runs, as of one instant."""
        with self._lock:
            waiting, running = list(self._backlog.in_order()), list(self._running.values())
            return waiting, running, self._clock.monotonic()

    def _forecast(
        self, waiting: Collection[Waiting], running: Collection[Running], now: float
    ) -> Forecast:
        policy = self._policy
        granted: Granting = "in turns" if isinstance(policy, Affinity) else "in order"
        places: Iterable[Running | Waiting] = chain(running, waiting)
        if policy.limit != 1 or any(each.sharing.is_open for each in places):
            granted = "together"
        return forecast(waiting, running, self._outlook(), now, granted=granted)

    def _retry_after(self) -> float:
        """Seconds until the queue as it stands is done."""
        waiting, running, now = self._places()
        depth, last = len(waiting), self._retry
        if last is not None and last[0] == depth and now - last[1] < _RETRY_REUSED_S:
            return last[2]
        seconds = min(_LONGEST_RETRY_S, self._forecast(waiting, running, now).done_s)
        self._retry = depth, now, seconds
        return seconds


class _Seen:
    """What a room knows without a look at the card. A fault in it must not decide whose turn it
    is."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def ready(self, job: Job) -> bool:
        try:
            return self._room.ready(job)
        except Exception:
            log.exception("looking at who is ready failed")
            return False

    def sharing(self, job: Job) -> Sharing:
        try:
            return self._room.sharing(job)
        except Exception:
            log.exception("looking at whom a job shares the GPU with failed")
            return ALONE

    def prospect(self, job: Job) -> Prospect:
        try:
            return self._room.prospect(job)
        except Exception:
            log.exception("looking at what a job would find failed")
            return Prospect()
