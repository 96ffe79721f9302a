"""How much of the card's memory one consumer needs: what is declared, corrected by what its jobs
were seen to hold, and by what it took when it ran out of memory. Plain data; no locks."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from gpumanager.model import Declared

REMEMBERED = 50
"""Jobs whose peaks are kept: enough for a quantile, few enough to follow a change of models."""

SHARE = 0.9
"""Of the jobs have to fit into what is taken for needed. A larger one costs a second run, and then
counts by itself for a while; with the maximum, one large job would cost evictions 50 jobs long."""

ENOUGH = 3
"""Measured jobs after which a declaration that is higher counts no more."""

PATIENCE = 20
"""So many jobs have to go well until a figure that was raised by an out-of-memory is forgotten;
twice as many each time that this turns out to have been too soon."""

LONGEST_PATIENCE = 640
RAISED_FOR_S = 7 * 24 * 3600.0
"""A raised figure counts no longer than this, however few jobs there are."""

USUAL_CONTEXT = 4096
"""Tokens that a model is taken to be loaded for, where its server does not say."""

CONTEXT_SHARE = 0.25
"""Of what a model holds, is taken to grow with the context length, where only one length was seen.
At 4,096 tokens it is 10 to 20 % with the models of 2026: rather too much room than too little."""

MOST_CONTEXTS = 8
"""Context lengths that are remembered: the longest ones."""

KEPT_S = 30 * 24 * 3600.0
"""Peaks that are older are not taken over at a restart."""

Source = Literal["declared", "measured", "reported", "out-of-memory", "listed"]
Seen = Literal["measured", "reported"]


@dataclass(frozen=True, slots=True)
class Figure:
    """MiB, where they come from, and when that was found: seconds since the epoch, None for what
    is declared."""

    mib: int
    source: Source
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Raised:
    """What is needed after an out-of-memory. `good` jobs went well since then; after `patience`
    of them it is forgotten."""

    mib: int
    at: float
    good: int = 0
    patience: int = PATIENCE


@dataclass(frozen=True, slots=True)
class Needs:
    """What the memory that a consumer needs, or a model of it, follows from: what its jobs were
    seen to hold, by the card's figures and by its own; of how many jobs the former is; what an
    out-of-memory has raised it to; and what was seen by the context length, in tokens, that it was
    loaded for. Of one moment, and never changed."""

    measured: Figure | None = None
    reported: Figure | None = None
    measured_jobs: int = 0
    raised: Raised | None = None
    contexts: tuple[tuple[int, int], ...] = ()

    @property
    def known(self) -> bool:
        """Whether enough of its jobs were measured for a declaration to count no more."""
        return self.measured_jobs >= ENOUGH

    @property
    def nothing(self) -> bool:
        """Whether nothing was seen of it yet."""
        return self.measured is None and self.reported is None and self.raised is None

    def of(self, declared: Declared, context: int | None = None) -> Figure:
        """What it needs to be resident and work; with a `context` of so many tokens."""
        found = None if declared.elastic else self._seen(declared.mib)
        found = found or Figure(declared.mib, "declared")
        if context is not None and not declared.elastic:
            found = self._for_context(found, context)
        if self.raised is not None and self.raised.mib > found.mib:
            found = Figure(self.raised.mib, "out-of-memory", self.raised.at)
        if declared.max_mib is not None and found.mib > declared.max_mib:
            return Figure(declared.max_mib, "declared")
        return found

    def _for_context(self, usual: Figure, context: int) -> Figure:
        """Of lengths that were seen, the next longer one counts. Beyond the longest it grows by the
        tokens, as fast as it did between the two longest, or as is usual where one was seen."""
        seen = self.contexts or ((USUAL_CONTEXT, usual.mib),)
        fits = [mib for tokens, mib in seen if tokens >= context]
        if fits:
            mib = min(fits) if self.contexts else usual.mib
        else:
            (tokens, most), *shorter = reversed(seen)
            by_token = CONTEXT_SHARE * most / tokens
            if shorter:
                fewer, less = shorter[0]
                by_token = max(0.0, (most - less) / (tokens - fewer))
            mib = round(most + by_token * (context - tokens))
        if self.contexts or mib > usual.mib:
            return replace(usual, mib=mib)
        return usual

    def _seen(self, declared_mib: int) -> Figure | None:
        """What counts in the place of a declaration, if anything does."""
        if self.measured is not None:
            counts = self.known or self.measured.mib > declared_mib
            return self.measured if counts else None
        # Its own figure leaves out what the driver adds: a declaration that is higher stands.
        if self.reported is not None and self.reported.mib > declared_mib:
            return self.reported
        return None


class Footprint:
    """Of one consumer. Every time is in seconds since the epoch."""

    def __init__(self) -> None:
        self._peaks: dict[Seen, deque[tuple[int, float]]] = {
            "measured": deque(maxlen=REMEMBERED),
            "reported": deque(maxlen=REMEMBERED),
        }
        self._current: dict[Seen, tuple[int, float]] = {}
        self._since_load = 0
        self._leaks = False
        # Of which sources the last job has a peak; None if what is seen now is not of that job.
        self._last: set[Seen] | None = None
        self._raised: Raised | None = None
        self._patience = PATIENCE
        self._contexts: dict[int, int] = {}

    # -- what is seen ----------------------------------------------------------------------

    def saw(self, mib: int, source: Seen, at: float, *, working: bool = True) -> bool:
        """It holds so much, loaded: during a job, or, not `working`, at rest, which is of the job
        that has ended last. True if that is news."""
        if not working and self._last is not None:
            return self._amend(mib, source, at, self._last)
        known = self._current.get(source)
        if known is not None and known[0] >= mib:
            return False
        self._current[source] = (mib, at)
        return True

    def job_done(self, at: float, context: int | None = None) -> bool:
        """A job has ended well; what was seen to be held meanwhile was enough for it, and for the
        `context`, in tokens, that its model was loaded for. True if that is news: anything was
        seen, or a raised figure is waiting for it."""
        news = bool(self._current) or self._raised is not None
        if context is not None:
            self._saw_context(context)
        for source, peak in self._current.items():
            self._add(source, peak)
        self._last = set(self._current)
        self._current.clear()
        if self._raised is not None:
            self._raised = replace(self._raised, good=self._raised.good + 1)
            self._forget_raised(at)
        return news

    def discard(self) -> None:
        """What was seen since the last job says nothing of the next: it failed, or the consumer
        was unloaded."""
        self._current.clear()
        self._last = None

    def unloaded(self) -> None:
        self.discard()
        self._leaks = False
        self._since_load = 0

    def spilled(self) -> None:
        """Part of it is on the CPU, so what it holds since it was loaded is not what it needs."""
        self.discard()
        for _ in range(min(self._since_load, len(self._peaks["measured"]))):
            self._peaks["measured"].pop()
        self._since_load = 0

    def without(self, leaked: Sequence[tuple[float, int]]) -> None:
        """Its consumer turned out to leak: of what its jobs were seen to hold, what had leaked
        before each of them was not what that needed. `leaked` says since when how much had. Taken
        off once since its load: of what is seen after that, it is taken off before."""
        if self._leaks:
            return
        self._leaks = True
        known = [at for at, _ in leaked]

        def less(peak: tuple[int, float]) -> tuple[int, float]:
            mib, at = peak
            seen = bisect_left(known, at)
            return (max(0, mib - leaked[seen - 1][1]), at) if seen else peak

        peaks = self._peaks["measured"]
        for position, peak in enumerate(peaks):
            peaks[position] = less(peak)
        if "measured" in self._current:
            self._current["measured"] = less(self._current["measured"])

    def raise_to(self, mib: int, at: float) -> None:
        """It ran out of memory, and needs so much at least."""
        self._forget_raised(at)
        if self._raised is None:
            self._raised = Raised(mib, at, patience=self._patience)
            self._patience = min(LONGEST_PATIENCE, 2 * self._patience)
        else:
            self._raised = replace(self._raised, mib=max(mib, self._raised.mib), at=at, good=0)

    def _amend(self, mib: int, source: Seen, at: float, seen: set[Seen]) -> bool:
        peaks = self._peaks[source]
        if source not in seen:
            seen.add(source)
            self._add(source, (mib, at))
        elif mib > peaks[-1][0]:
            peaks[-1] = (mib, at)
        else:
            return False
        return True

    def _saw_context(self, context: int) -> None:
        peak = self._current.get("measured") or self._current.get("reported")
        if peak is None:
            return
        # One job that held more than the others is forgotten little by little.
        known = self._contexts.get(context, 0)
        self._contexts[context] = max(peak[0], known + (peak[0] - known) // 10)
        if len(self._contexts) > MOST_CONTEXTS:
            del self._contexts[min(self._contexts)]

    def _add(self, source: Seen, peak: tuple[int, float]) -> None:
        self._peaks[source].append(peak)
        if source == "measured":
            self._since_load += 1

    # -- what follows ----------------------------------------------------------------------

    def needed(self, declared: Declared, now: float) -> Figure:
        """What it needs to be resident and work."""
        return self.needs(now).of(declared)

    def needs(self, now: float) -> Needs:
        """What that follows from."""
        self._forget_raised(now)
        measured = self._figure("measured")
        # Nobody asks for what it reports where that was measured.
        reported = self._figure("reported") if measured is None else None
        return Needs(
            measured,
            reported,
            len(self._peaks["measured"]),
            self._raised,
            tuple(sorted(self._contexts.items())),
        )

    def _figure(self, source: Seen) -> Figure | None:
        peaks, current = self._peaks[source], self._current.get(source)
        if not peaks and current is None:
            return None
        mib, at = (0, 0.0) if not peaks else (_quantile(mib for mib, _ in peaks), peaks[-1][1])
        if current is not None and (current[0] > mib or not peaks):
            mib, at = current
        return Figure(mib, source, at)

    @property
    def peak(self) -> Figure | None:
        """The most that its recent jobs were seen to hold."""
        for source in self._peaks:
            seen = [*self._peaks[source], *filter(None, [self._current.get(source)])]
            if seen:
                mib, at = max(seen)
                return Figure(mib, source, at)
        return None

    @property
    def measured_jobs(self) -> int:
        """How many of its recent jobs were measured."""
        return len(self._peaks["measured"])

    def raised(self, now: float) -> Raised | None:
        """What an out-of-memory has raised it to, as long as that counts."""
        self._forget_raised(now)
        return self._raised

    def _forget_raised(self, now: float) -> None:
        raised = self._raised
        if raised is not None and (
            raised.good >= raised.patience or now - raised.at >= RAISED_FOR_S
        ):
            self._raised = None

    # -- over restarts ---------------------------------------------------------------------

    def as_data(self) -> dict[str, Any]:
        """What the state file keeps of it, as plain data."""
        raised = self._raised
        return {
            **{
                source: [*map(list, peaks), *map(list, self._seen_now(source))]
                for source, peaks in self._peaks.items()
            },
            "raised": None
            if raised is None
            else {
                "mib": raised.mib,
                "at": raised.at,
                "good": raised.good,
                "patience": raised.patience,
            },
            "patience": self._patience,
            "contexts": [list(each) for each in self._contexts.items()],
        }

    def _seen_now(self, source: Seen) -> list[tuple[int, float]]:
        current = self._current.get(source)
        return [] if current is None else [current]

    @classmethod
    def from_data(cls, data: Mapping[str, Any], now: float) -> Footprint:
        """What `as_data` gave. Raises ValueError, TypeError, KeyError or AttributeError for what
        it never gave."""
        footprint = cls()
        for source, peaks in footprint._peaks.items():
            kept = [(count(mib), seconds(at)) for mib, at in data[source]]
            peaks.extend((mib, at) for mib, at in kept if now - at < KEPT_S)
        raised = data["raised"]
        if raised is not None:
            footprint._raised = Raised(
                count(raised["mib"]),
                seconds(raised["at"]),
                count(raised["good"]),
                count(raised["patience"]),
            )
        footprint._patience = min(LONGEST_PATIENCE, max(PATIENCE, count(data["patience"])))
        known = {count(tokens): count(mib) for tokens, mib in data.get("contexts", ())}  # newer
        footprint._contexts = dict(sorted(known.items())[-MOST_CONTEXTS:])
        return footprint


def _quantile(values: Iterable[int]) -> int:
    """By the nearest rank."""
    ordered = sorted(values)
    return ordered[math.ceil(SHARE * len(ordered)) - 1]


def count(value: Any) -> int:
    """A number that is one of things; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def seconds(value: Any) -> float:
    """A number that is one of seconds; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e10:
        raise ValueError(f"{value!r} is no time")
    return float(value)
