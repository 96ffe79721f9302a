"""Which set of victims costs the least reloading, by what the queue is known to want: a bounded
search, on names and numbers only.

From each set that would do for the job now, it goes through the jobs that wait, in their order. A
state is who is loaded; the ways to reach it are followed from one job to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest

FEW = 10
"""Of up to so many candidates all sets are looked at."""

STATES = 16
"""So many states, the best ones, are followed from one job to the next."""

REFUSED_S = 3600.0
"""What it counts that a job of the queue would not fit any more: more than any reloading."""


@dataclass(frozen=True, slots=True)
class Step:
    """A job: what it needs to be loaded, and what may not be unloaded for it."""

    name: str
    spares: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Table:
    """What can be loaded: consumers, or models of them. By name: the MiB it takes when it is loaded
    and gives back when it is unloaded, the seconds that loading it costs, and those that it is
    worth to have it loaded after the last step. `movable` may be unloaded; whoever is better
    unloaded comes first in it."""

    takes_mib: Mapping[str, int]
    gives_mib: Mapping[str, int]
    reload_s: Mapping[str, float]
    keep_s: Mapping[str, float]
    movable: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Way:
    """To a state: what loading has cost, what is free in it, and whom the first job unloaded (as
    places in `movable`)."""

    cost_s: float
    free_mib: int
    victims: tuple[int, ...]


_Ways = dict[frozenset[str], _Way]


def cheapest(
    table: Table, loaded: frozenset[str], free_mib: int, job: Step, queue: Sequence[Step]
) -> list[str]:
    """Whom to unload for `job`, in the order of `movable`, so that serving `queue` after it costs
    the least; empty if there is no way to have it fit. Among equals the fewest go, then those that
    come first in `movable`. `job` is taken to be not loaded."""
    ranks = {name: rank for rank, name in enumerate(table.movable)}
    start = _Way(0.0, free_mib, ())
    ways = {
        state: _Way(0.0, way.free_mib, tuple(sorted(ranks[name] for name in loaded - state)))
        for state, way in _serve(table, loaded - {job.name}, start, job).items()
    }
    last_wanted = {step.name: index for index, step in enumerate(queue)}

    def judge(entry: tuple[frozenset[str], _Way], index: int) -> tuple[float, int, tuple[int, ...]]:
        """What a way has cost, and what is missing in its state before the step of that index."""
        state, way = entry
        missing = sum(
            table.reload_s[name] if last_wanted.get(name, -1) >= index else seconds
            for name, seconds in table.keep_s.items()
            if name not in state
        )
        return round(way.cost_s + missing, 6), len(way.victims), way.victims

    for index, step in enumerate(queue):
        if len(ways) > STATES:
            best = nsmallest(STATES, ways.items(), key=lambda entry: judge(entry, index))
            ways = dict(best)
        found: _Ways = {}
        for state, way in ways.items():
            for after, better in _serve(table, state, way, step).items():
                known = found.get(after)
                if known is None or (better.cost_s, better.victims) < (known.cost_s, known.victims):
                    found[after] = better
        ways = found
    if not ways:
        return []
    *_, victims = min(judge(entry, len(queue)) for entry in ways.items())
    return [table.movable[rank] for rank in victims]


def _serve(table: Table, state: frozenset[str], way: _Way, step: Step) -> _Ways:
    """The states after a step. One that cannot fit is refused, and changes nothing else."""
    name = step.name
    if name in state:
        return {state: way}
    cost = way.cost_s + table.reload_s[name]
    over = table.takes_mib[name] - way.free_mib
    if over <= 0:
        return {state | {name}: _Way(cost, -over, way.victims)}
    may_go = [
        each for each in table.movable if each in state and each != name and each not in step.spares
    ]
    return {
        state.difference(gone) | {name}: _Way(
            cost, sum(table.gives_mib[each] for each in gone) - over, way.victims
        )
        for gone in covers(may_go, table.gives_mib, over)
    } or {state: replace(way, cost_s=way.cost_s + REFUSED_S)}


def covers(
    names: Sequence[str], gives_mib: Mapping[str, int], over_mib: int
) -> list[tuple[str, ...]]:
    """The sets of `names` that give back `over_mib`, and from which nobody can be spared. Of more
    than `FEW` names only the first so many are looked at; where those are not enough, there is one
    set: the first that are, less those that turn out not to be needed."""
    if sum(gives_mib[name] for name in names) < over_mib:
        return []
    few = list(names[:FEW])
    if sum(gives_mib[name] for name in few) < over_mib:
        return [_first_enough(names, gives_mib, over_mib)]
    few.sort(key=lambda name: -gives_mib[name])
    rest = [sum(gives_mib[name] for name in few[index:]) for index in range(len(few) + 1)]
    found: list[tuple[str, ...]] = []

    def extend(chosen: tuple[str, ...], index: int, over_mib: int) -> None:
        # The largest come first: who completes a set is its smallest, so all of it are needed.
        if rest[index] < over_mib:
            return
        name = few[index]
        if gives_mib[name] >= over_mib:
            found.append((*chosen, name))
        else:
            extend((*chosen, name), index + 1, over_mib - gives_mib[name])
        extend(chosen, index + 1, over_mib)

    extend((), 0, over_mib)
    return found


def _first_enough(
    names: Sequence[str], gives_mib: Mapping[str, int], over_mib: int
) -> tuple[str, ...]:
    chosen: list[str] = []
    for name in names:
        if over_mib <= 0:
            break
        chosen.append(name)
        over_mib -= gives_mib[name]
    for name in reversed(chosen[:]):
        if over_mib + gives_mib[name] <= 0:
            over_mib += gives_mib[name]
            chosen.remove(name)
    return tuple(chosen)
