"""Who must go so that the next job fits: a pure function over plain data.

The search looks at what the queue is known to want. Of the sets of victims that give back enough,
and from which nobody could be spared, it takes the one after which the jobs that wait cost the
least reloading; what comes after them is weighed by how likely it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from gpumanager.model import CONTEXT_MIB, parts_of
from gpumanager.scheduling.lookahead import Step, Table, cheapest

REUSE_S = 60.0
"""After so long without a job, a consumer is half as likely to be wanted soon."""

BEYOND = 0.5
"""What a reload counts of one that was used just now, but is not wanted by the queue. Below 1,
since what is only likely weighs less than what is known."""

LOOK_AHEAD = 12
"""So many jobs of the queue are gone through."""

Order = Literal["lru", "cost"]


@dataclass(frozen=True, slots=True)
class Resident:
    """What can be unloaded, as the choice of victims sees it: one model of a consumer, where the
    consumer says which are loaded and can unload one, else all of a consumer. `name` is as
    `model.resident_name` has it.

    `held_mib` is what it is taken to hold now, `floor_mib` what it keeps after an unload;
    `last_used` the monotonic time of its last real job, None if it had none; `reload_s` how long
    it takes to load again; `evictable` is False where it manages its own memory, is pinned, has
    no way to be unloaded, or one that was tried just now to no avail. `trim_mib` is what it would
    give back while it stays loaded, 0 if it has no way to, or does not run idle. `unknown`: it is
    loaded, and nobody knows how much it holds, so that `held_mib` is 0.
    """

    name: str
    loaded: bool
    held_mib: int
    last_used: float | None = None
    priority: int = 0
    evictable: bool = True
    floor_mib: int = 0
    reload_s: float = 0.0
    trim_mib: int = 0
    unknown: bool = False

    @property
    def consumer(self) -> str:
        """The consumer that it belongs to."""
        return parts_of(self.name)[0]

    @property
    def yield_mib(self) -> int:
        """MiB that unloading it gives back; never negative."""
        return max(0, self.held_mib - self.floor_mib)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job needs to be resident, a consumer or one model of it, and what that holds of the
    card already. `coexists_with` are consumers that may not go for it."""

    name: str
    needed_mib: int
    held_mib: int
    coexists_with: frozenset[str] = frozenset()

    @property
    def missing_mib(self) -> int:
        """MiB it still has to allocate; never negative. A consumer that holds all it needs
        asks for nothing, however full the card is."""
        return max(0, self.needed_mib - self.held_mib)

    def spares(self, resident: Resident) -> bool:
        """Whether it may not go for this: it is what is wanted, or a part of it, or may not be
        unloaded for its sake. Another model of the same consumer may."""
        consumer = parts_of(self.name)[0]
        if resident.consumer != consumer:
            return resident.consumer in self.coexists_with
        return resident.name == self.name or consumer in (resident.name, self.name)


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision. `short_mib` is what would still be missing after every victim went:
    when it is positive, unloading would be in vain and `victims` is empty, unless this is an
    `attempt`: how much is missing is only guessed, so the job is tried once the victims have gone
    and what they gave back has come."""

    fits: bool
    victims: tuple[Resident, ...] = ()
    short_mib: int = 0
    attempt: bool = False

    @property
    def in_vain(self) -> bool:
        """Whether the room would not be enough even without all that may go."""
        return not self.fits and not self.victims and not self.attempt


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

    Victims are those of `candidates` that the demand does not spare.
    `upcoming` is what waits behind this job, in its order; the first `look_ahead` of it are gone
    through. Reloading somebody for them costs its `reload_s`. For what comes after them, one that
    still waits counts in full, and any other the less the longer it was not used, and nothing if
    it never was: with `cost` in seconds of reloading, with `lru` as if all took equally long.
    Among equals the least recently used goes, then the one of lower priority, then by name.
    """
    if fits(demand, available_mib):
        return Plan(fits=True)
    missing = demand.missing_mib - available_mib
    known = {resident.name: resident for resident in residents}
    short_mib = missing - yields_mib(demand, known.values())
    if short_mib > 0:
        return Plan(fits=False, short_mib=short_mib)
    # A job right after another one of the same consumer changes nothing.
    upcoming = [each for before, each in pairwise((demand, *upcoming)) if each.name != before.name]
    for each in (demand, *upcoming):
        known.setdefault(each.name, Resident(each.name, False, each.held_mib))
    chosen = cheapest(
        _table(known, demand, upcoming, look_ahead, order, now),
        frozenset(each.name for each in known.values() if each.loaded or _gives(each)),
        available_mib,
        _step(demand, known.values()),
        [_step(each, known.values()) for each in upcoming[:look_ahead]],
    )
    return Plan(fits=False, victims=tuple(known[name] for name in chosen))


def fits(demand: Demand, available_mib: int) -> bool:
    """Whether it does without anybody being unloaded."""
    return demand.missing_mib <= max(0, available_mib)


def yields_mib(demand: Demand, residents: Iterable[Resident]) -> int:
    """MiB that unloading all of them that may go for `demand` would give back."""
    return sum(each.yield_mib for each in candidates(residents) if not demand.spares(each))


def trims(
    demand: Demand, residents: Iterable[Resident], missing_mib: float
) -> tuple[Resident, ...]:
    """Those whose trims together give back `missing_mib`, as few as do; all that give anything, if
    they are not enough. They stay loaded, so it does not matter who is pinned, or may not be
    unloaded for this demand; only the consumer that it is for is left out, whose jobs use what it
    could give back."""
    own = parts_of(demand.name)[0]
    giving = [each for each in residents if each.trim_mib > 0 and each.consumer != own]
    giving.sort(key=lambda each: (-each.trim_mib, each.last_used or 0.0, each.name))
    taken: list[Resident] = []
    for each in giving:
        if sum(other.trim_mib for other in taken) >= missing_mib:
            break
        taken.append(each)
    for each in taken[:]:  # the last one may have made smaller ones needless
        if sum(other.trim_mib for other in taken if other is not each) >= missing_mib:
            taken.remove(each)
    return tuple(taken)


def candidates(residents: Iterable[Resident]) -> list[Resident]:
    """Those that could be unloaded, and would give something back: more than a bare process
    holds, if they are not known to be loaded."""
    return [resident for resident in residents if _gives(resident)]


def _step(demand: Demand, residents: Iterable[Resident]) -> Step:
    return Step(demand.name, frozenset(each.name for each in residents if demand.spares(each)))


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
