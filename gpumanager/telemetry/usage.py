"""How much of the GPU each requester had in the last hour."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import datetime

from gpumanager.telemetry.eventlog import Recorded
from gpumanager.telemetry.events import JobEnded

MINUTES = 60
MOST = 500
"""Requesters that are told apart in one minute."""

OTHERS = "-"
"""Stands for all that are not told apart."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one requester had: seconds of the GPU, making room and loading included, and jobs."""

    requester: str
    seconds: float
    jobs: int


@dataclass(slots=True)
class _Minute:
    number: int
    seconds: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)


class Usage:
    """Counts the jobs that have ended, by the minute. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minutes: deque[_Minute] = deque(maxlen=MINUTES)

    def take_note(self, recorded: Recorded) -> None:
        """A listener of events."""
        job = recorded.event
        if not isinstance(job, JobEnded):
            return
        number, requester = _minute(recorded.at), job.requester or OTHERS
        with self._lock:
            if not self._minutes or self._minutes[-1].number < number:
                self._minutes.append(_Minute(number))
            minute = self._minutes[-1]
            if requester not in minute.jobs and len(minute.jobs) >= MOST:
                requester = OTHERS
            # Counter's own arithmetic is for whole numbers only by its type.
            minute.seconds[requester] += (job.prepare_ms + job.run_ms) / 1000  # type: ignore[assignment]
            minute.jobs[requester] += 1

    def shares(self, now: datetime, most: int, whose: str | None = None) -> list[Share]:
        """Those that had the most, in that order, and all others in one last share. `whose` is the
        name of a key that is told of its own share only; None: of everybody's."""
        first = _minute(now) - MINUTES
        seconds: Counter[str] = Counter()
        jobs: Counter[str] = Counter()
        with self._lock:
            for minute in self._minutes:
                if minute.number > first:
                    seconds.update(minute.seconds)
                    jobs.update(minute.jobs)
        named = [each for each, _ in seconds.most_common() if each != OTHERS]
        named = named[:most] if whose is None else [each for each in named if each == whose]
        shares = [Share(each, seconds[each], jobs[each]) for each in named]
        left = sum(jobs.values()) - sum(share.jobs for share in shares)
        if left:
            rest = sum(seconds.values()) - sum(share.seconds for share in shares)
            shares.append(Share(OTHERS, max(0.0, rest), left))
        return shares


def _minute(at: datetime) -> int:
    return int(at.timestamp()) // 60
