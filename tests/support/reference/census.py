"""Who holds what of the card, who could go, and what each one needs: drawn up as plain data for
the decisions, from one snapshot. Makes no calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from math import inf
from statistics import median

from gpumanager.config import ConsumerConfig, EvictionMethod
from gpumanager.consumers.learning import Figures
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.gpu.accounting import Balance, Held
from gpumanager.gpu.inventory import believable, holder, holders, impossible, keeps_mib, left
from gpumanager.model import CONTEXT_MIB, ConsumerState
from gpumanager.scheduling.victims import Demand, Plan, Resident
from tests.support.reference.victims import candidates, plan_eviction

RELOAD_S = 5.0
"""Taken for the time to load a consumer that was never seen to load, where nobody was."""

LEAST_RELOAD_S = 1.0
"""Loads that take less than this cost the same: what they differ by is chance."""

DESKTOP_MIB = 1024
DESKTOP_SHARE = 8
"""What is nobody's, and no more than the first, or than one part in the second of the card, is
taken for a desktop: it does not keep a job that is otherwise alone from being tried."""


LATE_S = 30.0
"""So long after an unload memory may still come back of one that never was so late before."""


@dataclass(frozen=True, slots=True)
class Look:
    """What follows for a target from what the census has counted.
    `coming_mib` is what was unloaded lately and is still held; `late_mib` what is overdue of it, of
    those that are in quarantine for the first time because of that."""

    census: Census
    target: str
    plan: Plan
    needed_mib: int
    held_mib: int
    balance: Balance
    coming_mib: int = 0
    late_mib: int = 0

    @property
    def _short_mib(self) -> int:
        return self.plan.short_mib or self.needed_mib - self.held_mib - self.balance.free_mib

    @property
    def may_come_late(self) -> bool:
        """Whether there would be room, if what is overdue came back after all."""
        return (self.plan.attempt or self.plan.in_vain) and 0 < self._short_mib <= self.late_mib

    @property
    def worth_waiting(self) -> bool:
        """Whether there may be room without an eviction, or a risk, once the memory is back that is
        on its way."""
        if not self.coming_mib:
            return False
        enough = self.coming_mib >= self._short_mib
        return self.plan.attempt or self.plan.in_vain or enough


class Census:
    """Counts the consumers of one snapshot at `now`, in monotonic seconds. While there is no
    reading of the card, the latest of before helps."""

    def __init__(self, snapshot: Snapshot, now: float) -> None:
        self.snapshot = snapshot
        self._now = now

    def needed(self, name: str, now: Balance) -> int:
        """MiB that a consumer needs to be resident and work; what was only learned is no more
        than the card has."""
        declared = self.snapshot.consumers[name].declared
        needed = self.snapshot.needed(name).mib
        if needed <= declared.mib or not now.total_mib:
            return needed
        return max(declared.mib, min(needed, now.total_mib - self.snapshot.config.gpu.reserved_mib))

    def held(self) -> dict[str, Held]:
        """What each consumer holds."""
        return holders(self.snapshot, self._now)

    def balance(self, target: str | None = None) -> Balance:
        """How much of the card is free; for the next job of `target`, if that is given: what it
        may hold, but not surely, is not in its own way."""
        return left(self.snapshot, self.held(), target)

    def impossible(self, target: str) -> list[str]:
        """While the card cannot be read: the consumers that are assumed to be loaded and cannot be,
        since those that surely are leave no room for them; and `target`, if all the assumptions
        cannot be true at once. That one is about to be loaded anyway; what is assumed of others may
        make room scarcer, never plentier."""
        found = impossible(self.snapshot)
        if believable(self.snapshot) is not self.snapshot:
            found.append(target)
        return found

    def plan(self, target: str, tried: Set[str], queue: Sequence[str] = ()) -> Look:
        """What making room for the next job of `target` takes. Those in `tried` may not go;
        `queue` is whose jobs wait behind it.

        A guess may cost an eviction, never a refusal: where the room would not be enough even
        without all that may go, but would be if what is only assumed turns out well, and what
        is declared is all that is needed, they all go, and the job is tried. So is one that will
        be alone on the card then.
        """
        look = self._plan(target, tried, queue)
        if not look.plan.in_vain:
            return look
        # What was seen to stay once may come back this time.
        again = self._plan(target, tried, queue, hopeful=True)
        if not again.plan.in_vain:
            return again
        lucky = Census(_hopeful(self.snapshot, target), self._now)
        best = lucky._plan(target, tried, queue, hopeful=True, declared=True)
        if best.plan.in_vain and not self._ends_alone(look, tried):
            return look
        spared = {target, *self.snapshot.consumers[target].can_coexist_with}
        may_go = tuple(
            each
            for each in sorted(
                candidates(self.residents(tried)),
                key=lambda each: each.last_used or -inf,
            )
            if each.name not in spared
        )
        return replace(look, plan=replace(look.plan, victims=may_go, attempt=True))

    def _plan(
        self,
        target: str,
        tried: Set[str],
        queue: Sequence[str],
        *,
        hopeful: bool = False,
        declared: bool = False,
    ) -> Look:
        config = self.snapshot.config
        balance = self.balance(target)
        demand = self.demand(target, balance)
        if declared:
            most = config.consumers[target].vram_resident_mib
            demand = replace(demand, needed_mib=min(demand.needed_mib, most))
        if balance.source == "unknown":
            plan = Plan(fits=True)
        else:
            waiting = {
                name: self.demand(name, balance)
                for name in dict.fromkeys(queue)
                if name in config.consumers  # a reload may have taken it away
            }
            plan = plan_eviction(
                demand,
                self.residents(tried, hopeful=hopeful),
                balance.free_mib - config.gpu.reserved_mib,
                order=config.eviction,
                now=self._now,
                upcoming=[waiting[name] for name in queue if name in waiting],
            )
        coming, late = self._coming_mib(self._is_coming), self._coming_mib(self._is_late)
        return Look(self, target, plan, demand.needed_mib, demand.held_mib, balance, coming, late)

    def _coming_mib(self, counts: Callable[[ConsumerState], bool]) -> int:
        """What was unloaded lately, and is still held, as far as that is measured."""
        reading = self.snapshot.gpu.reading
        if reading is None:
            return 0
        return sum(
            max(0, (reading.measured_mib(name) or 0) - keeps_mib(self.snapshot, name))
            for name in self.snapshot.consumers
            if counts(self.snapshot.states[name])
        )

    def _is_coming(self, state: ConsumerState) -> bool:
        return state.is_releasing(self._now) and not state.quarantine

    def _is_late(self, state: ConsumerState) -> bool:
        since = state.unloaded_at
        late = since is not None and self._now - since < LATE_S
        return late and bool(state.quarantine) and state.leaks == 1

    def demand(self, name: str, now: Balance) -> Demand:
        """What a job of a consumer needs."""
        spared = frozenset(self.snapshot.consumers[name].can_coexist_with)
        own = holder(self.snapshot, name, self._now)
        return Demand(name, self.needed(name, now), own.surely_mib, spared)

    def _ends_alone(self, look: Look, tried: Set[str]) -> bool:
        """Whether nobody but the target and a desktop would be left on the card, once all that may
        go have gone."""
        residents = self.residents(tried, hopeful=True)
        others = [each for each in residents if each.name != look.target]
        going = {each.name for each in candidates(others)}
        left = [each.floor_mib if each.name in going else each.held_mib for each in others]
        known = sum(each.mib for each in self.held().values())
        desktop = max(DESKTOP_MIB, look.balance.total_mib // DESKTOP_SHARE)
        return all(mib <= CONTEXT_MIB for mib in left) and (
            self.snapshot.gpu.reading is None or look.balance.used_mib - known <= desktop
        )

    def residents(self, tried: Set[str] = frozenset(), *, hopeful: bool = False) -> list[Resident]:
        """All consumers as the choice of victims sees them. Those in `tried` may not go;
        `hopeful` takes none to keep anything but what is declared."""
        seen = {
            name: max(LEAST_RELOAD_S, times.p50)
            for name in self.snapshot.consumers
            if (times := self.snapshot.figures(name).load_s) is not None
        }
        guess = median(seen.values()) if seen else RELOAD_S
        return [
            self.resident(name, tried, hopeful=hopeful, reload_s=seen.get(name, guess))
            for name in self.snapshot.consumers
        ]

    def resident(
        self,
        name: str,
        tried: Set[str] = frozenset(),
        *,
        hopeful: bool = False,
        reload_s: float = 0.0,
    ) -> Resident:
        """One of them."""
        consumer, state = self.snapshot.consumers[name], self.snapshot.states[name]
        return Resident(
            name=name,
            loaded=state.loaded,
            held_mib=holder(self.snapshot, name, self._now).mib,
            last_used=state.last_used,
            priority=consumer.priority,
            evictable=_evictable(consumer, state) and name not in tried,
            floor_mib=_floor(consumer, state, self.snapshot.figures(name), hopeful=hopeful),
            reload_s=reload_s,
        )


def _hopeful(snapshot: Snapshot, target: str) -> Snapshot:
    """As if all that is assumed were in favour of `target`."""
    lucky = {
        name: state
        if state.assumed is None
        else replace(state, loaded=name == target, assumed=None)
        for name, state in snapshot.states.items()
    }
    return snapshot.supposing({**lucky, target: replace(lucky[target], unloaded_at=None)})


def usable(consumer: ConsumerConfig, state: ConsumerState) -> tuple[EvictionMethod, ...]:
    """The eviction methods that may give something back: one that says that it has nothing
    loaded has nothing to unload, whatever its process holds."""
    if state.loaded or not state.tells:
        return consumer.eviction_methods
    return tuple(method for method in consumer.eviction_methods if not method.http)


def _evictable(consumer: ConsumerConfig, state: ConsumerState) -> bool:
    return (
        bool(usable(consumer, state))
        and not consumer.vram_managed
        and not state.is_pinned(consumer.pinned)
        and not state.quarantine
    )


def _floor(
    consumer: ConsumerConfig, state: ConsumerState, figures: Figures, *, hopeful: bool
) -> int:
    """What it keeps after an unload: as declared, else as was seen. One that is unloaded already
    gives back nothing of what it has kept since."""
    floor = 0 if hopeful else figures.residue_mib or 0
    if consumer.floor_mib is not None:
        floor = consumer.floor_mib
    return floor if state.loaded else max(floor, figures.kept_mib or 0)
