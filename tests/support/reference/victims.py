"""Who must go so that the next job fits: a pure function over plain data.

The search looks at what the queue is known to want. Of the sets of victims that give back enough,
and from which nobody could be spared, it takes the one after which the jobs that wait cost the
least reloading; what comes after them is weighed by how likely it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from gpumanager.model import CONTEXT_MIB
from gpumanager.scheduling.victims import Demand, Order, Plan, Resident
from tests.support.reference.lookahead import Step, Table, cheapest

REUSE_S = 60.0
"""After so long without a job, a consumer is half as likely to be wanted soon."""

BEYOND = 0.5
"""What a reload counts of one that was used just now, but is not wanted by the queue. Below 1,
since what is only likely weighs less than what is known."""

LOOK_AHEAD = 12
"""So many jobs of the queue are gone through."""


def plan_eviction(
    demand: Demand,
    residents: Iterable[Resident],
    available_mib: int,
    *,
    order: Order = "lru",
    now: float = 0.0,
    upcoming: Sequence[Demand] = (),
    look_ahead: int = LOOK_AHEAD,
) -> Plan:
    """Choose victims so that `demand` fits into `available_mib` (free less the reserve).

    Victims are those of `candidates` that are neither the target nor in its `coexists_with`.
    `upcoming` is what waits behind this job, in its order; the first `look_ahead` of it are gone
    through. Reloading somebody for them costs its `reload_s`. For what comes after them, one that
    still waits counts in full, and any other the less the longer it was not used, and nothing if
    it never was: with `cost` in seconds of reloading, with `lru` as if all took equally long.
    Among equals the least recently used goes, then the one of lower priority, then by name.
    """
    missing = demand.missing_mib - available_mib
    if demand.missing_mib == 0 or missing <= 0:
        return Plan(fits=True)
    known = {resident.name: resident for resident in residents}
    free = sum(
        each.yield_mib
        for each in candidates(known.values())
        if each.name != demand.name and each.name not in demand.coexists_with
    )
    if free < missing:
        return Plan(fits=False, short_mib=missing - free)
    # A job right after another one of the same consumer changes nothing.
    upcoming = [each for before, each in pairwise((demand, *upcoming)) if each.name != before.name]
    known.setdefault(demand.name, Resident(demand.name, False, demand.held_mib))
    chosen = cheapest(
        _table(known, demand, upcoming, look_ahead, order, now),
        frozenset(each.name for each in known.values() if each.loaded or _gives(each)),
        available_mib,
        Step(demand.name, demand.coexists_with),
        [Step(each.name, each.coexists_with) for each in upcoming[:look_ahead]],
    )
    return Plan(fits=False, victims=tuple(known[name] for name in chosen))


def candidates(residents: Iterable[Resident]) -> list[Resident]:
    """Those that could be unloaded, and would give something back: more than a bare process
    holds, if they are not known to be loaded."""
    return [resident for resident in residents if _gives(resident)]


def _gives(resident: Resident) -> bool:
    return (
        resident.evictable
        and resident.yield_mib > 0
        and (resident.loaded or resident.yield_mib > CONTEXT_MIB)
    )


def _table(
    residents: Mapping[str, Resident],
    demand: Demand,
    upcoming: Sequence[Demand],
    look_ahead: int,
    order: Order,
    now: float,
) -> Table:
    gives = {name: each.yield_mib for name, each in residents.items()}
    takes = dict(gives)
    wanted: dict[str, int] = {}
    for position, each in enumerate(upcoming):
        if each.name not in wanted:
            wanted[each.name] = position
            if not residents[each.name].loaded:
                takes[each.name] = each.missing_mib
                gives[each.name] += each.missing_mib
    takes[demand.name] = demand.missing_mib
    gives[demand.name] = residents[demand.name].yield_mib + demand.missing_mib

    reload_s = {name: each.reload_s for name, each in residents.items()}
    now = max([now, *(each.last_used or 0.0 for each in residents.values())])
    usual_s = sum(reload_s.values()) / len(reload_s) or 1.0
    just_now = {demand.name, *(each.name for each in upcoming[:look_ahead])}
    still_wanted = {each.name for each in upcoming[look_ahead:]}

    def keep_s(resident: Resident) -> float:
        seconds = resident.reload_s if order == "cost" else usual_s
        if resident.name in still_wanted:
            return seconds
        if resident.name in just_now:
            return BEYOND * seconds
        if resident.last_used is None:
            return 0.0
        return BEYOND * seconds * REUSE_S / (REUSE_S + now - resident.last_used)

    def preference(name: str) -> tuple[float, bool, float, int, str]:
        each = residents[name]
        used = each.last_used is not None
        return -wanted.get(name, math.inf), used, each.last_used or 0.0, each.priority, name

    movable = [
        each.name
        for each in residents.values()
        if each.evictable and (_gives(each) or each.name in just_now)
    ]
    return Table(
        takes_mib=takes,
        gives_mib=gives,
        reload_s=reload_s,
        keep_s={name: keep_s(each) for name, each in residents.items()},
        movable=sorted(movable, key=preference),
    )
