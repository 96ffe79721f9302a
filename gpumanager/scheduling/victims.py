"""Who must go so that the next job fits: a pure function over plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from gpumanager.model import CONTEXT_MIB

REUSE_S = 60.0
"""After so long without a job, a consumer is half as likely to be wanted soon."""

Order = Literal["lru", "cost"]


@dataclass(frozen=True, slots=True)
class Resident:
    """A consumer as the choice of victims sees it.

    `held_mib` is what it is taken to hold now, `floor_mib` what it keeps after an unload;
    `last_used` the monotonic time of its last real job, None if it had none; `reload_s` how long
    it takes to load again; `evictable` is False where it manages its own memory, is pinned, has
    no way to be unloaded, or one that was tried just now to no avail.
    """

    name: str
    loaded: bool
    held_mib: int
    last_used: float | None = None
    priority: int = 0
    evictable: bool = True
    floor_mib: int = 0
    reload_s: float = 0.0

    @property
    def yield_mib(self) -> int:
        """MiB that unloading it gives back; never negative."""
        return max(0, self.held_mib - self.floor_mib)


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

    @property
    def in_vain(self) -> bool:
        """Whether the room would not be enough even without all that may go."""
        return not self.fits and not self.victims


def plan_eviction(
    demand: Demand,
    residents: Iterable[Resident],
    available_mib: int,
    *,
    order: Order = "lru",
    now: float = 0.0,
) -> Plan:
    """Choose victims so that `demand` fits into `available_mib` (free less the reserve).

    Victims are those of `candidates` that are neither the target nor in its `coexists_with`.
    `lru`: least recently used first; never used goes before all, a lower priority breaks ties,
    then the name. `cost`: by the seconds that reloading would cost, times the chance that it is
    wanted soon, for each MiB given back; the cheapest first. Only as many are named as their
    figures say are needed.
    """
    missing = demand.missing_mib - available_mib
    if demand.missing_mib == 0 or missing <= 0:
        return Plan(fits=True)
    may_go = [
        resident
        for resident in candidates(residents)
        if resident.name != demand.name and resident.name not in demand.coexists_with
    ]
    chosen: list[Resident] = []
    for candidate in sorted(may_go, key=_order(order, now)):
        if missing <= 0:
            break
        chosen.append(candidate)
        missing -= candidate.yield_mib
    if missing > 0:
        return Plan(fits=False, short_mib=missing)
    return Plan(fits=False, victims=tuple(chosen))


def candidates(residents: Iterable[Resident]) -> list[Resident]:
    """Those that could be unloaded, and would give something back: more than a bare process
    holds, if they say that they have nothing loaded."""
    return [
        resident
        for resident in residents
        if resident.evictable
        and resident.yield_mib > 0
        and (resident.loaded or resident.yield_mib > CONTEXT_MIB)
    ]


def _order(order: Order, now: float) -> Callable[[Resident], Any]:
    if order == "lru":
        return _least_recently_used_first
    return lambda resident: (_cost(resident, now), *_least_recently_used_first(resident))


def _least_recently_used_first(resident: Resident) -> tuple[bool, float, int, str]:
    used = resident.last_used is not None
    return used, resident.last_used or 0.0, resident.priority, resident.name


def _cost(resident: Resident, now: float) -> float:
    """Expected seconds of reloading for each MiB given back."""
    if resident.last_used is None:
        return 0.0
    chance = REUSE_S / (REUSE_S + max(0.0, now - resident.last_used))
    return resident.reload_s * chance / resident.yield_mib
