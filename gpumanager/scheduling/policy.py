"""In which order jobs start, and who has waited too long: pure functions over plain data."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from gpumanager.model import Job


@dataclass(frozen=True, slots=True)
class Waiting:
    """A place in the queue. `since` and `deadline` are monotonic seconds."""

    ticket: int
    job: Job
    since: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Running:
    """A job that holds the GPU. `since` is monotonic seconds, of the grant."""

    ticket: int
    job: Job
    since: float


class Policy(Protocol):
    """Chooses the next job to be granted: never more than `limit` at once, and never one beyond
    the first `looks_at` of the queue."""

    @property
    def limit(self) -> int:
        """The most jobs that run at once on the card."""

    @property
    def looks_at(self) -> int:
        """So many of the first places are enough to choose from, however long the queue is."""

    def next_up(
        self, waiting: Iterable[Waiting], running: Collection[Running], now: float
    ) -> Waiting | None:
        """The waiting job to start now, or None. Asked again after each grant.

        `waiting` comes in the order of arrival.
        """


@dataclass(frozen=True, slots=True)
class FirstComeFirstServed:
    """Strict arrival order, up to `limit` jobs at once."""

    limit: int = 1
    looks_at: int = 1

    def next_up(
        self,
        waiting: Iterable[Waiting],
        running: Collection[Running],
        now: float,  # noqa: ARG002  # part of the interface; arrival order needs no time
    ) -> Waiting | None:
        if len(running) >= self.limit:
            return None
        return next(iter(waiting), None)


def overstayed(waiting: Waiting, now: float) -> bool:
    """True if the job has to leave the queue."""
    return now >= waiting.deadline
