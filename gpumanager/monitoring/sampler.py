"""Samples the card's memory into the registry."""

from __future__ import annotations

import logging
from dataclasses import replace

from gpumanager.clock import Clock
from gpumanager.model import GpuState
from gpumanager.monitoring.memory import GpuMemory, GpuUnavailable
from gpumanager.registry import Registry

log = logging.getLogger(__name__)


class Sampler:
    """`sample` is the body of a periodic worker; `interval` in seconds."""

    def __init__(
        self, memory: GpuMemory, registry: Registry, clock: Clock, *, interval: float
    ) -> None:
        self._memory = memory
        self._registry = registry
        self._clock = clock
        self._interval = interval

    def sample(self) -> float:
        """Take one sample; returns the seconds until the next."""
        before = self._registry.gpu
        try:
            reading = self._memory.read()
        except GpuUnavailable as error:
            # The last good reading is dropped: nobody may take it for the present.
            after = replace(before, reading=None, err=str(error))
        else:
            after = GpuState(reading, self._clock.monotonic(), reading.fault or "")
        self._registry.set_gpu(after)
        if after.err != before.err:
            if after.err:
                log.warning("gpu unavailable", extra={"reason": after.err})
            else:
                log.info("gpu available")
        return self._interval
