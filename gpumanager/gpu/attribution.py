"""Which consumer holds which memory of the card: listening port → process → its descendants, or
its service's cgroup, or its container. What no consumer holds is foreign."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from gpumanager.clock import Clock
from gpumanager.gpu.containers import Contained, ContainedConsumers, Place
from gpumanager.host.processes import ConsumerProcesses, ProcessTable
from gpumanager.model import GpuProcess, Holdings, MemoryReading

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


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a process on the card that was `born` then: whose it is, and the main
    process of its consumer that it descends from, with its birth, if it does."""

    born: int | None
    name: str
    owners: frozenset[str]
    descends_from: tuple[int, int | None] | None = None


class Attributor:
    """Draws up the holdings behind each reading. For one thread at a time."""

    def __init__(
        self,
        consumers: ConsumerProcesses,
        contained: ContainedConsumers,
        table: ProcessTable,
        clock: Clock,
    ) -> None:
        self._consumers = consumers
        self._contained = contained
        self._table = table
        self._clock = clock
        self._looked_at: float | None = None
        self._known: dict[int, _Known] = {}
        self._main: dict[str, dict[int, int | None]] = {}
        self._found = Contained()
        self._here: dict[str, Place] = {}

    def attribute(self, reading: MemoryReading) -> Holdings:
        """Never raises: what cannot be found out is said in `reason`."""
        if reading.processes is None:
            return Holdings(reason=_untold(reading))
        pids = frozenset(process.pid for process in reading.processes)
        if not pids and self._hides(reading):
            return Holdings(reason=f"{reading.used_mib} MiB are in use, but no process shows")
        try:
            self._look(pids)
            elsewhere = self._elsewhere(pids, reading.local_pids)
        except Exception as error:
            log.exception("attribution failed")
            return Holdings(reason=f"the processes cannot be looked up: {error}")
        if elsewhere:
            return Holdings(reason="the card's processes are outside this PID namespace")
        return self._drawn_up(reading.processes)

    def _hides(self, reading: MemoryReading) -> bool:
        """Whether processes must be there that do not show. Of the host's memory much is in use
        by all of its programs."""
        if reading.memory == "host":
            return not self._table.sees_all()
        return reading.used_mib > UNSEEN_MIB

    def _elsewhere(self, pids: frozenset[int], local: bool) -> bool:
        """Whether the driver's numbers are those of another PID namespace: then a number that
        happens to be somebody's here, too, means nothing either. Some drivers translate them, and
        list only the processes that show here: those do have the card open."""
        unknown = [pid for pid in pids if not self._known[pid].name]
        if self._table.sees_all():
            return bool(unknown) and len(unknown) == len(pids)  # some may just have ended
        return bool(unknown) or not (local or all(map(self._table.uses_card, pids)))

    def _drawn_up(self, processes: tuple[GpuProcess, ...]) -> Holdings:
        here = [
            name
            for name, place in self._found.places.items()
            if place.certain or self._here.get(name) == place
        ]
        held = dict.fromkeys([*self._main, *here], 0)
        pids: dict[str, tuple[int, ...]] = {}
        foreign, shared = [], set[str]()
        for process in processes:
            known = self._known[process.pid]
            owners = known.owners
            if not owners:
                foreign.append(GpuProcess(process.pid, process.mib, known.name))
            elif len(owners) > 1:
                shared |= owners
            else:
                (owner,) = owners
                held[owner] = held.get(owner, 0) + process.mib
                pids[owner] = (*pids.get(owner, ()), process.pid)
        for name in shared:  # what of it is whose cannot be told, nor that it is nothing
            held.pop(name, None)
            pids.pop(name, None)
        foreign.sort(key=lambda process: (-process.mib, process.pid))
        births = {process.pid: self._known[process.pid].born for process in processes}
        return Holdings(held, pids, tuple(foreign), births=births)

    def _look(self, pids: frozenset[int]) -> None:
        """Know every process, with as few costly look-ups as can be: who listens where is known
        already for a process that descends from one that is known to."""
        now = self._clock.monotonic()
        listen = [(pid, born) for main in self._main.values() for pid, born in main.items()]
        births = {pid: self._table.born(pid) for pid in pids.union(pid for pid, _ in listen)}
        # If one that was found to listen has ended, another may serve in its place, or have its
        # number.
        stale = self._looked_at is None or now - self._looked_at >= REFRESH_S
        if stale or any(births[pid] != born for pid, born in listen):
            self._look_up(pids, now)
            return
        for pid in pids:
            born = births[pid]
            if (known := self._known.get(pid)) is not None and born in (known.born, None):
                continue  # what has just ended was the process that is known
            self._known[pid] = known = self._identify(pid, born)
            if not known.owners:
                self._look_up(pids, now)  # perhaps it serves in the place of one that ended
                return

    def _look_up(self, pids: frozenset[int], now: float) -> None:
        listening = self._consumers.find()
        self._found = self._contained.find(listening.keys())
        main = {**listening, **self._found.main}
        self._main = {
            name: {pid: self._table.born(pid) for pid in found} for name, found in main.items()
        }
        before, self._known = self._known, {}
        for pid in pids:
            born, known = self._table.born(pid), before.get(pid)
            if known is not None and born is None:
                self._known[pid] = known
                continue
            self._known[pid] = found = self._identify(pid, born)
            if not found.owners and known is not None and known.born == born:
                self._known[pid] = self._orphaned(known) or found
        self._looked_at = now

    def _orphaned(self, known: _Known) -> _Known | None:
        """A process that descended from a consumer's, and whose parent has ended since, is still
        that consumer's while that process runs."""
        if known.descends_from is None:
            return None
        pid, born = known.descends_from
        mains = [self._main.get(name, {}) for name in known.owners]
        return known if any(pid in main and main[pid] == born for main in mains) else None

    def _identify(self, pid: int, born: int | None) -> _Known:
        """The consumers whose main process is nearest among `pid` and its ancestors; else the
        one whose main process leads its group, or that alone shares its service's cgroup, or that
        listens in its network namespace. More than one where several share a process; none if it
        is nobody's."""
        name = self._table.name(pid)
        for each in (*self._table.ancestry(pid), *self._table.groups(pid)):
            owners = frozenset(name for name, main in self._main.items() if each in main)
            if owners:
                return _Known(born, name, owners, (each, self._table.born(each)))
        return _Known(born, name, self._by_cgroup(pid) or self._by_network(pid))

    def _by_cgroup(self, pid: int) -> frozenset[str]:
        cgroup = self._table.cgroup(pid)
        if not _SERVICE.fullmatch(cgroup.rpartition("/")[2]):
            return frozenset()
        sharing = [
            name
            for name, main in self._main.items()
            if any(self._table.cgroup(each) == cgroup for each in main)
        ]
        return frozenset(sharing if len(sharing) == 1 else ())

    def _by_network(self, pid: int) -> frozenset[str]:
        if not self._found.places:
            return frozenset()
        network = self._table.network(pid)
        found = {name: place for name, place in self._found.places.items() if place.is_in(network)}
        self._here.update(found)
        return frozenset(found)


def _untold(reading: MemoryReading) -> str:
    """Why the driver's figures are missing, and where that is so."""
    why = reading.untold or "the driver gives no figures per process"
    if reading.memory == "host":
        return f"{why}; on a Jetson before Thor only root may read the kernel's"
    return f"{why} (WSL2, WDDM, MIG)"
