"""What the rest of the package knows of a scheduler.

Nothing here speaks of a lock: a scheduler may run one job at a time or many, on one GPU or
several, in this process or with others. A caller takes a ticket, waits for it, works, closes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from gpumanager.errors import BrokerError
from gpumanager.gpu.accounting import Balance
from gpumanager.model import Job, Outcome, QueueEntry, Stats, Turn


class Ticket(Protocol):
    """One job's place in the queue, then its hold on the GPU.

    The owner calls `wait`, works, and calls `close` in a `finally`, whatever happened; any
    thread may call `cancel`.
    """

    @property
    def number(self) -> int:
        """Rises with arrival; unique for the life of the scheduler."""

    @property
    def job(self) -> Job:
        """The job that this ticket stands for."""

    @property
    def waited_s(self) -> float:
        """Seconds in the queue so far, or until the grant."""

    @property
    def prepared_s(self) -> float:
        """Seconds from the grant until the consumer was ready: evictions and loading."""

    def wait(self) -> None:
        """Return when the job may run. Raises QueueTimeout, or the error of `cancel`; with
        eviction also InsufficientVram, ConsumerUnreachable and ConsumerTimeout."""

    def pause(self, seconds: float) -> None:
        """Sleep that `cancel` interrupts; then, or if cancelled before, its error is raised."""

    def cancel(self, error: BrokerError) -> bool:
        """Have `wait` and `pause` raise `error`. A waiting ticket leaves the queue at once; a
        running one keeps the GPU until it is closed. False if it was closed already."""

    def when_cancelled(self, action: Callable[[BrokerError], object]) -> None:
        """Have `action` called with the error of a `cancel` that comes while the job runs; at
        once, if it came already. It runs on the cancelling thread, outside any lock."""

    def relieve(self) -> bool:
        """For a running job whose consumer ran out of memory: wait for those that run beside it,
        have nobody join it from now on, and unload all others that may go. True if that gave
        something back, so that the job may be tried again. Raises as `wait` does; False where the
        scheduler does not evict."""

    def when_granted(self, begin: Callable[[], bool]) -> None:
        """While it waits: have `begin` called, once and before `wait` returns, by whichever
        thread hands the GPU over, so that the job is under way before its own thread has even
        woken up. It must not block; it may not be called at all (where room has to be made first,
        or the turn has come already). True: the job has begun. Then a cancel is no longer raised
        by `wait`, but goes to `when_cancelled`."""

    def close(self) -> None:
        """Leave the queue, or give the GPU back. Idempotent, never raises."""


class Scheduler(Protocol):
    """Decides which jobs run. Safe from any thread."""

    def enqueue(self, job: Job) -> Ticket:
        """Take a ticket. Raises QueueFull or ShuttingDown."""

    def cancel(self, ticket: int, error: BrokerError) -> bool:
        """Cancel by number; False if there is no such ticket (any more)."""

    def refuse(self, ticket: int, error: BrokerError) -> bool:
        """Have a ticket that still waits leave the queue with `error`, by its number. False if it
        does not wait (any more): then nothing happens to it."""

    def queue(self) -> tuple[QueueEntry, ...]:
        """Who runs and who waits, in the order of the tickets, as of one instant."""

    def upcoming(self) -> tuple[str, ...]:
        """What the jobs that wait need on the card (`Job.resident`), in the order in which they
        will be granted as things stand: the first ones, and only those that take memory."""

    def estimate(self, job: Job) -> Turn:
        """What is expected of a job that came now."""

    def stats(self) -> Stats:
        """The counters, as of one instant."""

    def drain(self) -> None:
        """Refuse new jobs and those in the queue with ShuttingDown; running ones go on."""

    def wait_idle(self, timeout: float) -> bool:
        """True as soon as nothing runs; False after `timeout` seconds."""


@dataclass(frozen=True, slots=True)
class Release:
    """What became of an unload. `mib` is the victim's own drop, `expected_mib` what it was taken
    to give back, `residue_mib` what it still holds, None where that cannot be told; `taken_by` says
    who took what it gave. `more_until` is the monotonic time until which more of it may come; 0 if
    it was waited for to its end, so that what it still holds is what it keeps. `unverified`: the
    card cannot be measured; `gone`: its process had ended already. `certain` is False where nobody
    measured what it held before, so that one that gave nothing back may have had nothing. `busy`:
    it works on a job of somebody else, and was left alone, or has yet to come to it. `ask_again`: a
    job of somebody else has loaded it after the unload. `asked` is False where it had unloaded by
    itself already, so that there was nothing to ask it for."""

    outcome: Outcome
    mib: int = 0
    expected_mib: int = 0
    residue_mib: int | None = None
    taken_by: str = ""
    seconds: float = 0.0
    certain: bool = True
    ask_again: bool = False
    more_until: float = 0.0
    asked: bool = True

    @property
    def complete(self) -> bool:
        """The victim gave back what it was expected to."""
        return self.outcome in ("released", "stolen")


@dataclass(frozen=True, slots=True)
class PlannedVictim:
    """A consumer, or a model of one, that would be unloaded, and the MiB that gives back; by the
    `method` trim it gives them back while it stays loaded. `last_used` is monotonic seconds, None
    if it had no job yet; `reload_s` how long it takes to load again; `wanted` the place of its
    first job in the queue, counted from 1, None if none of its jobs waits;
    `unload_s` how long unloading it takes."""

    name: str
    mib: int
    last_used: float | None
    reload_s: float
    wanted: int | None = None
    unload_s: float = 0.0
    method: Literal["unload", "trim"] = "unload"


@dataclass(frozen=True, slots=True)
class Preview:
    """What would happen if a job of `consumer`, with that `model`, had its turn now. `fits`:
    without unloading anybody; else the `victims` would go, in their order, and if there are none,
    it is `short_mib` that even unloading all that may go could not give."""

    consumer: str
    fits: bool
    victims: tuple[PlannedVictim, ...]
    short_mib: int
    needed_mib: int
    held_mib: int
    balance: Balance
    must_load: bool
    model: str | None = None


class Moves(Protocol):
    """Changes who is resident, for the holder of a ticket. Raises BrokerError."""

    def unload(self, name: str, ticket: Ticket, *, patient: bool = True) -> Release:
        """Unload a consumer, or one model of it (`model.resident_name`), whoever it is. One that
        works on a job of somebody else is waited for, or, without patience, left alone."""

    def load(self, name: str, ticket: Ticket) -> None:
        """Load a consumer, where making room for it has not done so already."""

    def preview(self, job: Job) -> Preview:
        """What making room for a job would do now. For anybody; acts on nothing."""
