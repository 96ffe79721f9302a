"""In which order jobs start, and who has waited too long: pure functions over plain data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gpumanager.model import Job
from gpumanager.scheduling.sharing import ALONE, Sharing


@dataclass(frozen=True, slots=True)
class Waiting:
    """A place in the queue. `since` and `deadline` are monotonic seconds."""

    ticket: int
    job: Job
    since: float
    deadline: float
    sharing: Sharing = ALONE


@dataclass(frozen=True, slots=True)
class Running:
    """A job that holds the GPU. `since` is monotonic seconds, of the grant."""

    ticket: int
    job: Job
    since: float
    sharing: Sharing = ALONE


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a job would find. `loaded`: what it needs is on the card; `fits`: it could be loaded
    without anybody being unloaded. The rest are the usual seconds for loading that, for unloading
    it again, and of a job."""

    loaded: bool = True
    fits: bool = True
    load_s: float = 0.0
    unload_s: float = 0.0
    run_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Claim:
    """What is to be weighed of one place. `same` is how many wait for the same resident, this one
    included. Of those whom it would overtake, one was overtaken by `passed` jobs already, and the
    first time at `since` (monotonic seconds; None: never)."""

    prospect: Prospect
    same: int = 1
    passed: int = 0
    since: float | None = None


class Policy(Protocol):
    """Chooses the next job to be granted: never more than `limit` at once, and never one beyond
    the first `looks_at` of the queue."""

    @property
    def limit(self) -> int:
        """The most jobs that run at once on the card; with 1, more where their consumers share it
        (`sharing`)."""

    @property
    def looks_at(self) -> int:
        """So many of the first places are enough to choose from, however long the queue is."""

    def next_up(
        self, waiting: Iterable[Waiting], running: Collection[Running], now: float
    ) -> Waiting | None:
        """The waiting job to start now, or None. Asked again after each grant.

        `waiting` comes in the order of arrival, or, with `Affinity`, of turns.
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


@dataclass(frozen=True, slots=True)
class Affinity(FirstComeFirstServed):
    """Each in its turn (`turns` says whose it is), but jobs for what is loaded may overtake one
    that would cost a swap: nobody by more than `max_overtaken_by` jobs, nor for longer than
    `max_overtake` seconds.

    Within that, a swap is put off for as long as that costs those who wait no more than the swaps
    would, there and back: the seconds for which they were overtaken, times how many wait for
    something else, against the seconds that both swaps take, times how many wait.

    A long background job may be held back for `hold` seconds at most, if the next step of a
    conversation is about to come (`holds`); 0: never.
    """

    max_overtake: float = 30.0
    max_overtaken_by: int = 20
    hold: float = 0.0

    def overtaker(
        self,
        turn: Waiting,
        others: Iterable[Waiting],
        claims: Mapping[int, Claim],
        depth: int,
        now: float,
    ) -> Waiting | None:
        """Who starts before the one whose `turn` it is, and who would cost a swap; None if nobody
        does. `others` are the first for each resident that is loaded, in their order, `claims`
        say what there is to weigh, by ticket, and `depth` is how many wait in all."""
        swap = claims[turn.ticket].prospect
        for place in others:
            if self._may_overtake(claims[place.ticket], swap, depth, now):
                return place
        return None

    def _may_overtake(self, claim: Claim, swap: Prospect, depth: int, now: float) -> bool:
        own = claim.prospect
        since = now if claim.since is None else claim.since
        overtaken_s = now + own.run_s - since
        if claim.passed >= self.max_overtaken_by or overtaken_s > self.max_overtake:
            return False
        swaps_s = swap.load_s + own.unload_s + own.load_s + swap.unload_s
        return overtaken_s * (depth - claim.same) <= swaps_s * depth


def overstayed(waiting: Waiting, now: float) -> bool:
    """True if the job has to leave the queue."""
    return now >= waiting.deadline
