"""Time: monotonic for every interval and deadline, the wall clock only for display."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol


class Clock(Protocol):
    """What the rest of the package may know of time."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""

    def now(self) -> datetime:
        """The wall clock, UTC, aware."""


class SystemClock:
    """The operating system's clocks."""

    monotonic = staticmethod(time.monotonic)
    now = staticmethod(partial(datetime.now, UTC))


def wall_time(clock: Clock, instant: float) -> datetime:
    """The wall-clock time of a monotonic `instant`, for display."""
    return clock.now() - timedelta(seconds=clock.monotonic() - instant)


def rfc3339(moment: datetime) -> str:
    """`moment` (aware) as RFC 3339 in UTC with milliseconds, e.g. `2026-05-11T11:33:39.120Z`."""
    text = moment.astimezone(UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
