"""The card through NVML, with a stand-in for the library; and the back-off around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpumanager.gpu.device import (
    MIB,
    GpuMemory,
    GpuUnavailable,
    NvmlCard,
    SimulatedMemory,
    open_card,
)
from gpumanager.model import GpuProcess, MemoryReading
from tests.support.clock import FakeClock


class NVMLError(Exception):
    pass


class NotSupported(NVMLError):
    pass


def _process(pid: int, mib: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=None if mib is None else mib * MIB)


class FakeNvml:
    """As much of pynvml as is used. `failing` maps a function's name to what it raises."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NotSupported

    def __init__(self) -> None:
        self.failing: dict[str, Exception] = {}
        self.calls: list[str] = []
        self.compute: list[tuple[int, int | None]] = []
        self.graphics: list[tuple[int, int | None]] = []
        self.memory_mib = (24576, 20000)
        self.called = "NVIDIA {}"

    def _answer(self, name: str, value: Any) -> Any:
        self.calls.append(name)
        if name in self.failing:
            raise self.failing[name]
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("init", None)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._answer("shutdown", None)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return str(self._answer("handle", f"card {index}"))

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return str(self._answer("handle", f"card {uuid}"))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        # `used` leaves out what the driver reserves; `free` is what can be had.
        total, free = self.memory_mib
        info = SimpleNamespace(total=total * MIB, free=free * MIB, used=4000 * MIB)
        return self._answer("memory", info)

    def nvmlDeviceGetName(self, handle: str) -> Any:  # noqa: N802
        return self._answer("name", self.called.format(handle))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:  # noqa: N802
        return self._answer("compute", [_process(*each) for each in self.compute])

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> Any:  # noqa: N802
        return self._answer("graphics", [_process(*each) for each in self.graphics])

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return self._answer("utilization", SimpleNamespace(gpu=37))

    NVML_TEMPERATURE_GPU = 0

    def nvmlDeviceGetPowerUsage(self, handle: str) -> Any:  # noqa: N802
        return self._answer("power", 182_400)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> Any:  # noqa: N802
        return self._answer("power limit", 350_000)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> Any:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._answer("temperature", 61)


def card(nvml: FakeNvml, device: int | str = 0) -> NvmlCard:
    return NvmlCard(device, load_module=lambda: nvml)  # type: ignore[arg-type, return-value]


def test_a_reading_in_mib() -> None:
    assert card(FakeNvml()).read() == MemoryReading(
        24576,
        4576,
        20000,
        name="NVIDIA card 0",
        utilization_percent=37,
        processes=(),
        power_w=182.4,
        power_limit_w=350.0,
        temperature_c=61,
    )


@pytest.mark.parametrize("failing", ["power", "power limit", "temperature"])
def test_a_sensor_that_fails_hides_no_other_and_is_named(failing: str) -> None:
    nvml = FakeNvml()
    nvml.failing[failing] = NVMLError("Unknown Error")
    reading = card(nvml).read()
    figures = {
        "power": reading.power_w,
        "power limit": reading.power_limit_w,
        "temperature": reading.temperature_c,
    }
    assert figures.pop(failing) is None
    assert None not in figures.values()
    assert (reading.used_mib, reading.utilization_percent) == (4576, 37)
    assert reading.fault == f"{failing}: Unknown Error"


def test_a_sensor_that_the_card_does_not_have_is_no_fault() -> None:
    nvml = FakeNvml()
    nvml.failing = dict.fromkeys(("power", "power limit", "temperature"), NotSupported("no"))
    reading = card(nvml).read()
    assert (reading.power_w, reading.temperature_c, reading.fault) == (None, None, None)


def test_slow_sensors_are_asked_once_a_second_however_often_the_memory_is() -> None:
    nvml, clock = FakeNvml(), FakeClock()
    it = NvmlCard(0, load_module=lambda: nvml, monotonic=clock.monotonic)  # type: ignore[arg-type, return-value]
    for _ in range(10):
        assert it.read().power_w == 182.4
        clock.advance(0.1)
    assert nvml.calls.count("memory") == 10
    assert nvml.calls.count("power") == 1
    clock.advance(0.1)
    it.read()
    assert nvml.calls.count("power") == 2


def test_of_a_process_in_both_lists_the_larger_figure_counts() -> None:
    nvml = FakeNvml()
    nvml.compute = [(7, 1000), (8, 5000), (9, 300)]
    nvml.graphics = [(8, 5002), (9, 40), (10, 60)]  # 8 grew between the two calls
    assert card(nvml).read().processes == (
        GpuProcess(7, 1000),
        GpuProcess(8, 5002),
        GpuProcess(9, 300),
        GpuProcess(10, 60),
    )


def test_a_platform_that_keeps_one_figure_back_gives_none() -> None:
    nvml = FakeNvml()
    nvml.compute = [(7, 1000), (8, None)]
    assert card(nvml).read().processes is None


@pytest.mark.parametrize(
    ("error", "fault"), [(NotSupported("no"), None), (NVMLError("odd"), "processes: odd")]
)
def test_without_a_list_of_processes_the_totals_remain(error: Exception, fault: str | None) -> None:
    nvml = FakeNvml()
    nvml.failing = {"compute": error}
    reading = card(nvml).read()
    assert (reading.processes, reading.free_mib, reading.fault) == (None, 20000, fault)


def test_a_card_is_chosen_by_uuid() -> None:
    assert card(FakeNvml(), "GPU-1234").read().name == "NVIDIA card GPU-1234"


def test_nvml_is_initialised_once() -> None:
    nvml = FakeNvml()
    one = card(nvml)
    one.read()
    one.read()
    assert nvml.calls.count("init") == nvml.calls.count("handle") == 1


def test_a_failing_field_does_not_hide_the_memory() -> None:
    nvml = FakeNvml()
    nvml.failing = {"name": NVMLError("Unknown Error"), "utilization": NotSupported("no")}
    reading = card(nvml).read()
    assert (reading.free_mib, reading.name, reading.utilization_percent) == (20000, None, None)
    assert reading.fault == "name: Unknown Error"


@pytest.mark.parametrize("where", ["init", "handle", "memory"])
def test_no_driver_a_wrong_index_and_a_lost_card_are_told(where: str) -> None:
    nvml = FakeNvml()
    nvml.failing = {where: NVMLError("GPU is lost")}
    with pytest.raises(GpuUnavailable, match="GPU is lost"):
        card(nvml).read()


def test_a_library_that_is_not_there_is_told() -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'pynvml'")

    with pytest.raises(GpuUnavailable, match="pynvml"):
        NvmlCard(0, load_module=missing).read()


def test_the_real_library_reads_or_says_why_not() -> None:
    one = open_card(0)
    try:
        assert one.read().total_mib > 0
    except GpuUnavailable as error:
        assert str(error).startswith("NVML: ")  # noqa: PT017
    one.close()


def test_a_lost_card_recovers_by_itself_with_a_growing_pause() -> None:
    nvml, clock = FakeNvml(), FakeClock()
    memory = GpuMemory(card(nvml), clock)
    assert memory.read().free_mib == 20000

    nvml.failing = {"memory": NVMLError("GPU is lost")}
    pauses: list[float] = []
    for _ in range(8):
        with pytest.raises(GpuUnavailable):
            memory.read()
        attempts = nvml.calls.count("memory")
        began = clock.monotonic()
        while nvml.calls.count("memory") == attempts:
            clock.advance(0.5)
            assert memory.measure() is None
        pauses.append(clock.monotonic() - began)
    assert pauses == sorted(pauses)
    assert pauses[0] >= 1
    assert pauses[-1] == 60

    nvml.failing = {}
    assert memory.measure() is None  # still put off
    clock.advance(60)
    assert memory.read().free_mib == 20000
    assert nvml.calls.count("init") > 1


def test_a_shutdown_that_fails_is_no_matter() -> None:
    nvml = FakeNvml()
    one = card(nvml)
    one.read()
    nvml.failing = {"shutdown": NVMLError("Uninitialized")}
    one.close()
    one.close()
    assert nvml.calls.count("shutdown") == 1


def test_a_simulated_card_that_is_missing_is_unavailable(tmp_path: Any) -> None:
    one = open_card(f"simulated:{tmp_path}/none")
    assert isinstance(one, SimulatedMemory)
    with pytest.raises(GpuUnavailable, match="simulated card"):
        one.read()
    one.close()
