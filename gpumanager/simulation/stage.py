"""The card that a trace is played on: who is loaded, and the picture of it that is decided by."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean

from gpumanager.consumers.footprint import REMEMBERED
from gpumanager.model import Job, MemoryReading, parts_of
from gpumanager.scheduling.estimate import RUN
from gpumanager.scheduling.memory import Card, Standing
from gpumanager.scheduling.policy import Prospect
from gpumanager.scheduling.victims import Demand, Resident
from gpumanager.simulation.trace import Trace

LEAST_RELOAD_S = 1.0
"""Loads that take less than this cost the same in the choice of victims, as in the broker."""


class Stage:
    """Memory comes and goes with the end of a load or an unload; all of it is known exactly, as
    are the seconds that loads and unloads take."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._loaded = set(trace.loaded)
        self._used: dict[str, float] = {}
        self._pictures: dict[str, Standing] = {}
        self._runs: dict[str, deque[float]] = {}

    @property
    def loaded(self) -> frozenset[str]:
        """The names of all that are on the card."""
        return frozenset(self._loaded)

    def is_loaded(self, name: str) -> bool:
        """Whether that one is."""
        return name in self._loaded

    def ready(self, job: Job) -> bool:
        """Whether what the job needs is on the card."""
        return job.resident in self._loaded

    def prospect(self, job: Job) -> Prospect:
        """What the job would find. What it usually takes is learned from jobs as they end, as the
        broker does; loads and unloads are known from the start."""
        trace, name = self.trace, job.resident
        size, runs = trace.footprints[name], self._runs.get(name) or self._runs.get(job.consumer)
        used = sum(trace.footprints[each].mib for each in self._loaded)
        fits = size.mib <= trace.total_mib - trace.reserved_mib - used
        run_s = fmean(runs) if runs else RUN.mean
        return Prospect(name in self._loaded, fits, size.load_s, size.unload_s, run_s)

    def ran(self, name: str, seconds: float) -> None:
        """A job of it has run for so long. A model that has not is taken to be as its consumer."""
        for each in dict.fromkeys((name, parts_of(name)[0])):
            self._runs.setdefault(each, deque(maxlen=REMEMBERED)).append(seconds)

    def load(self, name: str) -> None:
        """It has been loaded."""
        self._loaded.add(name)
        self._pictures.pop(name, None)

    def unload(self, name: str) -> None:
        """It has been unloaded."""
        self._loaded.discard(name)
        self._pictures.pop(name, None)

    def use(self, name: str, now: float) -> None:
        """A job of it began or ended."""
        self._used[name] = now
        self._pictures.pop(name, None)

    def movable(self, target: str) -> Sequence[Resident]:
        """All that are loaded and may go for that one, in the order of their names."""
        demand = self._standing(target).demand
        loaded = (self._standing(name).resident for name in sorted(self._loaded))
        return [each for each in loaded if each.evictable and not demand.spares(each)]

    def card(self, now: float) -> Card:
        """What the decisions see of it."""
        trace = self.trace
        used = sum(trace.footprints[name].mib for name in self._loaded)
        return Card(
            {name: self._standing(name) for name in trace.footprints},
            MemoryReading(trace.total_mib, used, trace.total_mib - used),
            reserved_mib=trace.reserved_mib,
            order=trace.order,
            now=now,
        )

    def _standing(self, name: str) -> Standing:
        found = self._pictures.get(name)
        if found is None:
            self._pictures[name] = found = self._draw(name)
        return found

    def _draw(self, name: str) -> Standing:
        size, loaded = self.trace.footprints[name], name in self._loaded
        held_mib = size.mib if loaded else 0
        resident = Resident(
            name,
            loaded,
            held_mib,
            last_used=self._used.get(name),
            priority=size.priority,
            evictable=size.movable,
            reload_s=max(LEAST_RELOAD_S, size.load_s),
        )
        return Standing(
            resident,
            Demand(name, size.mib, held_mib, size.coexists_with),
            declared_mib=size.mib,
            hoped_floor_mib=0,
            lucky=resident,
            lucky_surely_mib=held_mib,
        )
