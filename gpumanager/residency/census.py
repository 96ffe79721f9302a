"""Who holds what of the card, who could go, and what each one needs: drawn up as plain data for
the decisions, from the config, the registry and what was learned. Makes no calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import inf
from statistics import mean, median

from gpumanager.config import Config, ConsumerConfig, EvictionMethod
from gpumanager.consumers.learning import Figures, Learned, Times
from gpumanager.gpu.accounting import Balance, Held, balance, disproved, held, plausible
from gpumanager.model import CONTEXT_MIB, ConsumerState, MemoryReading
from gpumanager.scheduling.estimate import RUN, UNLOAD, Doing, Outlook, Profile, guess
from gpumanager.scheduling.victims import Demand, Plan, Resident, candidates, plan_eviction

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
    """The card and the consumers as of one moment, and what follows from them for a target.
    `coming_mib` is what was unloaded lately and is still held; `late_mib` what is overdue of it, of
    those that are in quarantine for the first time because of that."""

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
    """Counts the consumers at `now`, in monotonic seconds; each answer is as of the states and the
    reading it is given. While there is no reading, `last` is the latest of before."""

    def __init__(
        self, config: Config, learned: Learned, now: float, last: MemoryReading | None = None
    ) -> None:
        self._config = config
        self._learned = learned
        self._now = now
        self._last = last

    def needed(self, name: str, now: Balance) -> int:
        """MiB that a consumer needs to be resident and work; what was only learned is no more
        than the card has."""
        declared = self._config.consumers[name].declared
        needed = self._learned.needed(name, declared).mib
        if needed <= declared.mib or not now.total_mib:
            return needed
        return max(declared.mib, min(needed, now.total_mib - self._config.gpu.reserved_mib))

    def balance(
        self,
        states: Mapping[str, ConsumerState],
        reading: MemoryReading | None,
        target: str | None = None,
    ) -> Balance:
        """How much of the card is free; for the next job of `target`, if that is given: what it
        may hold, but not surely, is not in its own way."""
        mib = [
            each.surely_mib if name == target else each.mib
            for name, each in self.held(states, reading).items()
        ]
        return balance(reading, self._config.gpu.total_mib, mib, self._last)

    def impossible(self, states: Mapping[str, ConsumerState], target: str) -> list[str]:
        """By the ledger: the consumers that are assumed to be loaded and cannot be, since those
        that surely are leave no room for them; and `target`, if all the assumptions cannot be
        true at once. That one is about to be loaded anyway; what is assumed of others may make
        room scarcer, never plentier."""
        total = self._config.gpu.total_mib or (self._last.total_mib if self._last else 0)
        found = disproved(states, self._declared(), total)
        if plausible(states, self._declared(), None, total) is not states:
            found.append(target)
        return found

    def plan(
        self,
        target: str,
        states: Mapping[str, ConsumerState],
        reading: MemoryReading | None,
        tried: Set[str],
        queue: Sequence[str] = (),
    ) -> Look:
        """What making room for the next job of `target` takes. Those in `tried` may not go;
        `queue` is whose jobs wait behind it.

        A guess may cost an eviction, never a refusal: where the room would not be enough even
        without all that may go, but would be if what is only assumed turns out well, and what
        is declared is all that is needed, they all go, and the job is tried. So is one that will
        be alone on the card then.
        """
        look = self._plan(target, states, reading, tried, queue)
        if not look.plan.in_vain:
            return look
        # What was seen to stay once may come back this time.
        again = self._plan(target, states, reading, tried, queue, hopeful=True)
        if not again.plan.in_vain:
            return again
        luck = _hopeful(states, target)
        best = self._plan(target, luck, reading, tried, queue, hopeful=True, declared=True)
        if best.plan.in_vain and not self._ends_alone(look, states, reading, tried):
            return look
        spared = {target, *self._config.consumers[target].can_coexist_with}
        may_go = tuple(
            each
            for each in sorted(
                candidates(self.residents(states, reading, tried)),
                key=lambda each: each.last_used or -inf,
            )
            if each.name not in spared
        )
        return replace(look, plan=replace(look.plan, victims=may_go, attempt=True))

    def _plan(
        self,
        target: str,
        states: Mapping[str, ConsumerState],
        reading: MemoryReading | None,
        tried: Set[str],
        queue: Sequence[str],
        *,
        hopeful: bool = False,
        declared: bool = False,
    ) -> Look:
        balance = self.balance(states, reading, target)
        demand = self.demand(target, states[target], reading, balance)
        if declared:
            most = self._config.consumers[target].vram_resident_mib
            demand = replace(demand, needed_mib=min(demand.needed_mib, most))
        if balance.source == "unknown":
            plan = Plan(fits=True)
        else:
            waiting = {
                name: self.demand(name, states[name], reading, balance)
                for name in dict.fromkeys(queue)
                if name in self._config.consumers  # a reload may have taken it away
            }
            plan = plan_eviction(
                demand,
                self.residents(states, reading, tried, hopeful=hopeful),
                balance.free_mib - self._config.gpu.reserved_mib,
                order=self._config.eviction,
                now=self._now,
                upcoming=[waiting[name] for name in queue if name in waiting],
            )
        coming = self._coming_mib(states, reading, self._is_coming)
        late = self._coming_mib(states, reading, self._is_late)
        return Look(target, plan, demand.needed_mib, demand.held_mib, balance, coming, late)

    def _coming_mib(
        self,
        states: Mapping[str, ConsumerState],
        reading: MemoryReading | None,
        counts: Callable[[ConsumerState], bool],
    ) -> int:
        """What was unloaded lately, and is still held, as far as that is measured."""
        if reading is None:
            return 0
        return sum(
            max(0, (reading.measured_mib(name) or 0) - self._keeps(name))
            for name in self._config.consumers
            if counts(states[name])
        )

    def _is_coming(self, state: ConsumerState) -> bool:
        return state.is_releasing(self._now) and not state.quarantine

    def _is_late(self, state: ConsumerState) -> bool:
        since = state.unloaded_at
        late = since is not None and self._now - since < LATE_S
        return late and bool(state.quarantine) and state.leaks == 1

    def _keeps(self, name: str) -> int:
        """What a consumer keeps after an unload: as declared, else as was seen."""
        declared = self._config.consumers[name].floor_mib
        return (self._learned.figures(name).residue_mib or 0) if declared is None else declared

    def _held(self, name: str, state: ConsumerState, reading: MemoryReading | None) -> Held:
        return held(
            name,
            state,
            self._config.consumers[name].vram_resident_mib,
            reading,
            last=self._last,
            keeps_mib=self._keeps(name),
            now=self._now,
        )

    def demand(
        self, name: str, state: ConsumerState, reading: MemoryReading | None, now: Balance
    ) -> Demand:
        """What a job of a consumer needs."""
        consumer = self._config.consumers[name]
        own = self._held(name, state, reading)
        spared = frozenset(consumer.can_coexist_with)
        return Demand(name, self.needed(name, now), own.surely_mib, spared)

    def _ends_alone(
        self,
        look: Look,
        states: Mapping[str, ConsumerState],
        reading: MemoryReading | None,
        tried: Set[str],
    ) -> bool:
        """Whether nobody but the target and a desktop would be left on the card, once all that may
        go have gone."""
        residents = self.residents(states, reading, tried, hopeful=True)
        others = [each for each in residents if each.name != look.target]
        going = {each.name for each in candidates(others)}
        left = [each.floor_mib if each.name in going else each.held_mib for each in others]
        known = sum(each.mib for each in self.held(states, reading).values())
        desktop = max(DESKTOP_MIB, look.balance.total_mib // DESKTOP_SHARE)
        return all(mib <= CONTEXT_MIB for mib in left) and (
            reading is None or look.balance.used_mib - known <= desktop
        )

    def outlook(
        self,
        states: Mapping[str, ConsumerState],
        reading: MemoryReading | None,
        doing: Doing | None = None,
    ) -> Outlook:
        """What estimates are made of; `doing` is what goes on for the holder of the GPU."""
        balance = self.balance(states, reading)
        figures = {name: self._learned.figures(name) for name in self._config.consumers}
        runs = [each.run_s.mean for each in figures.values() if each.run_s is not None]
        usual = guess(mean(runs)) if runs else RUN
        return Outlook(
            profiles={
                resident.name: self._profile(
                    resident,
                    self.demand(resident.name, states[resident.name], reading, balance),
                    states[resident.name],
                    figures[resident.name],
                    usual,
                )
                for resident in self.residents(states, reading)
            },
            available_mib=None
            if balance.source == "unknown"
            else balance.free_mib - self._config.gpu.reserved_mib,
            order=self._config.eviction,
            doing=doing,
        )

    def _profile(
        self,
        resident: Resident,
        demand: Demand,
        state: ConsumerState,
        known: Figures,
        usual: Times,
    ) -> Profile:
        load = guess(resident.reload_s) if known.load_s is None else known.load_s
        run = usual if known.run_s is None else known.run_s
        if known.run_s is None and known.cold_s is not None:
            # Nobody can tell yet what of it was the load.
            load = guess(min(load.mean, known.cold_s.mean / 2))
            run = guess(known.cold_s.mean - load.mean)
        return Profile(
            resident,
            demand,
            run=run,
            cold=guess(load.mean + run.mean) if known.cold_s is None else known.cold_s,
            load=load,
            unload=UNLOAD if known.unload_s is None else known.unload_s,
            running_since=state.last_used if state.active else None,
            runs_cold=state.cold,
        )

    def _declared(self) -> dict[str, int]:
        return {name: each.vram_resident_mib for name, each in self._config.consumers.items()}

    def held(
        self, states: Mapping[str, ConsumerState], reading: MemoryReading | None
    ) -> dict[str, Held]:
        """What each consumer holds."""
        return {name: self._held(name, states[name], reading) for name in self._config.consumers}

    def residents(
        self,
        states: Mapping[str, ConsumerState],
        reading: MemoryReading | None,
        tried: Set[str] = frozenset(),
        *,
        hopeful: bool = False,
    ) -> list[Resident]:
        """All consumers as the choice of victims sees them. Those in `tried` may not go;
        `hopeful` takes none to keep anything but what is declared."""
        seen = {
            name: max(LEAST_RELOAD_S, times.p50)
            for name in self._config.consumers
            if (times := self._learned.figures(name).load_s) is not None
        }
        guess = median(seen.values()) if seen else RELOAD_S
        return [
            self.resident(
                name,
                states[name],
                reading,
                tried,
                hopeful=hopeful,
                reload_s=seen.get(name, guess),
            )
            for name in self._config.consumers
        ]

    def resident(
        self,
        name: str,
        state: ConsumerState,
        reading: MemoryReading | None,
        tried: Set[str] = frozenset(),
        *,
        hopeful: bool = False,
        reload_s: float = 0.0,
    ) -> Resident:
        """One of them."""
        consumer = self._config.consumers[name]
        figures = self._learned.figures(name)
        return Resident(
            name=name,
            loaded=state.loaded,
            held_mib=self._held(name, state, reading).mib,
            last_used=state.last_used,
            priority=consumer.priority,
            evictable=_evictable(consumer, state) and name not in tried,
            floor_mib=_floor(consumer, state, figures, hopeful=hopeful),
            reload_s=reload_s,
        )


def _hopeful(states: Mapping[str, ConsumerState], target: str) -> Mapping[str, ConsumerState]:
    """As if all that is assumed were in favour of `target`."""
    lucky = {
        name: state
        if state.assumed is None
        else replace(state, loaded=name == target, assumed=None)
        for name, state in states.items()
    }
    return {**lucky, target: replace(lucky[target], unloaded_at=None)}


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
