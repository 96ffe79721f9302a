"""A chip that has no memory of its own and shares the host's: what the host tells of it, where
NVML does not. GB10 (DGX Spark), and the Jetson boards, some of which have no NVML at all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gpumanager.model import GpuProcess

KIB = 1024
MIB = 1024 * 1024

_ALMOST = 0.9
"""Of the host's memory: a chip that names so much of it as its own shares it."""

_CHIPS = re.compile(r"\b(GB10|Thor|Orin|Xavier|Tegra|nvgpu)\b", re.IGNORECASE)
"""What NVML calls the chips that share the host's memory."""

_CLIENT = re.compile(r"\S+\s+.*\s(?P<pid>\d+)\s+(?P<size>\d+)(?P<unit>[KMG]?)")
"""A line of the kernel's table: whose, program, pid, size. The last line, the total, has no pid."""

_LOADS = (
    "sys/devices/platform/bus@0/17000000.gpu/load",
    "sys/devices/platform/17000000.gpu/load",
    "sys/devices/platform/gpu.0/load",
    "sys/devices/gpu.0/load",
)
"""Where the boards before Thor say it, by the version of their system."""

_UNITS = {"": 1, "K": KIB, "M": MIB, "G": 1024 * MIB}


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The host's memory in bytes: in all, and what it can still give. Swap does not count: what is
    on the GPU cannot be swapped, and who has others swapped out slows them down. `on_gpu` is what
    all processes hold of it for the GPU, None where the kernel does not tell."""

    total: int
    free: int
    on_gpu: int | None = None


class Board:
    """The machine, below `root` (another folder than / for tests)."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def jetson(self) -> str | None:
        """The name of the board, if it is a Jetson (or another one with a Tegra chip)."""
        tree = self._root / "proc/device-tree"
        # A container may not see the device tree; the chip's family it sees.
        if (
            b"nvidia,tegra" not in _content(tree / "compatible")
            and _content(self._root / "sys/devices/soc0/family").strip() != b"Tegra"
        ):
            return None
        named = _content(tree / "model") or _content(self._root / "sys/devices/soc0/machine")
        return named.strip(b"\0\n ").decode(errors="replace") or "NVIDIA Jetson"

    def memory(self) -> HostMemory:
        """Raises OSError or KeyError where the kernel does not tell."""
        lines = (self._root / "proc/meminfo").read_text().splitlines()
        rows = [line.replace(":", " ").split() for line in lines]
        found = {row[0]: int(row[1]) * KIB for row in rows if len(row) > 1}
        # NvMapMemUsed: Jetson boards before Thor.
        return HostMemory(found["MemTotal"], found["MemAvailable"], found.get("NvMapMemUsed"))

    def load(self) -> int | None:
        """How busy the GPU of a Jetson is, in percent; None where the kernel does not tell."""
        for file in _LOADS:
            if (permille := _content(self._root / file).strip()).isdigit():
                return round(int(permille) / 10)
        return None

    def processes(self) -> tuple[GpuProcess, ...] | None:
        """Who holds memory for the GPU of a Jetson before Thor, as the kernel tells root; None
        where it does not tell."""
        try:
            table = (self._root / "sys/kernel/debug/nvmap/iovmm/clients").read_text()
        except OSError:
            return None
        held: dict[int, int] = {}
        for line in table.splitlines():
            if (row := _CLIENT.fullmatch(line.strip())) is not None:
                pid = int(row["pid"])
                held[pid] = held.get(pid, 0) + int(row["size"]) * _UNITS[row["unit"]]
        return tuple(GpuProcess(pid, size // MIB) for pid, size in sorted(held.items()))


def shared(name: str | None, total: int, board: Board) -> HostMemory | None:
    """The host's memory, if what NVML calls the memory of a chip is that: no memory at all, or, of
    a chip that is known to have none, nearly as much as the host has. Some drivers say one, some
    the other, and most say that they do not know. Raises as `Board.memory`."""
    if total and not _CHIPS.search(name or ""):
        return None
    host = board.memory()
    return host if not total or total >= _ALMOST * host.total else None


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
