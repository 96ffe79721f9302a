"""What has been done so far to make room for one job, as the next decision has to know it."""

from __future__ import annotations

from collections import Counter

from gpumanager.residency.rest import BUSY_LIMIT_S
from gpumanager.scheduling.decision import SoFar
from gpumanager.scheduling.interface import Release

MOST_RETURNS = 3
"""How often one is unloaded again for the same job, since somebody else had it load meanwhile."""


class Progress:
    """For one job; `patience_s` is how long it waits for memory that is on its way back. Times are
    monotonic seconds."""

    def __init__(self, patience_s: float) -> None:
        self.leaking: list[str] = []
        """Those that were unloaded for it, and gave nothing back."""
        self.waited_for: frozenset[str] = frozenset()
        """Those whose job for somebody else is waited for to its end."""
        self._tried: set[str] = set()
        self._left_alone: set[str] = set()
        self._trimmed: set[str] = set()
        self._unloaded = Counter[str]()
        self._more_until = 0.0
        self._patience_s = patience_s
        self._patient_until: float | None = None

    def so_far(self, now: float) -> SoFar:
        """As of `now`."""
        until = now + self._patience_s if self._patient_until is None else self._patient_until
        return SoFar(
            frozenset(self._tried),
            frozenset(self._left_alone),
            frozenset(self._trimmed),
            patient=now < until,
            more_to_come=now < self._more_until,
        )

    def waits(self, now: float) -> None:
        """It waits for memory that is on its way back: from the first time on, its patience runs
        out."""
        if self._patient_until is None:
            self._patient_until = now + self._patience_s

    def wait_for(self, consumers: frozenset[str]) -> None:
        """Those that were left alone at work are to go after all."""
        self._tried -= consumers
        self._left_alone -= consumers
        self.waited_for |= consumers

    def tries(self, name: str) -> None:
        """That one is about to be unloaded."""
        self._tried.add(name)

    def trims(self, name: str) -> None:
        """That one is about to give back what it can while it stays loaded."""
        self._trimmed.add(name)

    def unloaded(self, name: str, release: Release) -> None:
        """What became of it."""
        patient = name in self.waited_for
        if not patient and release.outcome == "busy" and release.seconds < BUSY_LIMIT_S:
            self._left_alone.add(name)
        if release.complete and self._unloaded[name] < MOST_RETURNS:
            self._unloaded[name] += 1  # somebody else may have it load again
            self._tried.discard(name)
        self._more_until = max(self._more_until, release.more_until)
        if release.outcome == "leaked" and release.certain:
            self.leaking.append(name)

    @property
    def tried(self) -> frozenset[str]:
        """Those that are not asked again."""
        return frozenset(self._tried)
