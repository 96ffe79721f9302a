"""The line: tickets, Conditions and counters. What decides is the policy.

Every ticket waits on a Condition of its own, all on one lock, so that a grant wakes exactly the
thread it is for, with one waiter or a thousand.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from gpumanager.clock import Clock, wall_time
from gpumanager.errors import BrokerError, QueueFull, QueueTimeout, ShuttingDown
from gpumanager.model import Job, LineEntry, Stats
from gpumanager.scheduling.estimate import HoldTimes, until_granted
from gpumanager.scheduling.policy import Policy, Running, Waiting, overstayed

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 300.0
_LONGEST_BEGIN_S = 5.0
"""Between two looks at whether a job was begun; it takes a fraction of a millisecond."""

_UPCOMING = 100
"""Jobs of the queue that are told of; what comes later hardly matters for who must go now."""


class Line:
    """A Scheduler in one process.

    `max_queue` bounds how many may wait (those running not counted) and `max_wait`, in seconds,
    how long.
    """

    def __init__(self, policy: Policy, *, max_queue: int, max_wait: float, clock: Clock) -> None:
        self._policy = policy
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._clock = clock
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        # OrderedDict, not dict: finding the first of a dict whose head was deleted many times
        # walks over the holes.
        self._waiting: OrderedDict[int, Waiting] = OrderedDict()
        self._running: dict[int, Running] = {}
        self._tickets: dict[int, LineTicket] = {}
        self._last_number = 0
        self._total_jobs = 0
        self._longest_overtake = 0
        self._last_wait_s = 0.0
        self._last_run_s = 0.0
        self._holds = HoldTimes()
        self._draining = False

    @property
    def exclusive(self) -> bool:
        return self._policy.exclusive

    def enqueue(self, job: Job) -> LineTicket:
        with self._lock:
            if self._draining:
                raise _shutting_down(job, self._retry_after_locked())
            now = self._clock.monotonic()
            max_wait = self._max_wait if job.max_wait is None else min(job.max_wait, self._max_wait)
            self._last_number += 1
            place = Waiting(self._last_number, job, since=now, deadline=now + max_wait)
            ticket = LineTicket(self, place)
            self._waiting[place.ticket] = place
            self._tickets[place.ticket] = ticket
            self._grant_locked()
            if place.ticket in self._waiting and len(self._waiting) > self._max_queue:
                self._close_locked(place.ticket)
                raise QueueFull(
                    f"{len(self._waiting)} requests wait already",
                    consumer=job.consumer,
                    retry_after=self._retry_after_locked(),
                )
            return ticket

    def cancel(self, ticket: int, error: BrokerError) -> bool:
        with self._lock:
            found = self._tickets.get(ticket)
        return found is not None and found.cancel(error)

    def line(self) -> tuple[LineEntry, ...]:
        with self._lock:
            running = [
                LineEntry(r.ticket, r.job, "running", r.since) for r in self._running.values()
            ]
            waiting = [
                LineEntry(w.ticket, w.job, "waiting", w.since, position, estimate)
                for position, (w, estimate) in enumerate(
                    zip(self._waiting.values(), self._estimates_locked(), strict=False), start=1
                )
            ]
            return (*running, *waiting)

    def upcoming(self) -> tuple[str, ...]:
        with self._lock:
            takes = (place.job for place in self._waiting.values() if place.job.makes_room)
            return tuple(job.consumer for job in islice(takes, _UPCOMING))

    def wait_estimate(self) -> float:
        with self._lock:
            return self._estimates_locked()[-1]

    def stats(self) -> Stats:
        with self._lock:
            oldest = next(iter(self._waiting.values()), None)
            return Stats(
                queue_depth=len(self._waiting),
                in_flight=len(self._running),
                total_jobs=self._total_jobs,
                last_wait_ms=round(self._last_wait_s * 1000),
                last_run_ms=round(self._last_run_s * 1000),
                oldest_queued=None if oldest is None else wall_time(self._clock, oldest.since),
                longest_overtake=self._longest_overtake,
            )

    def drain(self) -> None:
        with self._lock:
            self._draining = True
            retry_after = self._retry_after_locked()  # once: it walks the whole line
            for place in list(self._waiting.values()):
                error = _shutting_down(place.job, retry_after)
                self._cancel_locked(self._tickets[place.ticket], error)

    def wait_idle(self, timeout: float) -> bool:
        with self._lock:
            return self._idle.wait_for(lambda: not self._running, timeout)

    def _grant_locked(self, to_begin: list[LineTicket] | None = None) -> None:
        """Grant what the policy says. Those that asked to be begun by who grants are put into
        `to_begin`, where there is one, and woken later."""
        now = self._clock.monotonic()
        while self._waiting:
            chosen = self._policy.next_up(self._waiting.values(), self._running.values(), now)
            if chosen is None:
                return
            self._count_overtakes_locked(chosen)
            del self._waiting[chosen.ticket]
            self._running[chosen.ticket] = Running(chosen.ticket, chosen.job, since=now)
            self._total_jobs += 1
            self._last_wait_s = now - chosen.since
            ticket = self._tickets[chosen.ticket]
            ticket._waited_s = self._last_wait_s
            if to_begin is not None and ticket._begin is not None:
                ticket._beginning = True
                to_begin.append(ticket)
            else:
                ticket._turn.notify()

    def _count_overtakes_locked(self, chosen: Waiting) -> None:
        for place in self._waiting.values():
            if place is chosen:
                return
            ticket = self._tickets[place.ticket]
            ticket._overtaken += 1
            self._longest_overtake = max(self._longest_overtake, ticket._overtaken)

    def _cancel_locked(self, ticket: LineTicket, error: BrokerError) -> None:
        if ticket._error is None:
            ticket._error = error
        if ticket.number in self._waiting:
            self._close_locked(ticket.number)
        ticket._turn.notify()

    def _close_locked(self, number: int, to_begin: list[LineTicket] | None = None) -> None:
        ticket = self._tickets.pop(number, None)
        if ticket is None:
            return
        now = self._clock.monotonic()
        if (place := self._waiting.pop(number, None)) is not None:
            ticket._waited_s = now - place.since
        else:
            held = now - self._running.pop(number).since
            self._last_run_s = held
            if ticket.job.makes_room:
                self._holds.learn(ticket.job.consumer, held)
            if not self._running:
                self._idle.notify_all()
        self._grant_locked(to_begin)

    def _estimates_locked(self) -> list[float]:
        return until_granted(
            self._waiting.values(),
            self._running.values(),
            self._clock.monotonic(),
            self._holds.expected,
        )

    def _retry_after_locked(self) -> float:
        """Seconds until the line as it stands is done, from how long jobs took lately."""
        return min(_LONGEST_RETRY_S, self._estimates_locked()[-1])


def _shutting_down(job: Job, retry_after: float) -> ShuttingDown:
    return ShuttingDown(
        "the broker is shutting down", consumer=job.consumer, retry_after=retry_after
    )


class LineTicket:
    """A Ticket of `Line`. Its fields belong to the line's lock."""

    __slots__ = (
        "_action",
        "_begin",
        "_beginning",
        "_begun",
        "_error",
        "_line",
        "_overtaken",
        "_place",
        "_turn",
        "_waited_s",
    )

    def __init__(self, line: Line, place: Waiting) -> None:
        self._line = line
        self._place = place
        self._turn = threading.Condition(line._lock)
        self._waited_s: float | None = None
        self._error: BrokerError | None = None
        self._action: Callable[[BrokerError], object] | None = None
        self._begin: Callable[[], bool] | None = None
        self._beginning = False
        self._begun = False
        self._overtaken = 0

    @property
    def number(self) -> int:
        return self._place.ticket

    @property
    def job(self) -> Job:
        return self._place.job

    @property
    def waited_s(self) -> float:
        waited = self._waited_s
        return self._line._clock.monotonic() - self._place.since if waited is None else waited

    @property
    def prepared_s(self) -> float:
        return 0.0

    def wait(self) -> None:
        line, number = self._line, self.number
        with line._lock:
            while number in line._waiting or self._beginning:
                if self._beginning:
                    self._turn.wait(_LONGEST_BEGIN_S)
                    continue
                now = line._clock.monotonic()
                if overstayed(self._place, now):
                    line._close_locked(number)
                    raise QueueTimeout(
                        f"no turn within {now - self._place.since:.0f} s",
                        consumer=self.job.consumer,
                        retry_after=line._retry_after_locked(),
                    )
                self._turn.wait(self._place.deadline - now)
            if self._error is not None and not self._begun:
                raise self._error
            if number not in line._running:
                raise RuntimeError(f"ticket {number} was closed already")

    def pause(self, seconds: float) -> None:
        with self._line._lock:
            self._turn.wait_for(lambda: self._error is not None, seconds)
            if self._error is not None:
                raise self._error

    def relieve(self) -> bool:
        return False

    def cancel(self, error: BrokerError) -> bool:
        line = self._line
        with line._lock:
            if self.number not in line._tickets:
                return False
            line._cancel_locked(self, error)
            action, self._action = self._action, None
        if action is not None:
            action(error)
        return True

    def when_cancelled(self, action: Callable[[BrokerError], object]) -> None:
        with self._line._lock:
            error = self._error
            if error is None:
                self._action = action
        if error is not None:
            action(error)

    def when_granted(self, begin: Callable[[], bool]) -> None:
        with self._line._lock:
            if self.number in self._line._waiting:
                self._begin = begin

    def close(self) -> None:
        to_begin: list[LineTicket] = []
        with self._line._lock:
            self._line._close_locked(self.number, to_begin)
        for ticket in to_begin:
            ticket._begin_here()

    def _begin_here(self) -> None:
        begun = False
        try:
            begun = self._begin is not None and self._begin()
        except Exception:
            log.exception("beginning a job failed")
        finally:
            with self._line._lock:
                self._begun = begun
                self._beginning = False
                self._turn.notify()
        if not begun:
            # Let go of the GIL: whoever was woken would wait for it, up to the interpreter's
            # switch interval, and the GPU with it.
            time.sleep(0)
