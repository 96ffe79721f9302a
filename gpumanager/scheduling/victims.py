"""Who must go so that the next job fits: a pure function over plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resident:
    """A consumer as the choice of victims sees it.

    `held_mib` is what it is taken to hold now; `last_used` the monotonic time of its last real
    job, None if it had none; `evictable` is False where it manages its own memory, or has no
    unload call, or its unload was tried just now to no avail.
    """

    name: str
    loaded: bool
    held_mib: int
    last_used: float | None = None
    priority: int = 0
    evictable: bool = True


@dataclass(frozen=True, slots=True)
class Demand:
    """What the next job's consumer needs to be resident, and what it holds of that already."""

    name: str
    needed_mib: int
    held_mib: int
    coexists_with: frozenset[str] = frozenset()

    @property
    def missing_mib(self) -> int:
        """MiB it still has to allocate; never negative. A consumer that holds all it needs
        asks for nothing, however full the card is."""
        return max(0, self.needed_mib - self.held_mib)


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision. `short_mib` is what would still be missing after every victim went:
    when it is positive, unloading would be in vain and `victims` is empty."""

    fits: bool
    victims: tuple[Resident, ...] = ()
    short_mib: int = 0


def plan_eviction(demand: Demand, residents: Iterable[Resident], available_mib: int) -> Plan:
    """Choose victims so that `demand` fits into `available_mib` (free less the reserve).

    Victims are loaded consumers that are neither the target nor in its `coexists_with`, least
    recently used first; never used goes before all, a lower priority breaks ties, then the
    name. Only as many are named as their figures say are needed.
    """
    missing = demand.missing_mib - available_mib
    if demand.missing_mib == 0 or missing <= 0:
        return Plan(fits=True)
    candidates = sorted(
        (
            resident
            for resident in residents
            if resident.loaded
            and resident.evictable
            and resident.held_mib > 0
            and resident.name != demand.name
            and resident.name not in demand.coexists_with
        ),
        key=_least_recently_used_first,
    )
    chosen: list[Resident] = []
    for candidate in candidates:
        if missing <= 0:
            break
        chosen.append(candidate)
        missing -= candidate.held_mib
    if missing > 0:
        return Plan(fits=False, short_mib=missing)
    return Plan(fits=False, victims=tuple(chosen))


def _least_recently_used_first(resident: Resident) -> tuple[bool, float, int, str]:
    used = resident.last_used is not None
    return used, resident.last_used or 0.0, resident.priority, resident.name
