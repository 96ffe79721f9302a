"""The queue: tickets, Conditions and counters. What decides is the policy.

Every ticket waits on a Condition of its own, all on one lock, so that a grant wakes exactly the
thread it is for, with one waiter or a thousand.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice

from gpumanager.clock import Clock, wall_time
from gpumanager.errors import BrokerError, QueueFull, QueueTimeout, ShuttingDown
from gpumanager.model import Job, QueueEntry, Stats, Turn
from gpumanager.scheduling.estimate import Forecast, Outlook, forecast
from gpumanager.scheduling.policy import Running, Waiting, overstayed
from tests.support.reference.policy import Policy

log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 300.0
_RETRY_REUSED_S = 0.25
"""For so long what was estimated for one refusal is told to the next, of a queue as long as it was:
a full one is asked again and again."""

_LONGEST_BEGIN_S = 5.0
"""Between two looks at whether a job was begun; it takes a fraction of a millisecond."""

_UPCOMING = 100
"""Jobs of the queue that are told of; what comes later hardly matters for who must go now."""


class Queue:
    """A Scheduler in one process.

    `max_queue` bounds how many may wait (those running not counted) and `max_wait`, in seconds,
    how long. `outlook` draws the picture of the card that estimates are made of; it is asked, and
    they are made, outside the lock.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_queue: int,
        max_wait: float,
        clock: Clock,
        outlook: Callable[[], Outlook] = Outlook,
    ) -> None:
        self._policy = policy
        self._outlook = outlook
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._clock = clock
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        # OrderedDict, not dict: finding the first of a dict whose head was deleted many times
        # walks over the holes.
        self._waiting: OrderedDict[int, Waiting] = OrderedDict()
        self._running: dict[int, Running] = {}
        self._tickets: dict[int, QueueTicket] = {}
        self._last_number = 0
        self._total_jobs = 0
        self._longest_overtake = 0
        self._last_wait_s = 0.0
        self._last_run_s = 0.0
        self._draining = False
        self._retry: tuple[int, float, float] | None = None

    @property
    def exclusive(self) -> bool:
        return self._policy.exclusive

    def enqueue(self, job: Job) -> QueueTicket:
        entered = self._enter(job)
        if isinstance(entered, QueueTicket):
            return entered
        raise entered(
            "the broker is shutting down"
            if entered is ShuttingDown
            else f"{self._max_queue} requests wait already",
            consumer=job.consumer,
            retry_after=self._retry_after(),
        )

    def _enter(self, job: Job) -> QueueTicket | type[QueueFull | ShuttingDown]:
        """A ticket, or why there is none."""
        with self._lock:
            if self._draining:
                return ShuttingDown
            now = self._clock.monotonic()
            max_wait = self._max_wait if job.max_wait is None else min(job.max_wait, self._max_wait)
            self._last_number += 1
            place = Waiting(self._last_number, job, since=now, deadline=now + max_wait)
            ticket = QueueTicket(self, place)
            self._waiting[place.ticket] = place
            self._tickets[place.ticket] = ticket
            self._grant_locked()
            if place.ticket in self._waiting and len(self._waiting) > self._max_queue:
                self._close_locked(place.ticket)
                return QueueFull
            return ticket

    def cancel(self, ticket: int, error: BrokerError) -> bool:
        with self._lock:
            found = self._tickets.get(ticket)
        return found is not None and found.cancel(error)

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
            takes = (place.job for place in self._waiting.values() if place.job.makes_room)
            return tuple(job.consumer for job in islice(takes, _UPCOMING))

    def estimate(self, job: Job) -> Turn:
        waiting, running, now = self._places()
        place = Waiting(0, job, since=now, deadline=now)
        turn = self._forecast([*waiting, place], running, now).turns[-1]
        if self._policy.next_up([*waiting, place], running, now) is place:
            return replace(turn, wait_s=0.0, overdue=False)
        return turn

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

    def _grant_locked(self, to_begin: list[QueueTicket] | None = None) -> None:
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
        if (place := self._waiting.pop(number, None)) is not None:
            ticket._waited_s = now - place.since
        else:
            held = now - self._running.pop(number).since
            self._last_run_s = held
            if not self._running:
                self._idle.notify_all()
        self._grant_locked(to_begin)

    def _places(self) -> tuple[list[Waiting], list[Running], float]:
        """Who waits, in the order of the queue, and who runs, as of one instant."""
        with self._lock:
            waiting, running = list(self._waiting.values()), list(self._running.values())
            return waiting, running, self._clock.monotonic()

    def _forecast(
        self, waiting: Iterable[Waiting], running: Iterable[Running], now: float
    ) -> Forecast:
        return forecast(waiting, running, self._outlook(), now)

    def _retry_after(self) -> float:
        """Seconds until the queue as it stands is done."""
        waiting, running, now = self._places()
        depth, last = len(waiting), self._retry
        if last is not None and last[0] == depth and now - last[1] < _RETRY_REUSED_S:
            return last[2]
        seconds = min(_LONGEST_RETRY_S, self._forecast(waiting, running, now).done_s)
        self._retry = depth, now, seconds
        return seconds


class QueueTicket:
    """A Ticket of `Queue`. Its fields belong to the queue's lock."""

    __slots__ = (
        "_action",
        "_begin",
        "_beginning",
        "_begun",
        "_error",
        "_overtaken",
        "_place",
        "_queue",
        "_turn",
        "_waited_s",
    )

    def __init__(self, queue: Queue, place: Waiting) -> None:
        self._queue = queue
        self._place = place
        self._turn = threading.Condition(queue._lock)
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
        return self._queue._clock.monotonic() - self._place.since if waited is None else waited

    @property
    def prepared_s(self) -> float:
        return 0.0

    def wait(self) -> None:
        waited = self._wait_for_turn()
        if waited is not None:
            raise QueueTimeout(
                f"no turn within {waited:.0f} s",
                consumer=self.job.consumer,
                retry_after=self._queue._retry_after(),
            )

    def _wait_for_turn(self) -> float | None:
        """Wait; returns after how many seconds it was given up, None if it was not."""
        queue, number = self._queue, self.number
        with queue._lock:
            while number in queue._waiting or self._beginning:
                if self._beginning:
                    self._turn.wait(_LONGEST_BEGIN_S)
                    continue
                now = queue._clock.monotonic()
                if overstayed(self._place, now):
                    queue._close_locked(number)
                    return now - self._place.since
                self._turn.wait(self._place.deadline - now)
            if self._error is not None and not self._begun:
                raise self._error
            if number not in queue._running:
                raise RuntimeError(f"ticket {number} was closed already")
            return None

    def pause(self, seconds: float) -> None:
        with self._queue._lock:
            self._turn.wait_for(lambda: self._error is not None, seconds)
            if self._error is not None:
                raise self._error

    def relieve(self) -> bool:
        return False

    def cancel(self, error: BrokerError) -> bool:
        queue = self._queue
        with queue._lock:
            if self.number not in queue._tickets:
                return False
            queue._cancel_locked(self, error)
            action, self._action = self._action, None
        if action is not None:
            action(error)
        return True

    def when_cancelled(self, action: Callable[[BrokerError], object]) -> None:
        with self._queue._lock:
            error = self._error
            if error is None:
                self._action = action
        if error is not None:
            action(error)

    def when_granted(self, begin: Callable[[], bool]) -> None:
        with self._queue._lock:
            if self.number in self._queue._waiting:
                self._begin = begin

    def close(self) -> None:
        to_begin: list[QueueTicket] = []
        with self._queue._lock:
            self._queue._close_locked(self.number, to_begin)
        for ticket in to_begin:
            ticket._begin_here()

    def _begin_here(self) -> None:
        begun = False
        try:
            begun = self._begin is not None and self._begin()
        except Exception:
            log.exception("beginning a job failed")
        finally:
            with self._queue._lock:
                self._begun = begun
                self._beginning = False
                self._turn.notify()
        if not begun:
            # Let go of the GIL: whoever was woken would wait for it, up to the interpreter's
            # switch interval, and the GPU with it.
            time.sleep(0)
