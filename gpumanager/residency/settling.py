"""After an unload: waiting until the consumer's memory is back, or will not come.

Runs on the thread of the job that holds the GPU, outside any lock; every wait has a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig, Settled
from gpumanager.consumers.registry import Registry
from gpumanager.model import MemoryReading
from gpumanager.residency.release import LEAKED_SHARE, judge, noise_mib
from gpumanager.residency.rest import BUSY_LIMIT_S, BUSY_POLL_S, Rest
from gpumanager.scheduling.interface import Release, Ticket

STABLE_S = 0.5
"""A release that has begun is over once nothing changed for so long: most land in one step, some
in two."""

FIRST_POLL_S = 0.01
LONGEST_POLL_S = 0.1
"""The card is looked at often at first, for releases that are nearly at once, then less so."""


class Asks(Protocol):
    """What is asked of a consumer."""

    def settled(self, name: str, consumer: ConsumerConfig, model: str | None = None) -> bool:
        """Whether it says that the unload is over; True if it does not tell."""


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A consumer that was just unloaded, by these `settings`. `before` is the card before that,
    None if it was out of view; `expected_mib` what should come back, and `certain` whether that
    was measured rather than declared; `call` the one that says when the unload is over. `again`:
    it may be asked to unload once more, if somebody else has it load meanwhile. `model` is the one
    that was unloaded alone, None if all of it was."""

    name: str
    settings: ConsumerConfig
    before: MemoryReading | None
    expected_mib: int
    certain: bool
    call: Settled | None
    again: bool
    model: str | None = None


class Settling:
    """`measure` returns a fresh reading of the card, or None where it cannot be measured."""

    def __init__(
        self,
        registry: Registry,
        asks: Asks,
        rest: Rest,
        measure: Callable[[], MemoryReading | None],
        clock: Clock,
    ) -> None:
        self._registry = registry
        self._asks = asks
        self._rest = rest
        self._measure = measure
        self._clock = clock

    def wait(
        self,
        unloaded: Unloaded,
        ticket: Ticket,
        fits: Callable[[], bool] | None,
        elsewhere: Callable[[], bool] | None,
    ) -> Release:
        """Wait as long as `gpu.release_timeout` and the consumer's own `settled` allow, whichever
        is longer; longer where it works on a job of somebody else first, until that is over, or
        `elsewhere` says that another one could go instead.

        `fits` says whether the room is enough now: until it is, a release in several steps is
        waited for to its end, if what it held was measured. One that worked on a job of somebody
        else after the unload, or says that it is loaded, is not waited for, if it may be asked
        again (`ask_again`): that job has loaded it. Raises the error the ticket was cancelled with.
        """
        now = self._clock.monotonic()
        watch = _Watch(unloaded, _Word(unloaded.call, now), now, self._limit(unloaded.call))
        delay = FIRST_POLL_S
        while True:
            if watch.word.due(now):
                given = self._asks.settled(unloaded.name, unloaded.settings, unloaded.model)
                watch.word.take(given, self._clock.monotonic())
            reading = None if unloaded.before is None else self._measure()
            now = self._clock.monotonic()
            if unloaded.before is None or reading is None:
                release = self._out_of_view(watch, now)
                delay = BUSY_POLL_S if watch.said(now) else delay
            else:
                seen = watch.look(unloaded.before, reading, now)
                release = self._judged(watch, seen, now, fits, elsewhere)
            if release is not None:
                return release
            ticket.pause(delay)
            delay = max(delay, min(LONGEST_POLL_S, 2 * delay))

    def _limit(self, call: Settled | None) -> float:
        own = 0.0 if call is None else call.timeout
        return max(self._registry.now.config.gpu.release_timeout, own)

    def _works(self, unloaded: Unloaded) -> bool:
        return self._rest.is_busy(unloaded.name, unloaded.settings)

    def _out_of_view(self, watch: _Watch, now: float) -> Release | None:
        """What the consumer says is all there is. If the card was in view just now, it may be
        again soon."""
        if not watch.said(now):
            return None
        if now < watch.busy_deadline and self._works(watch.unloaded):
            return None
        return Release("unverified", expected_mib=watch.unloaded.expected_mib)

    def _judged(
        self,
        watch: _Watch,
        release: Release,
        now: float,
        fits: Callable[[], bool] | None,
        elsewhere: Callable[[], bool] | None,
    ) -> Release | None:
        """What became of the release, None while that is open."""
        name, more = watch.unloaded.name, replace(release, more_until=watch.deadline)
        begun, stable = watch.begun(release), watch.stable(now)
        settled = watch.word.given
        # By the figures for its own processes its word is not needed to go on.
        said = settled or release.residue_mib is not None
        if said and release.complete and (fits is None or fits()):
            return more
        if settled and release.complete and stable:
            return release
        if said and begun and stable and fits is not None and fits():
            return more
        if settled and begun and stable and (not watch.unloaded.certain or fits is None):
            return more
        waited = now - watch.began >= STABLE_S
        if fits is not None and not begun and waited and fits():
            # Somebody else made room meanwhile: whatever this one does, the job can run.
            return replace(more, outcome="partial")
        if watch.unloaded.again and not begun and now >= watch.look_at:
            watch.look_at = now + BUSY_POLL_S
            if self._works(watch.unloaded):
                watch.worked = True
            elif watch.worked or self._registry.get(name).has_loaded(watch.unloaded.model):
                return replace(release, ask_again=True)
        if not watch.overdue(now):
            return None
        if release.complete or not self._works(watch.unloaded):
            return release
        if now >= watch.busy_deadline or (elsewhere is not None and elsewhere()):
            return replace(more, outcome="busy")
        watch.extend(now)
        return None


class _Watch:
    """How a release goes on. All times are monotonic seconds."""

    def __init__(self, unloaded: Unloaded, word: _Word, now: float, limit: float) -> None:
        self.unloaded = unloaded
        self.word = word
        self.began = now
        self.deadline = now + limit
        self.busy_deadline = now + BUSY_LIMIT_S
        self.look_at = now + STABLE_S
        self.worked = False
        self._limit = limit
        self._last_mib = 0
        self._changed_at = now

    def look(self, before: MemoryReading, after: MemoryReading, now: float) -> Release:
        """Judge it by two readings, and note whether anything changed."""
        release = judge(self.unloaded.name, before, after, self.unloaded.expected_mib)
        if abs(release.mib - self._last_mib) > noise_mib(self.unloaded.name, before):
            self._last_mib, self._changed_at = release.mib, now
        return release

    def begun(self, release: Release) -> bool:
        expected = self.unloaded.expected_mib
        return release.mib > LEAKED_SHARE * expected or expected == 0

    def stable(self, now: float) -> bool:
        return now - self._changed_at >= STABLE_S

    def said(self, now: float) -> bool:
        """Whether there is no more to hear of it, where the card is out of view."""
        return self.overdue(now) or (self.word.given and self.unloaded.before is None)

    def overdue(self, now: float) -> bool:
        return now >= self.deadline

    def extend(self, now: float) -> None:
        self.deadline = now + self._limit


class _Word:
    """A consumer's own word that its unload is over: its `settled` call, made every so often,
    until it is given or its time is over. Without such a call it is taken as given."""

    def __init__(self, call: Settled | None, now: float) -> None:
        self.given = call is None
        self._deadline = -math.inf if call is None else now + call.timeout
        self._every = 0.0 if call is None else call.every
        self._next = now

    def due(self, now: float) -> bool:
        """Whether it is to be asked for now."""
        if now >= self._deadline:
            self.given = True  # it had its time: the card alone decides
        return not self.given and now >= self._next

    def take(self, given: bool, now: float) -> None:
        """Take note of an answer."""
        self.given, self._next = given, now + self._every
