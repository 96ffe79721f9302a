"""Who held how much of the card in the last hour, and what its sensors said, for the picture of
it: every second of the last five minutes, every fifth before."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from gpumanager.clock import Clock
from gpumanager.consumers.registry import Registry
from gpumanager.gpu.inventory import believable, holders, left

EVERY_S = 1.0
FINE_KEPT = 300
COARSE = 5
COARSE_KEPT = 660
"""Every fifth sample is kept when it is older than five minutes: with those an hour."""


@dataclass(frozen=True, slots=True)
class MemorySample:
    """The card at one moment, in MiB; `held` by consumer. Its load is in percent, its power in W,
    its temperature in degrees Celsius: None where the card does not tell."""

    at: datetime
    total_mib: int
    used_mib: int
    held_mib: Mapping[str, int]
    utilization_percent: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None


class MemoryHistory:
    """`take` is the body of a periodic worker. Safe from any thread."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self._lock = threading.Lock()
        self._taken = 0
        self._fine: deque[tuple[int, MemorySample]] = deque()
        self._coarse: deque[MemorySample] = deque(maxlen=COARSE_KEPT)

    def take(self) -> float:
        """Take a sample of what is known now; returns the seconds until the next."""
        snapshot = believable(self._registry.now)
        gpu, reading = snapshot.gpu, snapshot.gpu.reading
        if gpu.sampled_at is None and not gpu.err:
            return EVERY_S  # nobody has looked at the card yet: what is assumed is no history
        holds = holders(snapshot)
        now = left(snapshot, holds)
        held = {name: each.mib for name, each in holds.items()}
        sample = MemorySample(self._clock.now(), now.total_mib, now.used_mib, held)
        if reading is not None:
            sample = replace(
                sample,
                utilization_percent=reading.utilization_percent,
                power_w=reading.power_w,
                temperature_c=reading.temperature_c,
            )
        with self._lock:
            self._fine.append((self._taken, sample))
            self._taken += 1
            if len(self._fine) > FINE_KEPT:
                number, oldest = self._fine.popleft()
                if number % COARSE == 0:
                    self._coarse.append(oldest)
        return EVERY_S

    def samples(self, seconds: float | None = None) -> tuple[MemorySample, ...]:
        """Those of the last `seconds`, or all; oldest first."""
        with self._lock:
            every = (*self._coarse, *(sample for _, sample in self._fine))
        if seconds is None:
            return every
        since = self._clock.now() - timedelta(seconds=seconds)
        return tuple(sample for sample in every if sample.at >= since)
