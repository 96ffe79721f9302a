"""Jobs whose turn will not come in the time that their clients wait for it (`Prefer: wait=N`): they
are told so as soon as that is known.

Nobody is refused on a guess: only those count that come before it in any case (all of them, or,
where jobs overtake each other, those of its own requester, urgency and resident, and what runs),
as far as what they take was seen before, and no job that is overdue. A job that comes is refused if
that is longer than its client waits. One that waits already has to be late by a margin: estimates
go up and down a little while a job runs, and it has waited so far.
"""

from __future__ import annotations

import math

from gpumanager.clock import Clock
from gpumanager.errors import QueueTimeout
from gpumanager.model import Job, QueueEntry
from gpumanager.scheduling.interface import Scheduler
from gpumanager.worker import PeriodicWorker

EVERY_S = 1.0
"""The least time between two looks at those that wait."""

MARGIN = 1.25
"""So many times longer than what is left to it has one that waits to be expected to wait on."""

CROWD = 1000
"""With more jobs than that in the queue nobody is told at once, but with the next look: an estimate
goes through all that wait, and the look makes one for all of them."""

LONGEST_RETRY_S = 300.0


class Deadlines:
    """Of the jobs at one scheduler, which itself lets none wait longer than `max_wait` seconds.
    `worker` looks at those that wait; it is not started. Safe from any thread."""

    def __init__(
        self, scheduler: Scheduler, clock: Clock, max_wait: float, crowd: int = CROWD
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._max_wait = max_wait
        self._crowd = crowd
        self._asleep = True
        self._next = -math.inf
        self.worker = PeriodicWorker("deadlines", self.look, retry_s=EVERY_S)

    def check(self, job: Job) -> None:
        """Raises QueueTimeout if a job that comes now will not have its turn in time."""
        if self._scheduler.stats().queue_depth > self._crowd:
            return
        limit = self._limit(job)
        turn = self._scheduler.estimate(job)
        if turn.surely_s > limit:
            raise QueueTimeout(
                f"no turn within {_seconds(limit)}: it is expected in {_seconds(turn.surely_s)}",
                consumer=job.consumer,
                retry_after=min(turn.surely_s - limit, LONGEST_RETRY_S),
                estimate_s=turn.surely_s,
            )

    def joined(self) -> None:
        """A job with a deadline has joined the queue."""
        if self._asleep:
            self.worker.wake()

    def look(self) -> float:
        """Refuse those whose turn will not come in time any more. Returns the seconds until it is
        to be called again."""
        now = self._clock.monotonic()
        if now < self._next:
            self._asleep = False  # nobody need wake it: it looks soon
            return self._next - now
        self._next = now + EVERY_S
        self._asleep = True  # before the look: who joins after it has it made again
        waiting = [
            entry
            for entry in self._scheduler.queue()
            if entry.state == "waiting" and entry.job.max_wait is not None
        ]
        if not waiting:
            return math.inf
        self._asleep = False
        for entry in waiting:
            error = self._too_late(entry, self._clock.monotonic())
            if error is not None:
                self._scheduler.refuse(entry.ticket, error)
        return EVERY_S

    def _limit(self, job: Job) -> float:
        return self._max_wait if job.max_wait is None else min(job.max_wait, self._max_wait)

    def _too_late(self, entry: QueueEntry, now: float) -> QueueTimeout | None:
        limit, waited, turn = self._limit(entry.job), now - entry.since, entry.turn
        left = max(0.0, limit - waited)
        if turn.surely_s <= MARGIN * left:
            return None
        return QueueTimeout(
            f"no turn within {_seconds(limit)}: after {_seconds(waited)} it is expected in "
            f"{_seconds(turn.surely_s)}",
            consumer=entry.job.consumer,
            retry_after=min(max(0.0, turn.surely_s - limit), LONGEST_RETRY_S),
            estimate_s=turn.surely_s,
        )


def _seconds(seconds: float) -> str:
    return f"{round(seconds, 1):g} s"
