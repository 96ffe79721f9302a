"""Which consumer holds which memory of the card: listening port → process → its descendants, or
its service's cgroup. What no consumer holds is foreign."""

from __future__ import annotations

import logging
import re

from gpumanager.clock import Clock
from gpumanager.model import GpuProcess, Holdings, MemoryReading
from gpumanager.processes import ConsumerProcesses, ProcessTable

log = logging.getLogger(__name__)

REFRESH_S = 10.0
"""After this, who listens where is looked up again, even if the processes on the card are the
same. Before that only a new process that is nobody's has it looked up."""

UNSEEN_MIB = 700
"""More than a driver takes for itself: if so much is in use and no process shows, the processes
are hidden, as in a container without the host's."""

_SERVICE = re.compile(
    r"(?!user@)[^/]+\.service|(docker|libpod|crio|cri-containerd)-[0-9a-f]{12,}\.scope"
    r"|[0-9a-f]{64}"
)
"""The last part of a cgroup that is one service's, or one container's, own."""


class Attributor:
    """Draws up the holdings behind each reading. For one thread at a time."""

    def __init__(self, consumers: ConsumerProcesses, table: ProcessTable, clock: Clock) -> None:
        self._consumers = consumers
        self._table = table
        self._clock = clock
        self._looked_at: float | None = None
        self._owners: dict[int, str | None] = {}
        self._names: dict[int, str] = {}
        self._listening: dict[str, tuple[int, ...]] = {}

    def attribute(self, reading: MemoryReading) -> Holdings:
        """Never raises: what cannot be found out is said in `reason`."""
        if reading.processes is None:
            return Holdings(reason="the driver gives no figures per process (WSL2, WDDM, MIG)")
        pids = frozenset(process.pid for process in reading.processes)
        if not pids and reading.used_mib > UNSEEN_MIB:
            return Holdings(reason=f"{reading.used_mib} MiB are in use, but no process shows")
        try:
            self._look(pids)
        except Exception as error:
            log.exception("attribution failed")
            return Holdings(reason=f"the processes cannot be looked up: {error}")
        if pids and not any(self._names[pid] for pid in pids):
            return Holdings(reason="the card's processes are outside this PID namespace")
        return self._drawn_up(reading.processes)

    def _drawn_up(self, processes: tuple[GpuProcess, ...]) -> Holdings:
        held = dict.fromkeys(self._listening, 0)
        pids: dict[str, tuple[int, ...]] = {}
        foreign = []
        for process in processes:
            owner = self._owners[process.pid]
            if owner is None:
                foreign.append(GpuProcess(process.pid, process.mib, self._names[process.pid]))
            else:
                held[owner] = held.get(owner, 0) + process.mib
                pids[owner] = (*pids.get(owner, ()), process.pid)
        foreign.sort(key=lambda process: (-process.mib, process.pid))
        return Holdings(held, pids, tuple(foreign))

    def _look(self, pids: frozenset[int]) -> None:
        """Know every process, with as few costly look-ups as can be: who listens where is known
        already for a process that descends from one that is known to."""
        now = self._clock.monotonic()
        if self._looked_at is None or now - self._looked_at >= REFRESH_S:
            self._look_up(pids, now)
            return
        for pid in pids - self._owners.keys():
            self._names[pid] = self._table.name(pid)
            self._owners[pid] = self._owner(pid)
            if self._owners[pid] is None:
                self._look_up(pids, now)  # perhaps it serves in the place of one that ended
                return

    def _look_up(self, pids: frozenset[int], now: float) -> None:
        self._listening = self._consumers.find()
        self._owners = {pid: self._owner(pid) for pid in pids}
        self._names = {pid: self._table.name(pid) for pid in pids}
        self._looked_at = now

    def _owner(self, pid: int) -> str | None:
        """The consumer whose listening process is nearest among `pid` and its ancestors; else
        the one that alone shares its service's cgroup."""
        for each in self._table.ancestry(pid):
            names = [name for name, listening in self._listening.items() if each in listening]
            if names:
                return names[0] if len(names) == 1 else None  # two consumers in one process
        cgroup = self._table.cgroup(pid)
        if not _SERVICE.fullmatch(cgroup.rpartition("/")[2]):
            return None
        sharing = [
            name
            for name, listening in self._listening.items()
            if any(self._table.cgroup(each) == cgroup for each in listening)
        ]
        return sharing[0] if len(sharing) == 1 else None
