"""A simulated chip that shares the host's memory with other programs, which never stand still."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

from gpumanager.gpu.device import SimulatedMemory
from gpumanager.model import MemoryReading

OTHERS_MIB = 1800
SWING_MIB = 300


class SharedCard(SimulatedMemory):
    """`tells`: what is known beside the host's memory: figures per process (GB10), what is held for
    the GPU in all (Jetson), or nothing. `grab`: once so much less is held for the GPU as it says,
    other programs take as much at once."""

    def __init__(self, path: str, tells: str) -> None:
        super().__init__(path)
        self._tells = tells
        self._chance = random.Random(7)
        self._lock = threading.Lock()
        self._most = 0
        self._taken = 0
        self.grab = 0

    def read(self) -> MemoryReading:
        reading = super().read()
        with self._lock:
            on_gpu = reading.used_mib
            self._most = max(self._most, on_gpu)
            if self.grab and self._most - on_gpu >= self.grab:
                self._taken, self.grab = self._most - on_gpu, 0
            used = on_gpu + OTHERS_MIB + self._taken + self._chance.randint(-SWING_MIB, SWING_MIB)
        return replace(
            reading,
            used_mib=used,
            free_mib=max(0, reading.total_mib - used),
            memory="host",
            on_gpu_mib=None if self._tells == "nothing" else on_gpu,
            processes=reading.processes if self._tells == "processes" else None,
            untold="" if self._tells == "processes" else "the driver gives no figures per process",
        )
