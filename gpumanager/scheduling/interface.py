"""What the rest of the package knows of a scheduler.

Nothing here speaks of a lock: a scheduler may run one job at a time or many, on one GPU or
several, in this process or with others. A caller takes a ticket, waits for it, works, closes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gpumanager.errors import BrokerError
from gpumanager.model import Job, LineEntry, Stats


class Ticket(Protocol):
    """One job's place in the line, then its hold on the GPU.

    The owner calls `wait`, works, and calls `close` in a `finally`, whatever happened; any
    thread may call `cancel`.
    """

    @property
    def number(self) -> int:
        """Rises with arrival; unique for the life of the scheduler."""

    @property
    def job(self) -> Job:
        """What was enqueued."""

    @property
    def waited_s(self) -> float:
        """Seconds in line so far, or until the grant."""

    @property
    def prepared_s(self) -> float:
        """Seconds from the grant until the consumer was ready: evictions and loading."""

    def wait(self) -> None:
        """Return when the job may run. Raises QueueTimeout, or the error of `cancel`; with
        eviction also InsufficientVram, ConsumerUnreachable and ConsumerTimeout."""

    def pause(self, seconds: float) -> None:
        """Sleep that `cancel` interrupts; then, or if cancelled before, its error is raised."""

    def cancel(self, error: BrokerError) -> bool:
        """Have `wait` and `pause` raise `error`. A waiting ticket leaves the line at once; a
        running one keeps the GPU until it is closed. False if it was closed already."""

    def when_cancelled(self, action: Callable[[BrokerError], object]) -> None:
        """Have `action` called with the error of a `cancel` that comes while the job runs; at
        once, if it came already. It runs on the cancelling thread, outside any lock."""

    def close(self) -> None:
        """Leave the line, or give the GPU back. Idempotent, never raises."""


class Scheduler(Protocol):
    """Decides which jobs run. Safe from any thread."""

    @property
    def exclusive(self) -> bool:
        """True if a running job has the whole GPU to itself."""

    def enqueue(self, job: Job) -> Ticket:
        """Take a ticket. Raises QueueFull or ShuttingDown."""

    def cancel(self, ticket: int, error: BrokerError) -> bool:
        """Cancel by number; False if there is no such ticket (any more)."""

    def line(self) -> tuple[LineEntry, ...]:
        """Who runs and who waits, in the order of the tickets, as of one instant."""

    def stats(self) -> Stats:
        """The counters, as of one instant."""

    def drain(self) -> None:
        """Refuse new jobs and those in line with ShuttingDown; running ones go on."""

    def wait_idle(self, timeout: float) -> bool:
        """True as soon as nothing runs; False after `timeout` seconds."""
