"""Which jobs are not tried for the moment, since the broker could not run them."""

from __future__ import annotations

import threading

from gpumanager.clock import Clock

FIRST_S = 1.0
LONGEST_S = 60.0


class Pauses:
    """Of consumers, and of single jobs: twice as long each time in a row. Safe from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._consumers: dict[str, tuple[float, float]] = {}
        self._jobs: dict[str, tuple[float, float]] = {}

    def note(self, consumer: str, job: str | None, at_least_s: float | None) -> None:
        """A job of the consumer could not be run: pause all of them, or only that one, if it is
        named; for no less than `at_least_s`, up to the longest pause."""
        paused, name = (self._consumers, consumer) if job is None else (self._jobs, job)
        with self._lock:
            now = self._clock.monotonic()
            until, seconds = paused.get(name, (0.0, 0.0))
            if until > now:
                return  # another one told the same just now
            seconds = min(LONGEST_S, max(FIRST_S, 2 * seconds, at_least_s or 0.0))
            paused[name] = now + seconds, seconds

    def over(self, consumer: str, job: str) -> None:
        """One of its jobs was sent."""
        with self._lock:
            self._consumers.pop(consumer, None)
            self._jobs.pop(job, None)

    def now(self) -> tuple[list[str], set[str]]:
        """The consumers and the jobs that are paused."""
        with self._lock:
            now = self._clock.monotonic()
            return (
                [name for name, (until, _) in self._consumers.items() if until > now],
                {name for name, (until, _) in self._jobs.items() if until > now},
            )
