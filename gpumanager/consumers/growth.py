"""Whether a consumer that holds more and more of the card's memory grows or leaks.

A cache grows with use and levels off, and is given back when the consumer is unloaded. A leak goes
on with the jobs, or stays when the consumer is unloaded. So two things are compared: what the
consumer holds at rest after each job since it was loaded, and what is left after each unload (or
after each load, where it is never seen unloaded).

The rule for a leak with the jobs looks at `ENOUGH` levels or more, in eight parts of equal length,
and takes the median of each: the whole has to rise by more than the `tolerance`, in at least six of
the seven steps, along a straight line (`STRAIGHT`), and about as fast in its second half as in its
first (`GOES_ON`). A cache that fills as larger and larger jobs come rises in ever rarer steps,
and fails the last two. It is applied to the latest levels and to all since the load, which are
thinned out as they become many, so that a slow leak is found, too, only later.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

from gpumanager.model import Growth

TOLERANCE_MIB = 64
TOLERANCE_SHARE = 0.02
"""What a level may differ by, of itself, without that meaning anything; whichever is more."""

SOME = 4
"""Levels since the load from which on it is told whether the consumer is steady."""

ENOUGH = 40
"""Levels since the load from which on a leak is told: a cache may take that many jobs to fill."""

MOST = 2 * ENOUGH
"""Levels that are kept of one load. When there are more, each two become the lower one of them."""

STRAIGHT = 0.85
"""The least share of the levels' variance that a straight line has to explain (R squared)."""

GOES_ON = 0.6
"""The least slope of either half of the levels, as a share of the other's."""

LEVELLED = 0.2
"""A leak was none if the last quarter of the levels rises by less than this share of it."""

LOADS = 6
"""Loads in a row after each of which more has to be left than before, for a leak over loads."""

GAVE_SHARE = 0.1
"""A trim that gave less than this of what it was taken to give has given nothing."""

STEP_MIB = 8
"""The least that has to be added each time, and also half of the mean."""


def tolerance(mib: float) -> float:
    """What a level of so many MiB may differ by."""
    return max(TOLERANCE_MIB, TOLERANCE_SHARE * mib)


class _Level(NamedTuple):
    """What it held at rest after so many jobs since its load, in MiB, and when that was seen, in
    seconds since the epoch."""

    jobs: int
    mib: int
    at: float


class GrowthWatch:
    """Of one consumer. Times are seconds since the epoch; `jobs` counts the jobs that it ever
    had."""

    def __init__(self) -> None:
        self.growth = Growth()
        self._loaded = False
        self._what: object = None
        self._floor: int | None = None
        self._jobs_then: int | None = None
        self._trims_to: int | None = None
        self._loads: deque[tuple[int | None, int]] = deque(maxlen=LOADS)
        self._begin(0, None)

    def _begin(self, jobs: int, fresh: int | None) -> None:
        """Forget the levels: it was loaded anew, after so many jobs, or gave something back."""
        self._jobs_before = jobs
        self._fresh = fresh
        self._recent: deque[_Level] = deque(maxlen=ENOUGH)
        self._all: list[_Level] = []
        # Each of these is of `_every` jobs, but the last one, which is of `_in_last` so far.
        self._every = self._in_last = 1

    # -- what is seen ----------------------------------------------------------------------

    def at_rest(self, mib: int, jobs: int, at: float, what: object = None) -> Growth:
        """Loaded, and without a job, it holds so much. `what` is loaded, if it tells: with
        something else loaded, another level is to be expected."""
        if not self._loaded or what != self._what:
            if what != self._what:
                self._loads.clear()
            self._begin(jobs if self._loaded or self._jobs_then is None else self._jobs_then, None)
            self._what, self._loaded = what, True
            self._trims_to = mib
        elif self._fell(mib, jobs - self._jobs_before):
            self._begin(jobs, self._fresh if self._fresh and mib >= self._fresh else None)
        if self._trims_to is not None:
            self._trims_to = min(mib, self._trims_to)
        grown_mib = max(0, mib - (self._fresh or 0))
        if self._note(_Level(jobs - self._jobs_before, mib, at)):
            self._judge(mib, at)
        elif (grown_mib, self._trims_to) != (self.growth.grown_mib, self.growth.trims_to_mib):
            self.growth = replace(self.growth, grown_mib=grown_mib, trims_to_mib=self._trims_to)
        return self.growth

    def trimmed(self, before_mib: int, after_mib: int) -> Growth:
        """It was asked to give back what it holds beyond its models, and did, or did not: then it
        is not taken to give anything by that until it was loaded anew."""
        gave_mib, expected_mib = before_mib - after_mib, before_mib - (self._trims_to or 0)
        self._trims_to = after_mib if gave_mib > GAVE_SHARE * expected_mib else None
        self.growth = replace(self.growth, trims_to_mib=self._trims_to)
        return self.growth

    def unloaded(self, mib: int, jobs: int, at: float) -> Growth:
        """Not loaded, and at rest, it holds so much."""
        self._jobs_then = jobs
        if self._loaded:
            self._loaded, self._floor = False, None
        self._floor = mib if self._floor is None else min(mib, self._floor)
        self._trims_to = None
        self.growth = self.growth.anew
        if mib == 0 and self.growth.over == "loads":  # ended with its process
            self._loads.clear()
            self.growth = replace(self.growth, verdict="unknown", mib_per_load=0, over="", at=at)
        return self.growth

    def _fell(self, mib: int, jobs: int) -> bool:
        """Whether it has given back so much that a new count begins. What a job held is often on
        its way back when it is over."""
        if self._fresh is None or not self._recent or self._recent[-1].jobs == jobs:
            return False
        last = self._recent[-1].mib
        return last - mib > max(tolerance(last), (last - self._fresh) / 2)

    def _note(self, level: _Level) -> bool:
        """True if that is news: most looks at one that has nothing to do are none."""
        if level.jobs <= 1:
            first = self._fresh is None
            self._fresh = level.mib if self._fresh is None else min(level.mib, self._fresh)
            if first:
                self._loads.append((self._floor, level.mib))
            elif self._loads:
                self._loads[-1] = (self._loads[-1][0], self._fresh)
        elif self._fresh is None:
            self._fresh = level.mib
        if self._recent and self._recent[-1].jobs == level.jobs:
            if level.mib >= self._recent[-1].mib:
                return False
            self._recent[-1] = level
            self._all[-1] = _lower(self._all[-1], level)
            return True
        self._recent.append(level)
        if self._in_last < self._every:
            self._in_last += 1
            self._all[-1] = _lower(self._all[-1], level)
            return True
        if len(self._all) == MOST:
            pairs = zip(self._all[::2], self._all[1::2], strict=True)
            self._all = [_lower(first, second) for first, second in pairs]
            self._every *= 2
        self._all.append(level)
        self._in_last = 1
        return True

    def leaked(self) -> list[tuple[float, int]]:
        """What it had leaked since it was loaded, and at rest since when, the latest last."""
        fresh, recent = self._fresh or 0, list(self._recent)
        before = [each for each in self._all if not recent or each.at < recent[0].at]
        return [(each.at, max(0, each.mib - fresh)) for each in (*before, *recent)]

    # -- what follows ----------------------------------------------------------------------

    def _judge(self, mib: int, at: float) -> None:
        before, fresh = self.growth, self._fresh if self._fresh is not None else mib
        grown = max(0, mib - fresh)
        per_load = _rise_over_loads(self._loads)
        per_job = max((_leak(list(self._recent)), _leak(self._all)), key=lambda found: found or 0.0)
        if per_load:
            after = Growth("leaks", "loads", mib_per_load=round(per_load))
        elif per_job:
            after = Growth("leaks", "jobs", mib_per_job=round(per_job, 1))
        elif before.over == "jobs" and not self._levelled(before.mib_per_job):
            after = before
        elif len(self._recent) < SOME:
            # What it did before it was unloaded is the best guess.
            after = Growth() if before.over == "loads" else before
        else:
            last = [level.mib for level in list(self._recent)[-SOME:]]
            rise = (max(last) if before.verdict == "grows" else min(last)) - fresh
            if rise > tolerance(fresh):
                after = Growth("grows", mib_per_job=round(rise / self._recent[-1].jobs, 1))
            else:
                after = Growth("steady")
        same = (after.verdict, after.over) == (before.verdict, before.over)
        self.growth = replace(
            after,
            fresh_mib=fresh,
            grown_mib=grown,
            jobs=0 if not self._recent else self._recent[-1].jobs,
            trims_to_mib=self._trims_to,
            at=before.at if same and before.at is not None else at,
        )

    def _levelled(self, mib_per_job: float) -> bool:
        """Whether what was taken for a leak goes on no more. It needs as many levels to tell as
        a leak does."""
        if len(self._all) < ENOUGH:
            return False
        tail = self._all[-len(self._all) // 4 :]
        return _slope(tail) < LEVELLED * mib_per_job

    # -- over restarts ---------------------------------------------------------------------

    def as_data(self) -> dict[str, Any]:
        """What the state file keeps, as plain data: what was found, not what of."""
        found = self.growth
        return {
            "verdict": found.verdict,
            "over": found.over,
            "mib_per_job": found.mib_per_job,
            "mib_per_load": found.mib_per_load,
            "at": found.at,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> GrowthWatch:
        """What `as_data` gave. Raises ValueError, TypeError or KeyError for what it never gave."""
        watch = cls()
        if data["verdict"] not in ("unknown", "steady", "grows", "leaks"):
            raise ValueError(f"{data['verdict']!r} is no verdict")
        if data["over"] not in ("", "jobs", "loads"):
            raise ValueError(f"{data['over']!r} is nothing that a leak goes on over")
        watch.growth = Growth(
            data["verdict"],
            data["over"],
            mib_per_job=float(data["mib_per_job"]),
            mib_per_load=int(data["mib_per_load"]),
            at=None if data["at"] is None else float(data["at"]),
        )
        return watch


class Growths:
    """Of all consumers, by name. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, GrowthWatch] = {}

    def at_rest(
        self, name: str, mib: int, jobs: int, at: float, what: object = None
    ) -> tuple[Growth, Growth]:
        """See `GrowthWatch.at_rest`. Returns what was so before, and what is so now."""
        with self._lock:
            watch = self._watches.setdefault(name, GrowthWatch())
            return watch.growth, watch.at_rest(mib, jobs, at, what)

    def unloaded(self, name: str, mib: int, jobs: int, at: float) -> tuple[Growth, Growth]:
        """See `GrowthWatch.unloaded`. Returns what was so before, and what is so now."""
        with self._lock:
            watch = self._watches.setdefault(name, GrowthWatch())
            return watch.growth, watch.unloaded(mib, jobs, at)

    def trimmed(self, name: str, before_mib: int, after_mib: int) -> Growth:
        """See `GrowthWatch.trimmed`."""
        with self._lock:
            watch = self._watches.setdefault(name, GrowthWatch())
            return watch.trimmed(before_mib, after_mib)

    def leaked(self, name: str) -> list[tuple[float, int]]:
        """See `GrowthWatch.leaked`."""
        with self._lock:
            return self._watches.setdefault(name, GrowthWatch()).leaked()

    def forget(self, name: str) -> None:
        """Forget all of one consumer."""
        with self._lock:
            self._watches.pop(name, None)

    def as_data(self, name: str) -> dict[str, Any] | None:
        """What the state file keeps of one consumer, if anything was seen of it."""
        with self._lock:
            watch = self._watches.get(name)
            return None if watch is None else watch.as_data()

    def restore(self, name: str, data: Mapping[str, Any]) -> None:
        """Take over what `as_data` gave; raises as `GrowthWatch.from_data`."""
        watch = GrowthWatch.from_data(data)
        with self._lock:
            self._watches[name] = watch


def _lower(before: _Level, after: _Level) -> _Level:
    """Both in one: as of the later, and as low as the lower."""
    return after._replace(mib=min(before.mib, after.mib))


def _leak(levels: Sequence[_Level]) -> float | None:
    """MiB per job, if these levels are those of a leak; else None."""
    if len(levels) < ENOUGH:
        return None
    parts = [
        median(mib for _, mib, _ in levels[i * len(levels) // 8 : (i + 1) * len(levels) // 8])
        for i in range(8)
    ]
    if parts[-1] - parts[0] < tolerance(parts[0]):
        return None
    rises = sum(after > before for before, after in pairwise(parts))
    half = len(levels) // 2
    halves = _slope(levels[:half]), _slope(levels[half:])
    goes_on = min(halves) >= GOES_ON * max(halves)
    return _slope(levels) if rises >= 6 and goes_on and _straight(levels) >= STRAIGHT else None


def _slope(levels: Sequence[_Level]) -> float:
    """MiB per job, by least squares."""
    x, y = fmean(jobs for jobs, _, _ in levels), fmean(mib for _, mib, _ in levels)
    spread = sum((jobs - x) ** 2 for jobs, _, _ in levels)
    if not spread:
        return 0.0
    return sum((jobs - x) * (mib - y) for jobs, mib, _ in levels) / spread


def _straight(levels: Sequence[_Level]) -> float:
    """How much of the variance a straight line explains, from 0 to 1."""
    x, y = fmean(jobs for jobs, _, _ in levels), fmean(mib for _, mib, _ in levels)
    slope = _slope(levels)
    total = sum((mib - y) ** 2 for _, mib, _ in levels)
    left = sum((mib - y - slope * (jobs - x)) ** 2 for jobs, mib, _ in levels)
    return 0.0 if not total else 1 - left / total


def _rise_over_loads(loads: Iterable[tuple[int | None, int]]) -> float | None:
    """MiB per load, if after each of the last ones more was left than before; else None."""
    known = list(loads)
    if len(known) < LOADS:
        return None
    floors = [floor for floor, _ in known if floor is not None]
    levels = floors if len(floors) == LOADS else [fresh for _, fresh in known]
    rises = [after - before for before, after in pairwise(levels)]
    if sum(rises) < tolerance(levels[0]) or min(rises) < max(STEP_MIB, fmean(rises) / 2):
        return None
    return fmean(rises)
