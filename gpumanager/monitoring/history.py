"""Who held how much of the card in the last hour, for the picture of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from gpumanager.clock import Clock
from gpumanager.config import Config
from gpumanager.ledger import balance, held
from gpumanager.registry import Registry

EVERY_S = 5.0
KEPT = 720
"""An hour."""


@dataclass(frozen=True, slots=True)
class MemorySample:
    """The card at one moment, in MiB; `held` by consumer."""

    at: datetime
    total_mib: int
    used_mib: int
    held_mib: Mapping[str, int]


class MemoryHistory:
    """`take` is the body of a periodic worker. Safe from any thread."""

    def __init__(self, config: Config, registry: Registry, clock: Clock) -> None:
        self._config = config
        self._registry = registry
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[MemorySample] = deque(maxlen=KEPT)

    def take(self) -> float:
        """Take a sample of what is known now; returns the seconds until the next."""
        states, reading = self._registry.snapshot(), self._registry.gpu.reading
        holds = {
            name: held(name, states[name], consumer.vram_resident_mib, reading).mib
            for name, consumer in self._config.consumers.items()
        }
        now = balance(reading, self._config.gpu.total_mib, holds.values())
        sample = MemorySample(self._clock.now(), now.total_mib, now.used_mib, holds)
        with self._lock:
            self._samples.append(sample)
        return EVERY_S

    def samples(self) -> tuple[MemorySample, ...]:
        """The latest, oldest first."""
        with self._lock:
            return tuple(self._samples)
