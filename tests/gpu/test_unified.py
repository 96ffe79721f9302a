"""A chip that shares the host's memory: GB10 and the Jetson boards, by NVML and by Linux."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpumanager.gpu.accounting import Balance, balance
from gpumanager.gpu.device import MIB, RETRY_S, GpuUnavailable, NvmlCard
from gpumanager.gpu.unified import Board, HostMemory
from gpumanager.model import GpuProcess, Holdings, MemoryReading
from tests.gpu.test_attribution import FakeProcesses, attributor
from tests.gpu.test_device import FakeNvml, NotSupported, NVMLError
from tests.support.clock import FakeClock
from tests.support.in_namespaces import run_inside

GIB = 1024
TREES = {
    "nano": (b"NVIDIA Jetson Orin Nano Developer Kit\0", b"nvidia,p3768\0nvidia,tegra234\0"),
    "pi": (b"Raspberry Pi 5 Model B\0", b"raspberrypi,5-model-b\0brcm,bcm2712\0"),
}
CLIENTS = """CLIENT                        PROCESS      PID        SIZE
user                     nvargus-daemon      812       1024K
user                     llama server:0     4242    3145728K
user                             python     4300     524288K
user                             python     4300     524288K
total                                              4195328K
"""


class Machine:
    """What a board's kernel tells, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.swap_mib = 0

    def memory(self, total: int, available: int, on_gpu: int | None = None) -> None:
        rows = {"MemTotal": total, "MemFree": available // 3, "MemAvailable": available}
        rows |= {"SwapTotal": self.swap_mib, "SwapFree": self.swap_mib}
        rows |= {} if on_gpu is None else {"NvMapMemUsed": on_gpu}
        lines = [f"{name + ':':<16}{mib * 1024:>12} kB\n" for name, mib in rows.items()]
        self.write("proc/meminfo", "".join([*lines, "HugePages_Total:       0\n"]).encode())

    def device_tree(self, board: str) -> None:
        model, compatible = TREES[board]
        self.write("proc/device-tree/model", model)
        self.write("proc/device-tree/compatible", compatible)

    def write(self, file: str, content: bytes) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    it = Machine(tmp_path)
    it.memory(120 * GIB, 90 * GIB)
    return it


def card(
    machine: Machine,
    nvml: FakeNvml | None = None,
    device: int | str = 0,
    clock: FakeClock | None = None,
    sees_all: Callable[[], bool] = lambda: True,
) -> NvmlCard:
    """Without `nvml` there is no such library."""

    def load() -> Any:
        if nvml is None:
            raise NVMLError("NVML Shared Library Not Found")
        return nvml

    monotonic = (clock or FakeClock()).monotonic
    return NvmlCard(device, load, monotonic, Board(machine.root), sees_all)


def gb10() -> FakeNvml:
    nvml = FakeNvml()
    nvml.called = "NVIDIA GB10"
    nvml.failing = {"memory": NotSupported("Not Supported")}
    nvml.compute = [(7, 1000), (8, 500)]
    return nvml


def figures(reading: MemoryReading) -> tuple[int, int, int]:
    return reading.total_mib, reading.used_mib, reading.free_mib


def test_gb10_has_the_hosts_memory_and_figures_per_process(machine: Machine) -> None:
    reading = card(machine, gb10()).read()
    assert figures(reading) == (120 * GIB, 30 * GIB, 90 * GIB)
    assert (reading.memory, reading.on_gpu_mib) == ("host", 1500)
    assert reading.processes == (GpuProcess(7, 1000), GpuProcess(8, 500))
    assert reading.name == "NVIDIA GB10"


@pytest.mark.parametrize(
    ("called", "says", "memory"),
    [
        ("NVIDIA GB10", (120 * GIB, 40 * GIB), "host"),  # some drivers: what is free without caches
        ("Orin (nvgpu)", (0, 0), "host"),
        ("NVIDIA RTX PRO 6000", (118 * GIB, 40 * GIB), "own"),  # as large as the host's, by chance
        ("NVIDIA Thor", (24 * GIB, 20 * GIB), "own"),
    ],
)
def test_a_driver_that_says_something_else_of_such_a_chip(
    machine: Machine, called: str, says: tuple[int, int], memory: str
) -> None:
    nvml = FakeNvml()
    nvml.called, nvml.memory_mib = called, says
    reading = card(machine, nvml).read()
    expected = (120 * GIB, 90 * GIB) if memory == "host" else says
    assert (reading.memory, (reading.total_mib, reading.free_mib)) == (memory, expected)


def test_a_card_of_its_own_memory_says_so(machine: Machine) -> None:
    reading = card(machine, FakeNvml()).read()
    assert (reading.memory, reading.on_gpu_mib) == ("own", None)


def test_swap_is_not_free_memory(machine: Machine) -> None:
    machine.swap_mib = 64 * GIB
    machine.memory(16 * GIB, 3 * GIB)
    assert card(machine, gb10()).read().free_mib == 3 * GIB


def test_a_jetson_without_nvml(machine: Machine) -> None:
    machine.device_tree("nano")
    machine.memory(7620, 5000, on_gpu=1800)
    clock = FakeClock()
    one = card(machine, clock=clock)
    reading = one.read()
    assert figures(reading) == (7620, 2620, 5000)
    assert (reading.memory, reading.on_gpu_mib) == ("host", 1800)
    assert reading.name == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (reading.processes, reading.fault) == (None, None)
    told, _ = attributor(FakeProcesses())
    assert told.attribute(reading).reason == (
        "the driver gives no figures per process (NVML: NVML Shared Library Not Found); "
        "on a Jetson before Thor only root may read the kernel's"
    )
    machine.memory(7620, 4000, on_gpu=2800)
    assert (one.read().free_mib, one.read().on_gpu_mib) == (4000, 2800)


def test_a_driver_that_comes_back_to_a_jetson_is_found_and_not_looked_for_all_the_time(
    machine: Machine,
) -> None:
    machine.device_tree("nano")
    nvml, clock = gb10(), FakeClock()
    nvml.failing["init"] = NVMLError("Driver Not Loaded")
    one = card(machine, nvml, clock=clock)
    for _ in range(5):
        assert one.read().processes is None
    assert nvml.calls.count("init") == 1
    del nvml.failing["init"]
    clock.advance(RETRY_S)
    assert one.read().processes == (GpuProcess(7, 1000), GpuProcess(8, 500))
    nvml.failing["init"] = nvml.failing["memory"] = NVMLError("GPU is lost")
    assert one.read().memory == "host"  # the host's memory is there still
    assert "GPU is lost" in one.read().untold


@pytest.mark.parametrize("board", ["platform/bus@0/17000000.gpu", "gpu.0"])
def test_a_jetson_tells_how_busy_it_is_by_its_kernel(machine: Machine, board: str) -> None:
    machine.device_tree("nano")
    assert card(machine).read().utilization_percent is None
    machine.write(f"sys/devices/{board}/load", b"476\n")
    assert card(machine).read().utilization_percent == 48
    assert card(machine, gb10()).read().utilization_percent == 37  # NVML's own, where it has one


def test_an_ordinary_card_costs_no_look_at_the_host(machine: Machine) -> None:
    class Unread(Board):
        def memory(self) -> HostMemory:
            raise AssertionError("a look")

    nvml: Any = FakeNvml()
    assert NvmlCard(0, lambda: nvml, board=Unread(machine.root)).read().total_mib == 24576


@pytest.mark.parametrize("content", [b"Tegra\n", b"Tegra"])
def test_a_jetson_whose_device_tree_a_container_hides(machine: Machine, content: bytes) -> None:
    machine.write("sys/devices/soc0/family", content)
    machine.write("sys/devices/soc0/machine", b"NVIDIA Jetson AGX Orin\n")
    assert card(machine).read().name == "NVIDIA Jetson AGX Orin"


@pytest.mark.parametrize("device", [1, "GPU-1234"])
def test_another_card_of_a_jetson_is_not_the_hosts_memory(
    machine: Machine, device: int | str
) -> None:
    machine.device_tree("nano")
    with pytest.raises(GpuUnavailable, match="Shared Library Not Found"):
        card(machine, device=device).read()


def test_another_board_without_nvml_has_no_card(machine: Machine) -> None:
    machine.device_tree("pi")
    with pytest.raises(GpuUnavailable):
        card(machine).read()


def test_a_jetson_whose_kernel_does_not_tell(machine: Machine) -> None:
    machine.device_tree("nano")
    machine.write("proc/meminfo", b"MemTotal:  100 kB\n")
    with pytest.raises(GpuUnavailable, match="MemAvailable"):
        card(machine).read()


def test_root_reads_the_processes_of_a_jetson_from_the_kernel(machine: Machine) -> None:
    machine.device_tree("nano")
    machine.memory(7620, 3000, on_gpu=4098)
    machine.write("sys/kernel/debug/nvmap/iovmm/clients", CLIENTS.encode())
    reading = card(machine).read()
    assert reading.processes == (GpuProcess(812, 1), GpuProcess(4242, 3072), GpuProcess(4300, 1024))
    assert (reading.on_gpu_mib, reading.untold) == (4098, "")


@pytest.mark.parametrize("pid", [0, -1, 2**32 - 5])
def test_a_list_of_processes_that_cannot_be_is_none(machine: Machine, pid: int) -> None:
    nvml = gb10()
    nvml.compute = [(pid, 1000)]
    reading = card(machine, nvml).read()
    assert (reading.processes, reading.on_gpu_mib) == (None, None)
    assert f"a process {pid}" in reading.untold


BOARD = """
import json, os, subprocess
subprocess.run(["mount", "-t", "tmpfs", "none", "/sys/devices"], check=True)
os.mkdir("/sys/devices/soc0")
with open("/sys/devices/soc0/family", "w") as family:
    family.write("Tegra\\n")
from gpumanager.gpu.device import open_card
from pynvml import NVMLError, nvmlInit
try:
    nvmlInit()
except NVMLError as error:
    reading = open_card(0).read()
    print(json.dumps([str(error), reading.memory, reading.total_mib, reading.name, reading.untold]))
else:
    print(json.dumps([]))
"""


def test_the_real_library_and_kernel_of_a_board_without_nvml() -> None:
    told = run_inside(BOARD, options=("-Urm",))
    if not told:
        pytest.skip("there is a real NVML here")
    error, memory, total_mib, name, untold = told
    assert (memory, name) == ("host", "NVIDIA Jetson")
    assert total_mib == psutil.virtual_memory().total // MIB
    assert error in untold


# -- whose it is -----------------------------------------------------------------------------------


def shared(*processes: GpuProcess) -> MemoryReading:
    return MemoryReading(120_000, 30_000, 90_000, processes=processes, memory="host")


def test_an_idle_chip_is_no_riddle_however_much_the_host_uses() -> None:
    one, _ = attributor(FakeProcesses())
    assert one.attribute(shared()) == Holdings({"mvoice": 0, "ollama": 0})


def test_no_process_at_all_in_a_container_proves_nothing() -> None:
    table = FakeProcesses()
    table.all_seen = False
    one, _ = attributor(table)
    assert "no process shows" in one.attribute(shared()).reason


def test_what_a_container_sees_is_not_all_that_is_on_the_gpu(machine: Machine) -> None:
    assert card(machine, gb10(), sees_all=lambda: False).read().on_gpu_mib is None


@pytest.mark.parametrize(
    ("total_mib", "on_gpu", "expected"),
    [
        (0, 5000, Balance("measured", 120_000, 30_000, 90_000)),
        (40_000, 5000, Balance("measured", 40_000, 5000, 35_000)),
        (40_000, None, Balance("measured", 40_000, 30_000, 10_000)),  # who knows whose it is
        (110_000, 5000, Balance("measured", 110_000, 5000, 90_000)),  # no more than the host has
    ],
)
def test_a_configured_total_is_the_gpus_share_of_the_host(
    total_mib: int, on_gpu: int | None, expected: Balance
) -> None:
    reading = MemoryReading(120_000, 30_000, 90_000, memory="host", on_gpu_mib=on_gpu)
    assert balance(reading, total_mib, ()) == expected
