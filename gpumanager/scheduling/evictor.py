"""Unloads one consumer, and sees to it that its memory comes back.

Runs on the thread of the job that holds the GPU. All calls to consumers and all waits happen here,
outside any lock, each with a bound.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import Config, Rung, Settled
from gpumanager.errors import BrokerError, ConsumerUnreachable
from gpumanager.learning import Learned
from gpumanager.model import CONTEXT_MIB, MemoryReading, Parked, ProbeReport
from gpumanager.registry import Registry
from gpumanager.scheduling.census import usable
from gpumanager.scheduling.interface import Release, Ticket
from gpumanager.scheduling.release import LEAKED_SHARE, judge
from gpumanager.scheduling.rest import BUSY_LIMIT_S, BUSY_POLL_S, Rest

log = logging.getLogger(__name__)

STABLE_S = 0.5
"""A release that has begun is over once nothing changed for so long: most land in one step, some
in two."""

MOST = 0.5
"""Of what was expected: if so much has come back in the end, it was slow, and no leak."""

FIRST_POLL_S = 0.01
LONGEST_POLL_S = 0.1
"""The card is looked at often at first, for releases that are nearly at once, then less so."""


GAP_S = 60.0
"""A card that could be read so lately is looked for again before its word is done without."""


class Controls(Protocol):
    """The calls that change what a consumer has loaded. They raise BrokerError on failure."""

    def load(self, name: str) -> None:
        """Have the consumer load its model; returns when it says so."""

    def warm(self, name: str) -> None:
        """As `load`, for a consumer that loads with its first job."""

    def unload(self, name: str) -> None:
        """Have the consumer drop its model; returns when it says so, which is not yet proof."""

    def settled(self, name: str) -> bool:
        """Whether it says that the unload is over; True if it does not tell."""

    def busy(self, name: str) -> bool | None:
        """Whether it says that it works on something; None if it does not tell."""

    def probe(self, name: str) -> ProbeReport:
        """Ask it how it is, and what it holds."""


class Parks(Protocol):
    """Stops consumers, and starts them again. Both raise BrokerError on failure."""

    def park(self, name: str, rung: Rung) -> Parked:
        """Stop it by a rung other than `http`."""

    def bring_back(self, name: str, parked: Parked) -> bool:
        """Start it again; True if it can be used at once, False if it has yet to get ready."""


class _Word:
    """A consumer's own word that its unload is over: its `settled` call, made every so often,
    until it is given or its time is over. Without such a call it is taken as given."""

    def __init__(self, call: Settled | None, now: float) -> None:
        self.given = call is None
        self.deadline = -math.inf if call is None else now + call.timeout
        self._every = 0.0 if call is None else call.every
        self._next = now

    def due(self, now: float) -> bool:
        """Whether it is to be asked for now."""
        if now >= self.deadline:
            self.given = True  # it had its time: the card alone decides
        return not self.given and now >= self._next

    def take(self, given: bool, now: float) -> None:
        """Take note of an answer."""
        self.given, self._next = given, now + self._every


class Evictor:
    """`measure` returns a fresh reading of the card, or None where it cannot be measured."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        learned: Learned,
        controls: Controls,
        parks: Parks,
        measure: Callable[[], MemoryReading | None],
        clock: Clock,
    ) -> None:
        self._config = config
        self._registry = registry
        self._learned = learned
        self._controls = controls
        self._parks = parks
        self._measure = measure
        self._clock = clock
        self._rest = Rest(controls, measure, clock)

    def evict(
        self,
        name: str,
        held_mib: int,
        floor_mib: int,
        ticket: Ticket,
        fits: Callable[[], bool] | None = None,
        elsewhere: Callable[[], bool] | None = None,
    ) -> Release | None:
        """Unload the consumer, climbing its `evict` rungs until one gives its memory back; None
        if not one of them could be carried out.

        `held_mib` is what it is taken to hold, `floor_mib` what it may keep. `fits` says whether
        the room is enough now: until it is, a release that looks complete is given a little
        longer, in case more comes; None does without that. `elsewhere` says whether somebody else
        could go instead: then one that works on a job of somebody else is left alone; without,
        the end of that job is waited for. One that gave nothing back, by any
        rung, though it held something, is put into quarantine. Raises the error the ticket was
        cancelled with.
        """
        release: Release | None = None
        tried = []
        consumer = self._config.consumers[name]
        if elsewhere is not None and self._rest.is_busy(name, consumer) and elsewhere():
            return self._left_alone(name, ticket)
        rungs = list(usable(consumer, self._registry.get(name)) or consumer.rungs)
        asked_again = False
        while rungs:
            rung = rungs.pop(0)
            began = self._clock.monotonic()
            try:
                self._rest.wait(name, consumer, rung, ticket)
                before = self._measure() or self._last_seen()
                holds = self._what_it_holds(name, before)
                self._carry_out(name, rung)
            except BrokerError as error:
                if self._gone(name, error):
                    return Release("gone")
                log.warning(
                    "eviction failed",
                    extra={
                        "consumer": name,
                        "target": ticket.job.consumer,
                        "rung": rung.name,
                        "reason": error.message,
                    },
                )
                continue
            if rung.name not in tried:
                tried.append(rung.name)
            expected = max(0, (held_mib if holds is None else holds) - floor_mib)
            word = _Word(consumer.settled if rung.http else None, self._clock.monotonic())
            certain = holds is not None
            release = self._await(
                name,
                before,
                expected,
                certain,
                word,
                ticket,
                fits,
                elsewhere if rung.http else None,
                may_ask_again=bool(rung.http) and not asked_again,
            )
            release = replace(release, seconds=self._clock.monotonic() - began, certain=certain)
            if rung.http and not asked_again and self._loaded_again(name, release):
                log.info("loaded again meanwhile", extra={"consumer": name})
                asked_again = True
                rungs.insert(0, rung)
                continue
            self._take_note(name, rung, release, ticket.job.consumer)
            if release.outcome == "busy":
                return release
            if release.outcome != "leaked":
                self._registry.release(name)
                return release
        if release is not None and release.certain:
            held = release.residue_mib
            kept = "" if held is None else f", and holds {held} MiB"
            reason = f"gave back {release.mib} of {release.expected_mib} MiB"
            reason += f" after {', '.join(tried)}{kept}"
            most = round(MOST * release.expected_mib)
            ends_mib = max(CONTEXT_MIB, (held or 0) + release.mib - most)
            seconds = self._registry.quarantine(name, reason, ends_mib)
            log.warning(
                "quarantined",
                extra={"consumer": name, "reason": reason, "seconds": round(seconds)},
            )
        return release

    def _loaded_again(self, name: str, release: Release) -> bool:
        """Whether it gave nothing back because a job of somebody else, who uses it beside the
        broker, came right after the unload: then it says that it is loaded."""
        return release.outcome == "leaked" and self._registry.get(name).loaded

    def _last_seen(self) -> MemoryReading | None:
        """The card as it was before it went out of view, if that was just now and may pass."""
        gpu = self._registry.gpu
        seen_at = -math.inf if gpu.sampled_at is None else gpu.sampled_at
        return gpu.last if self._clock.monotonic() - seen_at <= GAP_S else None

    def _left_alone(self, name: str, ticket: Ticket) -> Release:
        log.info("left alone at work", extra={"consumer": name, "target": ticket.job.consumer})
        return Release("busy")

    def _what_it_holds(self, name: str, before: MemoryReading | None) -> int | None:
        """MiB by the card's figures for its processes, else by its own word of this moment; None
        if neither tells, so that there is only what was declared."""
        if before is None:
            return None
        own = before.measured_mib(name)
        if own is not None:
            return own
        try:
            return self._controls.probe(name).resident_mib
        except BrokerError:
            return None

    def _carry_out(self, name: str, rung: Rung) -> None:
        with self._registry.busy(name):
            if rung.http:
                self._controls.unload(name)
                self._registry.set_loaded(name, False)
            else:
                self._registry.park(name, self._parks.park(name, rung))

    def _gone(self, name: str, error: BrokerError) -> bool:
        """Its process has ended, and took the memory along."""
        if isinstance(error, ConsumerUnreachable) and error.nothing_listens:
            self._registry.set_loaded(name, False)
            return True
        return False

    def _await(
        self,
        name: str,
        before: MemoryReading | None,
        expected_mib: int,
        certain: bool,
        word: _Word,
        ticket: Ticket,
        fits: Callable[[], bool] | None,
        elsewhere: Callable[[], bool] | None,
        *,
        may_ask_again: bool,
    ) -> Release:
        """Poll until the memory is back, or will not come: as long as `gpu.release_timeout` and
        the consumer's own `settled` allow, whichever is longer. Where what it held was measured
        (`certain`), a release in several steps is waited for as long as the room is not enough.
        One that works on a job of somebody else first is given until that is over. One that says
        by then that it is loaded is not waited for any longer, if it may be asked again.
        """
        consumer = self._config.consumers[name]
        now = self._clock.monotonic()
        stable_since, began = now, now
        limit = max(self._config.gpu.release_timeout, word.deadline - now)
        deadline, busy_deadline = now + limit, now + BUSY_LIMIT_S
        delay, last_mib = FIRST_POLL_S, 0
        while True:
            if word.due(now):
                word.take(self._controls.settled(name), self._clock.monotonic())
            settled = word.given
            reading = None if before is None else self._measure()
            now = self._clock.monotonic()
            if before is None or reading is None:
                # The card is out of view: what the consumer says is all there is. If it was in view
                # just now, it may be again soon.
                if (settled and before is None) or now >= deadline:
                    if now >= busy_deadline or not self._rest.is_busy(name, consumer):
                        return Release("unverified", expected_mib=expected_mib)
                    delay = BUSY_POLL_S
            else:
                release = judge(name, before, reading, expected_mib)
                if release.mib != last_mib:
                    last_mib, stable_since = release.mib, now
                stable = now - stable_since >= STABLE_S
                begun = release.mib > LEAKED_SHARE * expected_mib or expected_mib == 0
                more = replace(release, more_until=deadline)
                # By the figures for its own processes its word is not needed to go on.
                said = settled or release.residue_mib is not None
                if said and release.complete and (fits is None or fits()):
                    return more
                if settled and release.complete and stable:
                    return release
                if said and begun and stable and fits is not None and fits():
                    return more
                if settled and begun and stable and (not certain or fits is None):
                    return more
                if fits is not None and not begun and now - began >= STABLE_S and fits():
                    # Somebody else made room meanwhile: whatever this one does, the job can run.
                    return replace(more, outcome="partial")
                if (
                    may_ask_again
                    and now - began >= STABLE_S
                    and self._loaded_again(name, release)
                    and not self._rest.is_busy(name, consumer)
                ):
                    return release
                if now >= deadline:
                    if release.complete or not self._rest.is_busy(name, consumer):
                        return release
                    if now >= busy_deadline or (elsewhere is not None and elsewhere()):
                        return replace(more, outcome="busy")
                    deadline = now + limit
            ticket.pause(delay)
            delay = max(delay, min(LONGEST_POLL_S, 2 * delay))

    def _take_note(self, name: str, rung: Rung, release: Release, target: str) -> None:
        gave = release.mib > LEAKED_SHARE * release.expected_mib
        kept = release.residue_mib if rung.http and gave else None
        self._learned.unloaded(name, release.seconds, kept, release.more_until)
        log.log(
            logging.WARNING if release.outcome in ("leaked", "stolen") else logging.INFO,
            "evicted",
            extra={
                "consumer": name,
                "target": target,
                "rung": rung.name,
                "outcome": release.outcome,
                "mib": release.mib,
                "expected_mib": release.expected_mib,
                "ms": round(release.seconds * 1000),
                **({"thief": release.thief} if release.thief else {}),
            },
        )
