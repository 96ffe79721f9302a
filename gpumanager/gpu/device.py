"""The card's memory: NVML, or a simulated card. The only file that imports pynvml.

`nvmlInit` needs a driver, which may be absent at start, or go and come back (a driver update, a
card that fell off the bus), so a failure is remembered and the next attempt put off.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

from gpumanager.clock import Clock
from gpumanager.gpu.unified import Board, HostMemory, shared
from gpumanager.host.processes import sees_all
from gpumanager.model import GpuProcess, Holdings, MemoryReading

MIB = 1024 * 1024
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
SIMULATED = "simulated:"
RETRY_S = 10.0
"""How often NVML is looked for where the host's memory is known without it."""

MOST_PID = 2**22
"""PID_MAX_LIMIT of Linux: no process has a higher number. Some boards' NVML lists some that do."""

_NO_FIGURES = "the driver gives no figures per process"

SENSED_EVERY_S = 1.0
"""Power and temperature take the driver longer than the memory, which is read every 100 ms while
a release is watched, so they are asked for less often."""


class GpuUnavailable(Exception):
    """The card cannot be read now; the text says why."""


class Card(Protocol):
    """A card whose memory can be read. `read` raises GpuUnavailable; it is called from one
    thread at a time."""

    def read(self) -> MemoryReading:
        """Read the card now: totals, and who holds what. Raises GpuUnavailable."""

    def close(self) -> None:
        """Forget every handle, so that the next `read` starts anew."""


class NvmlCard:
    """A card read through NVML. `device` is NVML's index or a UUID. Where the chip has no memory of
    its own, the host's is the card's; a Jetson without NVML is read without it.

    `load_module` imports pynvml, lazily since most of a process's life may not need it.
    """

    def __init__(
        self,
        device: int | str,
        load_module: Callable[[], ModuleType] = lambda: import_module("pynvml"),
        monotonic: Callable[[], float] = time.monotonic,
        board: Board | None = None,
        sees_all: Callable[[], bool] = sees_all,
    ) -> None:
        self._device = device
        self._monotonic = monotonic
        self._board = Board() if board is None else board
        self._sees_all = sees_all
        self._without: tuple[float, MemoryReading] | None = None
        self._sensed: tuple[float, _Sensors] | None = None
        self._load_module = load_module
        self._nvml: Any = None
        self._handle: Any = None

    def read(self) -> MemoryReading:
        if self._without is not None and self._monotonic() < self._without[0]:
            return self._by_the_host(self._without[1])
        try:
            if self._handle is None:
                self._open()
            faults: list[str] = []
            name = self._name(faults)
            total, free, host = self._memory(name)
        except Exception as error:  # noqa: BLE001  # NVMLLibraryMismatchError is no NVMLError
            return self._without_nvml(error)
        self._without = None
        rates = self._optional(faults, "utilization", self._nvml.nvmlDeviceGetUtilizationRates)
        sensors = self._sensors()
        faults += sensors.faults
        processes, untold = self._processes(faults)
        reading = MemoryReading(
            total_mib=total // MIB,
            used_mib=(total - free) // MIB,
            free_mib=free // MIB,
            name=name,
            utilization_percent=None if rates is None else rates.gpu,
            fault="; ".join(faults) or None,
            processes=processes,
            untold=untold,
            power_w=sensors.power_w,
            power_limit_w=sensors.power_limit_w,
            temperature_c=sensors.temperature_c,
        )
        return reading if host is None else self._shared(reading, host)

    def _name(self, faults: list[str]) -> str | None:
        name = self._optional(faults, "name", self._nvml.nvmlDeviceGetName)
        return name.decode() if isinstance(name, bytes) else name

    def _memory(self, name: str | None) -> tuple[int, int, HostMemory | None]:
        """Bytes in all, and free; and the host's, where that is the card's."""
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError_NotSupported:
            host = self._board.memory()
            return host.total, host.free, host
        with contextlib.suppress(OSError, KeyError):  # no Linux
            if (own := shared(name, memory.total, self._board)) is not None:
                return own.total, own.free, own
        return memory.total, memory.free, None

    def _without_nvml(self, error: Exception) -> MemoryReading:
        """What the host tells of a Jetson of which NVML tells nothing. Raises GpuUnavailable."""
        board = self._board.jetson() if self._device == 0 else None
        if board is None:
            raise GpuUnavailable(f"NVML: {error}") from error
        self.close()
        empty = MemoryReading(0, 0, 0, name=board, untold=f"{_NO_FIGURES} (NVML: {error})")
        self._without = self._monotonic() + RETRY_S, empty
        return self._by_the_host(empty)

    def _by_the_host(self, reading: MemoryReading) -> MemoryReading:
        try:
            host = self._board.memory()
        except (OSError, KeyError) as error:
            raise GpuUnavailable(f"the host's memory: {error}") from error
        measured = replace(
            reading,
            total_mib=host.total // MIB,
            used_mib=(host.total - host.free) // MIB,
            free_mib=host.free // MIB,
        )
        return self._shared(measured, host)

    def _shared(self, reading: MemoryReading, host: HostMemory) -> MemoryReading:
        """With who holds what of the host's memory, and how much of it is held for the GPU."""
        processes, untold = reading.processes, reading.untold
        if processes is None and (told := self._board.processes()) is not None:
            processes, untold = told, ""
        on_gpu = None if host.on_gpu is None else host.on_gpu // MIB
        if on_gpu is None and processes is not None and self._sees_all():
            on_gpu = sum(each.mib for each in processes)
        load = reading.utilization_percent
        return replace(
            reading,
            memory="host",
            on_gpu_mib=on_gpu,
            processes=processes,
            untold=untold,
            utilization_percent=self._board.load() if load is None else load,
        )

    def _sensors(self) -> _Sensors:
        """What the slower sensors say, or said within the last `SENSED_EVERY_S`."""
        now = self._monotonic()
        if self._sensed is not None and now - self._sensed[0] < SENSED_EVERY_S:
            return self._sensed[1]
        nvml = self._nvml
        faults: list[str] = []
        power = self._optional(faults, "power", nvml.nvmlDeviceGetPowerUsage)
        limit = self._optional(faults, "power limit", nvml.nvmlDeviceGetEnforcedPowerLimit)
        temperature = self._optional(
            faults,
            "temperature",
            lambda it: nvml.nvmlDeviceGetTemperature(it, nvml.NVML_TEMPERATURE_GPU),
        )
        sensors = _Sensors(
            power_w=None if power is None else power / 1000,  # NVML says mW
            power_limit_w=None if limit is None else limit / 1000,
            temperature_c=temperature,
            faults=tuple(faults),
        )
        self._sensed = (now, sensors)
        return sensors

    def _processes(self, faults: list[str]) -> tuple[tuple[GpuProcess, ...] | None, str]:
        """Every process with its MiB; None where the platform does not tell all, and why."""
        nvml = self._nvml
        compute = self._optional(faults, "processes", nvml.nvmlDeviceGetComputeRunningProcesses)
        if compute is None:
            return None, _NO_FIGURES
        graphics = self._optional(faults, "processes", nvml.nvmlDeviceGetGraphicsRunningProcesses)
        figures: dict[int, int] = {}
        for row in [*compute, *(graphics or ())]:
            if row.usedGpuMemory is None:
                return None, _NO_FIGURES
            if not 0 < row.pid <= MOST_PID:
                return None, f"the driver lists a process {row.pid}, which no process can be"
            # One that is in both lists is told of twice, a moment apart: the larger figure counts.
            figures[row.pid] = max(figures.get(row.pid, 0), row.usedGpuMemory)
        return tuple(GpuProcess(pid, used // MIB) for pid, used in sorted(figures.items())), ""

    def close(self) -> None:
        nvml, self._nvml, self._handle, self._sensed = self._nvml, None, None, None
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):  # a driver that is gone cannot be told
                nvml.nvmlShutdown()

    def _open(self) -> None:
        nvml: Any = self._load_module()
        nvml.nvmlInit()
        self._nvml = nvml
        if isinstance(self._device, int):
            self._handle = nvml.nvmlDeviceGetHandleByIndex(self._device)
        else:
            self._handle = nvml.nvmlDeviceGetHandleByUUID(self._device)

    def _optional(self, faults: list[str], what: str, call: Callable[[Any], Any]) -> Any:
        """One failing field must not hide the others."""
        try:
            return call(self._handle)
        except self._nvml.NVMLError_NotSupported:
            return None
        except Exception as error:  # noqa: BLE001  # a name that is no text is no NVMLError
            faults.append(f"{what}: {error}")
            return None


@dataclass(frozen=True, slots=True)
class _Sensors:
    """None where the card does not tell."""

    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None
    faults: tuple[str, ...]


class SimulatedMemory:
    """The simulated card of demo and tests, behind the same interface."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self) -> MemoryReading:
        from gpumanager.gpu.simulated import CardLost, SimulatedCard

        try:
            memory, held = SimulatedCard(self._path).view()
        except CardLost as error:
            raise GpuUnavailable(f"simulated card: {error}") from error
        return MemoryReading(
            memory.total_mib,
            memory.used_mib,
            memory.free_mib,
            name="simulated card",
            local_pids=True,
            processes=None
            if held is None
            else tuple(GpuProcess(pid, mib) for pid, mib in sorted(held.items())),
        )

    def close(self) -> None:
        pass


class Attributes(Protocol):
    """Says who holds what. Called from one thread at a time; never raises."""

    def attribute(self, reading: MemoryReading) -> Holdings:
        """The holdings behind a reading."""


class GpuMemory:
    """Reads the card for everybody: safe from any thread, with back-off while it is away.
    Without `attributor` its readings do not say who holds what."""

    def __init__(self, card: Card, clock: Clock, attributor: Attributes | None = None) -> None:
        self._card = card
        self._clock = clock
        self._attributor = attributor
        self._lock = threading.Lock()
        self._backoff_s = 0.0
        self._retry_at = 0.0
        self._reason = ""

    def read(self) -> MemoryReading:
        """A fresh reading. Raises GpuUnavailable, at once while an attempt is put off."""
        with self._lock:
            if self._backoff_s and self._clock.monotonic() < self._retry_at:
                raise GpuUnavailable(self._reason)
            try:
                reading = self._card.read()
            except GpuUnavailable as error:
                self._card.close()
                self._backoff_s = min(
                    LONGEST_BACKOFF_S, self._backoff_s * 2 if self._backoff_s else FIRST_BACKOFF_S
                )
                self._retry_at = self._clock.monotonic() + self._backoff_s
                self._reason = str(error)
                raise
            self._backoff_s = 0.0
            if self._attributor is None:
                return reading
            return replace(reading, holdings=self._attributor.attribute(reading))

    def measure(self) -> MemoryReading | None:
        """A fresh reading, or None where the card cannot be measured."""
        try:
            return self.read()
        except GpuUnavailable:
            return None

    def close(self) -> None:
        with self._lock:
            self._card.close()


def open_card(device: int | str) -> Card:
    """The card that `gpu.device` names. Touches no driver yet."""
    if isinstance(device, str) and device.startswith(SIMULATED):
        return SimulatedMemory(device.removeprefix(SIMULATED))
    return NvmlCard(device)
