"""Has one consumer give back what it holds beyond its models, while it stays loaded, and sees by
the card what that gave.

Runs on the thread of the job that holds the GPU, outside any lock; every wait has a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError
from gpumanager.model import MemoryReading
from gpumanager.residency.release import LEAKED_SHARE, judge
from gpumanager.residency.rest import Rest
from gpumanager.residency.settling import FIRST_POLL_S, LONGEST_POLL_S, STABLE_S
from gpumanager.scheduling.interface import Release, Ticket
from gpumanager.telemetry.events import Emit, TrimFailed, Trimmed

TRIM_S = 2.0
"""How long the memory may take to come back: servers answer such a call when it is done."""


class Trims(Protocol):
    """What is asked of a consumer. Raises BrokerError on failure."""

    def trim(self, name: str, consumer: ConsumerConfig) -> None:
        """Have it give back what it can while it stays loaded."""


class Trimmer:
    """`measure` returns a fresh reading of the card, or None where it cannot be measured."""

    def __init__(
        self,
        registry: Registry,
        learned: Learned,
        asks: Trims,
        rest: Rest,
        measure: Callable[[], MemoryReading | None],
        clock: Clock,
        emit: Emit,
    ) -> None:
        self._registry = registry
        self._learned = learned
        self._asks = asks
        self._rest = rest
        self._measure = measure
        self._clock = clock
        self._emit = emit

    def trim(
        self, name: str, consumer: ConsumerConfig, expected_mib: int, ticket: Ticket
    ) -> Release | None:
        """Returns what became of it; None if it could not be asked. One that works on a job of
        somebody else is left alone. One that gives nothing has done no wrong: it is just not taken
        to give anything from now on, until it is loaded anew. Raises the error that the ticket was
        cancelled with."""
        if self._rest.is_busy(name, consumer):
            return Release("busy")
        began, before = self._clock.monotonic(), self._measure()
        try:
            with self._registry.busy(name):
                self._asks.trim(name, consumer)
        except BrokerError as error:
            self._emit(TrimFailed(consumer=name, target=ticket.job.consumer, reason=error.message))
            return None
        release = Release("unverified", expected_mib=expected_mib)
        if before is not None:
            release = self._settled(name, before, expected_mib, ticket)
        release = replace(release, seconds=self._clock.monotonic() - began)
        self._take_note(name, release)
        self._emit(
            Trimmed(
                consumer=name,
                target=ticket.job.consumer,
                outcome=release.outcome,
                mib=release.mib,
                expected_mib=expected_mib,
                ms=round(release.seconds * 1000),
            )
        )
        return release

    def _settled(
        self, name: str, before: MemoryReading, expected_mib: int, ticket: Ticket
    ) -> Release:
        """Look until all that was expected is back, or nothing more comes."""
        now = self._clock.monotonic()
        deadline, changed_at = now + TRIM_S, now
        release, delay = Release("unverified", expected_mib=expected_mib), FIRST_POLL_S
        while True:
            reading = self._measure()
            now = self._clock.monotonic()
            if reading is not None:
                seen = judge(name, before, reading, expected_mib)
                changed_at = now if seen.mib != release.mib else changed_at
                release = seen
            begun = release.mib > LEAKED_SHARE * expected_mib
            if release.complete or now >= deadline or (begun and now - changed_at >= STABLE_S):
                return release
            ticket.pause(delay)
            delay = min(LONGEST_POLL_S, 2 * delay)

    def _take_note(self, name: str, release: Release) -> None:
        if release.outcome == "unverified":
            return
        after_mib = release.residue_mib
        if after_mib is None:  # the card tells no figures per process
            after_mib = max(0, (self._registry.get(name).resident_mib or 0) - release.mib)
        growth = self._learned.growths.trimmed(name, after_mib + release.mib, after_mib)
        self._registry.note_growth(name, growth)
