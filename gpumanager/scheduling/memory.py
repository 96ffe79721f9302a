"""What making room for a job takes, by the card and the consumers as of one moment: pure functions
over plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from gpumanager.gpu.accounting import Balance, balance
from gpumanager.model import CONTEXT_MIB, MemoryReading, parts_of
from gpumanager.scheduling.victims import (
    Demand,
    Order,
    Plan,
    Resident,
    candidates,
    fits,
    plan_eviction,
    trims,
    yields_mib,
)

DESKTOP_MIB = 1024
DESKTOP_SHARE = 8
"""What is nobody's, and no more than the first, or than one part in the second of the card, is
taken for a desktop: it does not keep a job that is otherwise alone from being tried."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a consumer stands, or one model of it, all in MiB. `resident` is what it is to the jobs
    of others, `demand` what its own next job needs; `declared_mib` what the config says that it
    needs.

    The rest is how much better it may be than is known. `hoped_floor_mib`: what it keeps after an
    unload, if what was seen to stay once comes back this time. `lucky`: what it is to others, if
    that is so, and nothing is wrong that is only assumed; `lucky_surely_mib`: what it holds for
    its own next job then. `coming_mib` is what it was unloaded of lately, and still holds;
    `late_mib` what of that is overdue, if that is why it is in quarantine for the first time.
    `leaked_mib` is what it holds that its own next job cannot use, and an unload would give back.
    """

    resident: Resident
    demand: Demand
    declared_mib: int
    hoped_floor_mib: int
    lucky: Resident
    lucky_surely_mib: int
    coming_mib: int = 0
    late_mib: int = 0
    leaked_mib: int = 0


@dataclass(frozen=True, slots=True)
class Card:
    """The card and who is on it as of `now` (monotonic seconds). `reading` is None where the card
    cannot be measured, `last` is then the latest of before; `total_mib` is the configured total
    (0: none). Of what is free, `reserved_mib` stays free.

    `standings` has each consumer, and those models that are known by themselves, by the names that
    residents have. A consumer that has models there stands only for what is none of theirs.
    `needs` is what a model needs of which no more is known than that, in MiB.
    """

    standings: Mapping[str, Standing] = field(default_factory=dict)
    reading: MemoryReading | None = None
    last: MemoryReading | None = None
    total_mib: int = 0
    reserved_mib: int = 0
    order: Order = "lru"
    now: float = 0.0
    needs: Mapping[str, int] = field(default_factory=dict)

    def standing(self, target: str) -> Standing:
        """Where `target` stands; a model that is not known by itself, where its consumer does."""
        found = self.standings.get(target)
        return self.standings[parts_of(target)[0]] if found is None else found

    def demand(self, target: str) -> Demand:
        """What the next job of `target` needs."""
        demand, needed_mib = self.standing(target).demand, self.needs.get(target)
        return demand if needed_mib is None else replace(demand, needed_mib=needed_mib)

    def balance(self, target: str | None = None) -> Balance:
        """How much is free; for the next job of `target`, if that is given: what it may hold, but
        not surely, is not in its own way."""
        own = None if target is None else self.standing(target)
        return self._balance(
            each.demand.held_mib if each is own else each.resident.held_mib
            for each in self.standings.values()
        )

    def lucky_balance(self, target: str) -> Balance:
        """The same, if all that is assumed were in favour of `target`."""
        own = self.standing(target)
        return self._balance(
            each.lucky_surely_mib if each is own else each.lucky.held_mib
            for each in self.standings.values()
        )

    def _balance(self, held_mib: Iterable[int]) -> Balance:
        return balance(self.reading, self.total_mib, held_mib, self.last)


@dataclass(frozen=True, slots=True)
class Look:
    """What follows from a card for the next job of `target`. `coming_mib` is what was unloaded
    lately and is still held; `late_mib` what is overdue of it, of those that are in quarantine for
    the first time because of that. `trims` are those that give back something first, while they
    stay loaded: enough, so that nobody has to go, or all that can, before the job is refused, or
    tried although it does not fit. `leaking` is the target itself, if there is no room for what its
    job needs beside what it has leaked, but would be after its own unload."""

    target: str
    plan: Plan
    needed_mib: int
    held_mib: int
    balance: Balance
    coming_mib: int = 0
    late_mib: int = 0
    trims: tuple[Resident, ...] = ()
    leaking: Resident | None = None

    @property
    def short_mib(self) -> int:
        """MiB that are missing in the end."""
        return self.plan.short_mib or self.needed_mib - self.held_mib - self.balance.free_mib

    @property
    def may_come_late(self) -> bool:
        """Whether there would be room, if what is overdue came back after all."""
        return (self.plan.attempt or self.plan.in_vain) and 0 < self.short_mib <= self.late_mib

    @property
    def worth_waiting(self) -> bool:
        """Whether there may be room without an eviction, or a risk, once the memory is back that is
        on its way."""
        if not self.coming_mib:
            return False
        enough = self.coming_mib >= self.short_mib
        return self.plan.attempt or self.plan.in_vain or enough


def look(
    card: Card,
    target: str,
    upcoming: Sequence[str] = (),
    spared: Set[str] = frozenset(),
    trimmed: Set[str] = frozenset(),
) -> Look:
    """What making room for the next job of `target` takes. Those that are `spared` may not go, nor
    be trimmed; those that are `trimmed` have been already. `upcoming` is whose jobs wait behind it.

    A guess may cost an eviction, never a refusal: where the room would not be enough even
    without all that may go, but would be if what is only assumed turns out well, and what
    is declared is all that is needed, they all go, and the job is tried. So is one that will
    be alone on the card then.
    """
    now, demand = card.balance(target), card.demand(target)
    plan = Plan(fits=True)
    if now.source != "unknown":
        plan = _plan(card, target, demand, now, upcoming, spared)
    return Look(
        target,
        plan,
        demand.needed_mib,
        demand.held_mib,
        now,
        sum(each.coming_mib for each in card.standings.values()),
        sum(each.late_mib for each in card.standings.values()),
        () if plan.fits else _trims(card, demand, now, plan, spared | trimmed),
        _leaking(card, target, plan, spared),
    )


def is_room(card: Card, target: str) -> bool:
    """Whether the next job of `target` fits without anybody being unloaded."""
    now = card.balance(target)
    available_mib = now.free_mib - card.reserved_mib
    return now.source == "unknown" or fits(card.demand(target), available_mib)


def can_be_made(card: Card, target: str, spared: Set[str] = frozenset()) -> bool:
    """Whether there is room for the next job of `target`, or surely would be, once all had gone
    that may and are not `spared`."""
    if is_room(card, target):
        return True
    demand = card.demand(target)
    missing = demand.missing_mib - card.balance(target).free_mib + card.reserved_mib
    return any(
        missing <= yields_mib(demand, _residents(card, spared, hopeful=hopeful))
        for hopeful in (False, True)
    )


def may_go(card: Card, spared: Set[str] = frozenset()) -> list[Resident]:
    """All that could be unloaded, and are not `spared`, nor their consumers; those, too, of which
    nobody knows whether that would give anything back."""
    residents = _residents(card, spared)
    unknown = [each for each in residents if each.unknown and each.evictable]
    return [*candidates(residents), *unknown]


def can_trim(card: Card, target: str, spared: Set[str] = frozenset()) -> list[Resident]:
    """All but the consumer of `target`, and those that are `spared`, that give back something while
    they stay loaded."""
    return list(trims(card.demand(target), _spared(card, spared), math.inf))


def _plan(
    card: Card,
    target: str,
    demand: Demand,
    now: Balance,
    upcoming: Sequence[str],
    spared: Set[str],
) -> Plan:
    available_mib = now.free_mib - card.reserved_mib
    waiting = [
        card.demand(name)
        for name in upcoming
        if name in card.standings or parts_of(name)[0] in card.standings
    ]
    plan = Plan(fits=False)
    # The second time: what was seen to stay once may come back this time.
    for hopeful in (False, True):
        again = plan_eviction(
            demand,
            _residents(card, spared, hopeful=hopeful),
            available_mib,
            order=card.order,
            now=card.now,
            upcoming=waiting,
        )
        if not again.in_vain:
            return again
        plan = plan if hopeful else again
    if not _with_luck(card, target, demand, spared) and not _ends_alone(card, demand, now, spared):
        return plan
    going = sorted(may_go(card, spared), key=lambda each: each.last_used or -math.inf)
    victims = tuple(each for each in going if not demand.spares(each))
    return replace(plan, victims=victims, attempt=True)


def _trims(
    card: Card, demand: Demand, now: Balance, plan: Plan, spared: Set[str]
) -> tuple[Resident, ...]:
    """Those to be trimmed, before anybody goes for `demand`."""
    missing_mib = demand.missing_mib - now.free_mib + card.reserved_mib
    chosen = trims(demand, _spared(card, spared), missing_mib)
    gives_mib = sum(each.trim_mib for each in chosen)
    if gives_mib >= missing_mib or plan.attempt:
        return chosen
    # Before a refusal: with all that may go, they may be enough.
    return chosen if plan.in_vain and gives_mib >= plan.short_mib else ()


def _spared(card: Card, spared: Set[str]) -> list[Resident]:
    """All but those."""
    return [
        each.resident
        for name, each in card.standings.items()
        if spared.isdisjoint((name, each.resident.consumer))
    ]


def _leaking(card: Card, target: str, plan: Plan, spared: Set[str]) -> Resident | None:
    """The target itself, if it is to be unloaded before its own job."""
    standing = card.standing(target)
    own, leaked_mib = standing.resident, standing.leaked_mib
    helps = plan.attempt or (plan.in_vain and plan.short_mib <= leaked_mib)
    may_go = own.evictable and spared.isdisjoint((own.name, own.consumer))
    return own if leaked_mib and helps and may_go else None


def _residents(card: Card, spared: Set[str], *, hopeful: bool = False) -> list[Resident]:
    return [
        _as(
            each.resident,
            each.resident.evictable and spared.isdisjoint((name, each.resident.consumer)),
            each.hoped_floor_mib if hopeful else each.resident.floor_mib,
        )
        for name, each in card.standings.items()
    ]


def _as(resident: Resident, evictable: bool, floor_mib: int) -> Resident:
    if (resident.evictable, resident.floor_mib) == (evictable, floor_mib):
        return resident
    return replace(resident, evictable=evictable, floor_mib=floor_mib)


def _with_luck(card: Card, name: str, demand: Demand, spared: Set[str]) -> bool:
    """Whether there would be room, if all that is assumed were in favour of the target, and what is
    declared were all that it needs."""
    target, now = card.standing(name), card.lucky_balance(name)
    lucky = replace(
        demand,
        needed_mib=min(demand.needed_mib, target.declared_mib),
        held_mib=target.lucky_surely_mib,
    )
    available_mib = now.free_mib - card.reserved_mib
    others = [
        each.lucky
        for name, each in card.standings.items()
        if spared.isdisjoint((name, each.resident.consumer))
    ]
    return (
        now.source == "unknown"
        or fits(lucky, available_mib)
        or lucky.missing_mib - available_mib <= yields_mib(lucky, others)
    )


def _ends_alone(card: Card, demand: Demand, now: Balance, spared: Set[str]) -> bool:
    """Whether nobody but the target and a desktop would be left on the card, once all that may
    go have gone."""
    own = parts_of(demand.name)[0]
    others = [
        each
        for each in _residents(card, spared, hopeful=True)
        if each.consumer != own or not demand.spares(each)
    ]
    going = {each.name for each in candidates(others)}
    left = [each.floor_mib if each.name in going else each.held_mib for each in others]
    known = sum(each.resident.held_mib for each in card.standings.values())
    desktop = max(DESKTOP_MIB, now.total_mib // DESKTOP_SHARE)
    return all(mib <= CONTEXT_MIB for mib in left) and (
        card.reading is None or now.used_mib - known <= desktop
    )
