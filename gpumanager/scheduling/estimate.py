"""How long jobs take, learned as they end, and what that means for those in line."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gpumanager.scheduling.policy import Running, Waiting

WEIGHT = 0.2
"""Of the latest job in the running mean."""

FIRST_HOLD_S = 1.0
"""Taken for a hold before any job has ended."""


class HoldTimes:
    """Running means of how long jobs hold the GPU, in seconds: by consumer, and over all for a
    consumer that has not run yet. Not locked; its owner's lock guards it."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        self._overall: float | None = None

    def learn(self, consumer: str, seconds: float) -> None:
        """Take in a job that has ended."""
        self._means[consumer] = _blend(self._means.get(consumer), seconds)
        self._overall = _blend(self._overall, seconds)

    def expected(self, consumer: str) -> float:
        """Seconds the next job of `consumer` is expected to hold the GPU."""
        if consumer in self._means:
            return self._means[consumer]
        return FIRST_HOLD_S if self._overall is None else self._overall


def until_granted(
    waiting: Iterable[Waiting],
    running: Iterable[Running],
    now: float,
    expected: Callable[[str], float],
) -> list[float]:
    """Seconds until each place in the line is expected to be granted, in its order, and at last
    until the line as it stands is done. For one job at a time; an upper bound for several."""
    ahead = sum(max(0.0, expected(r.job.consumer) - (now - r.since)) for r in running)
    estimates = []
    for place in waiting:
        estimates.append(ahead)
        ahead += expected(place.job.consumer)
    return [*estimates, ahead]


def _blend(mean: float | None, seconds: float) -> float:
    return seconds if mean is None else mean + WEIGHT * (seconds - mean)
