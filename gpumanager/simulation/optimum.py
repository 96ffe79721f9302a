"""The shortest time in which a trace could be served, had all of it been known from the start:
exactly, for traces of a few jobs.

A schedule is an order of the jobs, and for each the sets of residents that go for it. A job's turn,
loading included, begins when it has come, as with the policies; but nothing is promised to anybody:
overtaking is not bounded here. All schedules are followed job by job, as branches; of those that
have served the same jobs and have the same loaded, only the ones go on that are not later in every
respect, and none that cannot end before the best known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

from gpumanager.scheduling.lookahead import covers
from gpumanager.scheduling.victims import Demand, Resident
from gpumanager.simulation.trace import Footprint, Task, Trace

MOST_JOBS = 12
"""Of more, there are too many orders."""

_EPSILON_S = 1e-9


@dataclass(frozen=True, slots=True)
class _Branch:
    """So far: when its last job ended, and when those come that had to wait for one of its jobs, by
    their numbers."""

    at: float
    comes: tuple[tuple[int, float], ...]
    order: tuple[int, ...]

    def no_later(self, other: _Branch) -> bool:
        """Whether it is at least as good in every respect; both have served the same jobs."""
        return self.at <= other.at + _EPSILON_S and all(
            max(mine, self.at) <= max(its, other.at) + _EPSILON_S
            for (_, mine), (_, its) in zip(self.comes, other.comes, strict=True)
        )


_State = tuple[frozenset[int], frozenset[str]]


@dataclass(frozen=True, slots=True)
class Best:
    """The shortest makespan, in seconds from the first arrival, and an order of the jobs (by their
    numbers) that has it."""

    makespan_s: float
    order: tuple[int, ...]


def can_solve(trace: Trace) -> bool:
    """Whether `solve` takes it: few jobs, one at a time, none of which leaves."""
    one_by_one = not any(each.parallel > 1 or each.beside for each in trace.footprints.values())
    stays = all(task.leaves_s is None and task.operation is None for task in trace.tasks)
    return len(trace.tasks) <= MOST_JOBS and one_by_one and stays


def solve(trace: Trace, at_most_s: float = inf) -> Best:
    """The optimum. `at_most_s` is a makespan that is known to be possible: it spares the search
    what cannot beat it. Raises ValueError for a trace that `can_solve` says no to, and if there is
    no schedule within `at_most_s`."""
    if not can_solve(trace):
        raise ValueError(f"{len(trace.tasks)} jobs are too many, or not one by one")
    tasks = {task.number: task for task in trace.tasks}
    if not tasks:
        return Best(0.0, ())
    first = min(task.at for task in tasks.values() if task.after is None)
    search = _Search(trace, tasks, first + at_most_s + _EPSILON_S)
    found = search.run()
    if found is None:
        raise ValueError(f"there is no schedule within {at_most_s:g} s")
    return Best(found.at - first, found.order)


class _Search:
    def __init__(self, trace: Trace, tasks: Mapping[int, Task], latest: float) -> None:
        self._tasks = tasks
        self._latest = latest
        self._sizes: Mapping[str, Footprint] = trace.footprints
        self._room = trace.total_mib - trace.reserved_mib
        self._loaded = trace.loaded
        self._behind: dict[int, list[int]] = {}
        for task in tasks.values():
            if task.after is not None:
                self._behind.setdefault(task.after, []).append(task.number)

    def run(self) -> _Branch | None:
        layer: dict[_State, list[_Branch]] = {
            (frozenset(), self._loaded): [_Branch(0.0, (), ())],
        }
        for _ in self._tasks:
            deeper: dict[_State, list[_Branch]] = {}
            for (served, loaded), branches in layer.items():
                for branch in branches:
                    for state, longer in self._grow(served, loaded, branch):
                        _keep(deeper.setdefault(state, []), longer)
            layer = deeper
        ends = [branch for branches in layer.values() for branch in branches]
        return min(ends, key=lambda branch: branch.at, default=None)

    def _grow(
        self, served: frozenset[int], loaded: frozenset[str], branch: _Branch
    ) -> Iterator[tuple[_State, _Branch]]:
        comes = dict(branch.comes)
        for number, task in self._tasks.items():
            if number in served or (task.after is not None and number not in comes):
                continue
            begins = max(branch.at, task.at, comes.get(number, 0.0))
            for gone in self._ways(loaded, task.needs):
                ends = begins + task.run_s
                if task.needs not in loaded:
                    ends += self._sizes[task.needs].load_s
                    ends += sum(self._sizes[name].unload_s for name in gone)
                after = served | {number}, loaded.difference(gone) | {task.needs}
                if ends + self._at_least_s(*after) > self._latest:
                    continue
                still = {n: at for n, at in comes.items() if n != number}
                for n in self._behind.get(number, ()):
                    still[n] = max(self._tasks[n].at, ends + self._tasks[n].think_s)
                yield after, _Branch(ends, tuple(sorted(still.items())), (*branch.order, number))

    def _ways(self, loaded: frozenset[str], name: str) -> list[tuple[str, ...]]:
        """The sets that could go so that it fits, none of them larger than it must be."""
        own = self._sizes[name]
        over = sum(self._sizes[each].mib for each in loaded) + own.mib - self._room
        if name in loaded or over <= 0:
            return [()]
        demand = Demand(name, own.mib, 0, own.coexists_with)
        movable = [
            each
            for each in sorted(loaded)
            if self._sizes[each].movable and not demand.spares(Resident(each, True, 0))
        ]
        return covers(movable, {each: self._sizes[each].mib for each in movable}, over)

    def _at_least_s(self, served: frozenset[int], loaded: frozenset[str]) -> float:
        """What is left takes at least so long: each runs, and each resident that is wanted and not
        there is loaded once."""
        rest = [task for number, task in self._tasks.items() if number not in served]
        missing = {task.needs for task in rest} - loaded
        loads = sum(self._sizes[name].load_s for name in missing)
        return loads + sum(task.run_s for task in rest)


def _keep(known: list[_Branch], new: _Branch) -> None:
    """Add it to those that are worth following, unless one of them is as good."""
    if any(each.no_later(new) for each in known):
        return
    known[:] = [each for each in known if not new.no_later(each)]
    known.append(new)
