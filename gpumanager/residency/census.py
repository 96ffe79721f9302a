"""Who holds what of the card, who could go, and what each one needs: drawn up as plain data for
the decisions, from one snapshot. Makes no calls."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean, median

from gpumanager.config import ConsumerConfig, EvictionMethod
from gpumanager.consumers.learning import Figures, Times
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.gpu.accounting import Balance, Held
from gpumanager.gpu.inventory import believable, holder, holders, impossible, keeps_mib, left
from gpumanager.model import ConsumerState
from gpumanager.scheduling.estimate import RUN, UNLOAD, Doing, Outlook, Profile, guess
from gpumanager.scheduling.memory import Card, Standing
from gpumanager.scheduling.victims import Demand, Resident

RELOAD_S = 5.0
"""Taken for the time to load a consumer that was never seen to load, where nobody was."""

LEAST_RELOAD_S = 1.0
"""Loads that take less than this cost the same: what they differ by is chance."""

LATE_S = 30.0
"""So long after an unload memory may still come back of one that never was so late before."""


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

    def balance(self) -> Balance:
        """How much of the card is free."""
        return left(self.snapshot, self.held())

    def impossible(self, target: str) -> list[str]:
        """While the card cannot be read: the consumers that are assumed to be loaded and cannot be,
        since those that surely are leave no room for them; and `target`, if all the assumptions
        cannot be true at once. That one is about to be loaded anyway; what is assumed of others may
        make room scarcer, never plentier."""
        found = impossible(self.snapshot)
        if believable(self.snapshot) is not self.snapshot:
            found.append(target)
        return found

    def card(self) -> Card:
        """All that is decided by memory."""
        snapshot, now = self.snapshot, self.balance()
        return Card(
            {resident.name: self._standing(resident, now) for resident in self.residents()},
            snapshot.gpu.reading,
            snapshot.gpu.last,
            snapshot.config.gpu.total_mib,
            snapshot.config.gpu.reserved_mib,
            snapshot.config.eviction,
            self._now,
        )

    def _standing(self, resident: Resident, now: Balance) -> Standing:
        snapshot, name = self.snapshot, resident.name
        consumer, state = snapshot.consumers[name], snapshot.states[name]
        demand = self.demand(name, now)
        hoped_floor_mib = _floor(consumer, state, snapshot.figures(name), hopeful=True)
        lucky = replace(resident, floor_mib=hoped_floor_mib)
        lucky_surely_mib = demand.held_mib
        if state.assumed is not None:
            others = self._supposing(name, replace(state, loaded=False, assumed=None))
            lucky = others.resident(name, hopeful=True, reload_s=resident.reload_s)
        if state.assumed is not None or state.unloaded_at is not None:
            loaded = state.loaded or state.assumed is not None
            own = replace(state, loaded=loaded, assumed=None, unloaded_at=None)
            lucky_surely_mib = holder(
                self._supposing(name, own).snapshot, name, self._now
            ).surely_mib
        reading = snapshot.gpu.reading
        held_mib = 0 if reading is None else reading.measured_mib(name) or 0
        still_mib = max(0, held_mib - keeps_mib(snapshot, name))
        return Standing(
            resident,
            demand,
            consumer.vram_resident_mib,
            hoped_floor_mib,
            lucky,
            lucky_surely_mib,
            still_mib if self._is_coming(state) else 0,
            still_mib if self._is_late(state) else 0,
        )

    def _supposing(self, name: str, state: ConsumerState) -> Census:
        """The same, with another state of one consumer."""
        states = {**self.snapshot.states, name: state}
        return Census(self.snapshot.supposing(states), self._now)

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

    def outlook(self, doing: Doing | None = None) -> Outlook:
        """What estimates are made of; `doing` is what goes on for the holder of the GPU."""
        balance, config = self.balance(), self.snapshot.config
        figures = {name: self.snapshot.figures(name) for name in config.consumers}
        runs = [each.run_s.mean for each in figures.values() if each.run_s is not None]
        usual = guess(mean(runs)) if runs else RUN
        return Outlook(
            profiles={
                resident.name: self._profile(
                    resident,
                    self.demand(resident.name, balance),
                    self.snapshot.states[resident.name],
                    figures[resident.name],
                    usual,
                )
                for resident in self.residents()
            },
            available_mib=None
            if balance.source == "unknown"
            else balance.free_mib - config.gpu.reserved_mib,
            order=config.eviction,
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

    def residents(self, *, hopeful: bool = False) -> list[Resident]:
        """All consumers as the choice of victims sees them. `hopeful` takes none to keep anything
        but what is declared."""
        seen = {
            name: max(LEAST_RELOAD_S, times.p50)
            for name in self.snapshot.consumers
            if (times := self.snapshot.figures(name).load_s) is not None
        }
        guess = median(seen.values()) if seen else RELOAD_S
        return [
            self.resident(name, hopeful=hopeful, reload_s=seen.get(name, guess))
            for name in self.snapshot.consumers
        ]

    def resident(
        self,
        name: str,
        *,
        hopeful: bool = False,
        reload_s: float = 0.0,
    ) -> Resident:
        """The consumer of this name, as the decision sees it."""
        consumer, state = self.snapshot.consumers[name], self.snapshot.states[name]
        return Resident(
            name=name,
            loaded=state.loaded,
            held_mib=holder(self.snapshot, name, self._now).mib,
            last_used=state.last_used,
            priority=consumer.priority,
            evictable=_evictable(consumer, state),
            floor_mib=_floor(consumer, state, self.snapshot.figures(name), hopeful=hopeful),
            reload_s=reload_s,
        )


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
