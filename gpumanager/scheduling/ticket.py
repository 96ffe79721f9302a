"""A place in the queue, and then a hold on the GPU."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from gpumanager.errors import BrokerError, QueueTimeout
from gpumanager.scheduling.decision import Decision, SoFar, decide, idle_others, idle_trims
from gpumanager.scheduling.memory import Card
from gpumanager.scheduling.policy import Waiting, overstayed
from gpumanager.scheduling.victims import Resident

if TYPE_CHECKING:
    from gpumanager.scheduling.queue import Queue

log = logging.getLogger(__name__)

_RELIEF_POLL_S = 0.05
"""Between two looks at whether those have ended that ran beside a job that ran out of memory."""

_LONGEST_BEGIN_S = 5.0
"""Between two looks at whether a job was begun; it takes a fraction of a millisecond."""


class QueueTicket:
    """A Ticket of `Queue`. What is private belongs to the queue's lock."""

    __slots__ = (
        "_action",
        "_begin",
        "_beginning",
        "_begun",
        "_error",
        "_held_until",
        "_place",
        "_queue",
        "_turn",
        "_unprepared",
        "_waited_s",
        "job",
        "number",
        "prepared_s",
    )

    def __init__(self, queue: Queue, place: Waiting) -> None:
        self.number = place.ticket
        self.job = place.job
        self.prepared_s = 0.0
        self._queue = queue
        self._place = place
        self._turn = threading.Condition(queue._lock)
        self._waited_s: float | None = None
        self._error: BrokerError | None = None
        self._action: Callable[[BrokerError], object] | None = None
        self._begin: Callable[[], bool] | None = None
        self._beginning = False
        self._begun = False
        self._unprepared = False
        self._held_until = inf

    @property
    def waited_s(self) -> float:
        waited = self._waited_s
        return self._queue._clock.monotonic() - self._place.since if waited is None else waited

    def wait(self) -> None:
        queue, number, late = self._queue, self.number, False
        with queue._lock:
            while number in queue._waiting or self._beginning:
                if self._beginning:
                    self._turn.wait(_LONGEST_BEGIN_S)
                    continue
                now = queue._clock.monotonic()
                if overstayed(self._place, now):
                    late = True
                    queue._close_locked(number)
                elif now >= self._held_until:
                    self._held_until = inf
                    queue._grant_locked(now)
                else:
                    self._turn.wait(min(self._place.deadline, self._held_until) - now)
            if self._error is not None and not self._begun:
                raise self._error
            if number not in queue._running and not late:
                raise RuntimeError(f"ticket {number} was closed already")
        if late:
            raise QueueTimeout(
                f"no turn within {self.waited_s:.0f} s",
                consumer=self.job.consumer,
                retry_after=queue._retry_after(),
            )
        if self._unprepared:
            self._prepare()

    def _hold_locked(self, until: float) -> None:
        """It would be this one's turn, but for a hold: its own thread has it decided anew when that
        is over."""
        if until != self._held_until:
            self._held_until = until
            self._turn.notify()

    def _prepare(self) -> None:
        queue, self._unprepared = self._queue, False
        if queue._room is None:
            return
        began = queue._clock.monotonic()
        try:
            queue._room.make_room(self)
        finally:
            self.prepared_s = queue._clock.monotonic() - began
        queue._prepared(self.number)

    def next_step(self, card: Card, so_far: SoFar) -> Decision:
        queue = self._queue
        with queue._lock:
            return decide(queue._preparing_locked(self.number, card, so_far), queue._policy)

    def idle_others(self, card: Card) -> list[Resident]:
        queue = self._queue
        with queue._lock:
            return idle_others(queue._preparing_locked(self.number, card, SoFar()))

    def idle_trims(self, card: Card) -> list[Resident]:
        queue = self._queue
        with queue._lock:
            return idle_trims(queue._preparing_locked(self.number, card, SoFar()))

    def pause(self, seconds: float) -> None:
        with self._queue._lock:
            self._turn.wait_for(lambda: self._error is not None, seconds)
            if self._error is not None:
                raise self._error

    def relieve(self) -> bool:
        queue, room = self._queue, self._queue._room
        if room is None:
            return False
        waited = False
        while queue._besides(self.number):  # their end is bounded by their own time-outs
            waited = True
            self.pause(_RELIEF_POLL_S)
        # Alone it may have enough, even if nobody else gives anything back.
        return room.relieve(self) or waited

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
