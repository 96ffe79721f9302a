"""Who holds what of the card, who could go, and what each one needs: drawn up as plain data for
the decisions, from one snapshot. Makes no calls."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from statistics import mean, median

from gpumanager.config import ConsumerConfig, EvictionMethod
from gpumanager.consumers.growth import tolerance
from gpumanager.consumers.learning import Figures, Times
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.gpu.accounting import Balance, Held
from gpumanager.gpu.inventory import (
    believable,
    holder,
    holders,
    impossible,
    keeps_mib,
    left,
    model_shares,
)
from gpumanager.model import ConsumerState, Job, ModelState, parts_of, resident_name
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
    """Counts the consumers of one snapshot, and their models, at `now`, in monotonic seconds, for a
    job, if that is given. While there is no reading of the card, the latest of before helps. All
    are called by the names that residents have."""

    def __init__(self, snapshot: Snapshot, now: float, job: Job | None = None) -> None:
        self.snapshot = snapshot
        self._now = now
        self._job = job
        self._shares = {name: model_shares(snapshot, name) for name in snapshot.consumers}

    def needed(self, name: str, now: Balance) -> int:
        """MiB that a consumer, or a model, needs to be resident and work; what was only learned is
        no more than the card has."""
        declared_mib = self._declared_mib(name)
        context = self._job.context if self._job and self._job.resident == name else None
        needed = self.snapshot.needed(name, context).mib
        if needed <= declared_mib or not now.total_mib:
            return needed
        return max(declared_mib, min(needed, now.total_mib - self.snapshot.config.gpu.reserved_mib))

    def _declared_mib(self, name: str) -> int:
        owner, model = parts_of(name)
        consumer = self.snapshot.consumers[owner]
        declared = consumer.declared_for(model)
        return consumer.vram_resident_mib if declared is None else declared.mib

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
        standings = {each.name: self._standing(each, now) for each in self.residents()}
        return Card(
            standings,
            snapshot.gpu.reading,
            snapshot.gpu.last,
            snapshot.config.gpu.total_mib,
            snapshot.config.gpu.reserved_mib,
            snapshot.config.eviction,
            self._now,
            {name: self.needed(name, now) for name in self._without_standing(standings)},
        )

    def _without_standing(self, known: Container[str]) -> Iterator[str]:
        """The models that do not stand for themselves, but are known to need something."""
        wanted = () if self._job is None else (self._job.resident,)
        for name in (*wanted, *self.snapshot.learned):
            owner, model = parts_of(name)
            if model is not None and name not in known and owner in self.snapshot.consumers:
                yield name

    def _standing(self, resident: Resident, now: Balance) -> Standing:
        snapshot, name = self.snapshot, resident.name
        owner, model = parts_of(name)
        if model is not None:
            return self._model_standing(resident, snapshot.states[owner].model(model), now)
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
        held_mib -= sum(self._shares[name].values())
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
            0 if state.active or self._shares[name] else state.growth.leaked_mib,
        )

    def _model_standing(self, resident: Resident, state: ModelState, now: Balance) -> Standing:
        demand = self.demand(resident.name, now)
        lucky = resident if state.sure else replace(resident, loaded=False, held_mib=0)
        return Standing(
            resident,
            demand,
            self._surely_needed_mib(resident.name),
            resident.floor_mib,
            lucky,
            resident.held_mib,
        )

    def _surely_needed_mib(self, name: str) -> int:
        """What a model is refused for, where there is no room for it: what is declared of it, else
        of its consumer. That is meant for the consumer's largest model: one that nothing was
        learned of needs no more than its consumer lists as its size, and what its consumer holds
        of it already, for other models, is not asked for twice."""
        owner, model = parts_of(name)
        declared_mib, shares = self._declared_mib(name), self._shares[owner]
        if self.snapshot.consumers[owner].declared_for(model) is not None:
            return declared_mib
        if not self.snapshot.figures(name).needs.nothing:
            return declared_mib
        listed_mib = self.snapshot.listed_mib(owner, model)
        if listed_mib is not None:
            return min(declared_mib, listed_mib)
        return max(0, declared_mib - sum(mib for other, mib in shares.items() if other != model))

    def _supposing(self, name: str, state: ConsumerState) -> Census:
        """The same, with another state of one consumer."""
        states = {**self.snapshot.states, name: state}
        return Census(self.snapshot.supposing(states), self._now)

    def _is_coming(self, state: ConsumerState) -> bool:
        models = (each.unloaded_at is not None for each in state.models.values())
        return (state.is_releasing(self._now) or any(models)) and not state.quarantine

    def _is_late(self, state: ConsumerState) -> bool:
        since = state.unloaded_at
        late = since is not None and self._now - since < LATE_S
        return late and bool(state.quarantine) and state.leaks == 1

    def demand(self, name: str, now: Balance) -> Demand:
        """What a job of a consumer, or with a model of it, needs."""
        owner, model = parts_of(name)
        spared = frozenset(self.snapshot.consumers[owner].can_coexist_with)
        if model is None:
            surely_mib = holder(self.snapshot, name, self._now).surely_mib
        else:
            state = self.snapshot.states[owner]
            surely_mib = self._shares[owner].get(model, 0) if state.model(model).sure else 0
            surely_mib = max(0, surely_mib - state.growth.leaked_mib)
        return Demand(name, self.needed(name, now), surely_mib, spared)

    def outlook(self, doing: Doing | None = None) -> Outlook:
        """What estimates are made of; `doing` is what goes on for the holder of the GPU."""
        balance, config = self.balance(), self.snapshot.config
        residents = self.residents()
        figures = {each.name: self.snapshot.figures(each.name) for each in residents}
        runs = [
            times.mean
            for name in config.consumers
            if (times := self.snapshot.figures(name).run_s) is not None
        ]
        usual = guess(mean(runs)) if runs else RUN
        return Outlook(
            profiles={
                resident.name: self._profile(
                    resident,
                    self.demand(resident.name, balance),
                    self.snapshot.states[resident.consumer],
                    figures[resident.name],
                    usual,
                )
                for resident in residents
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
            running_since=state.last_used if _works(resident.name, state) else None,
            runs_cold=state.cold,
        )

    def residents(self, *, hopeful: bool = False) -> list[Resident]:
        """All consumers as the choice of victims sees them. `hopeful` takes none to keep anything
        but what is declared."""
        names = [
            name
            for consumer in self.snapshot.consumers
            for name in (consumer, *(resident_name(consumer, it) for it in self._models(consumer)))
        ]
        seen = {
            name: max(LEAST_RELOAD_S, times.p50)
            for name in names
            if (times := self.snapshot.figures(name).load_s) is not None
        }
        guess = median(seen.values()) if seen else RELOAD_S
        return [
            self.resident(
                name, hopeful=hopeful, reload_s=seen.get(name, seen.get(parts_of(name)[0], guess))
            )
            for name in names
        ]

    def _models(self, consumer: str) -> Iterable[str]:
        """Those that stand for themselves: of those that are not loaded, the job's, and those that
        are known to need something."""
        snapshot, job = self.snapshot, self._job
        known = dict.fromkeys(snapshot.models(consumer))
        if job is not None and job.consumer == consumer and job.model is not None:
            state = snapshot.states[consumer]
            told = snapshot.consumers[consumer].tells_models_apart
            if told and (state.loaded_models or not state.loaded):
                known[job.model] = None
        return known

    def resident(
        self,
        name: str,
        *,
        hopeful: bool = False,
        reload_s: float = 0.0,
    ) -> Resident:
        """The consumer or model of this name, as the decision sees it. A consumer whose models are
        known is what is none of theirs: that cannot go."""
        owner, model = parts_of(name)
        consumer, state = self.snapshot.consumers[owner], self.snapshot.states[owner]
        shares = self._shares[owner]
        if model is not None:
            known = state.model(model)
            return Resident(
                name=name,
                loaded=known.loaded,
                held_mib=shares.get(model, 0),
                last_used=known.last_used,
                priority=consumer.priority,
                evictable=_evictable(consumer, state) and not consumer.pins(model, known.pinned),
                reload_s=reload_s,
                unknown=known.loaded and not shares.get(model) and self._is_guessed(owner),
            )
        if not shares:
            return self.whole(name, hopeful=hopeful, reload_s=reload_s)
        held_mib = holder(self.snapshot, name, self._now).mib
        left_mib = max(0, held_mib - sum(shares.values()))
        return Resident(
            name=name,
            loaded=False,
            held_mib=left_mib,
            evictable=False,
            floor_mib=left_mib,
            reload_s=reload_s,
            trim_mib=self._trim_mib(name),
        )

    def whole(self, name: str, *, hopeful: bool = False, reload_s: float = 0.0) -> Resident:
        """A consumer with all its models."""
        consumer, state = self.snapshot.consumers[name], self.snapshot.states[name]
        held = holder(self.snapshot, name, self._now)
        return Resident(
            name=name,
            loaded=state.loaded,
            held_mib=held.mib,
            last_used=state.last_used,
            priority=consumer.priority,
            evictable=_evictable(consumer, state),
            floor_mib=_floor(consumer, state, self.snapshot.figures(name), hopeful=hopeful),
            reload_s=reload_s,
            trim_mib=self._trim_mib(name),
            unknown=state.loaded and not held.mib and held.source == "declared",
        )

    def _is_guessed(self, name: str) -> bool:
        """Whether what a consumer holds is neither measured nor told by itself."""
        return holder(self.snapshot, name, self._now).source == "declared"

    def _trim_mib(self, name: str) -> int:
        """What a consumer gives back while it stays loaded, with all its models."""
        consumer, state = self.snapshot.consumers[name], self.snapshot.states[name]
        return _trim_mib(consumer, state, holder(self.snapshot, name, self._now))


def _works(name: str, state: ConsumerState) -> bool:
    model = parts_of(name)[1]
    return state.active > 0 if model is None else state.model(model).active > 0


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


def _trim_mib(consumer: ConsumerConfig, state: ConsumerState, holds: Held) -> int:
    """What it gives back while it stays loaded. One that leaks gives what it does by an unload, and
    one that manages its memory itself is left alone."""
    growth = state.growth
    asks = consumer.trim is not None and not consumer.vram_managed
    at_rest = state.loaded and state.assumed is None and not state.active and not state.busy
    if not asks or not at_rest or growth.trims_to_mib is None or growth.verdict == "leaks":
        return 0
    gives_mib = holds.mib - growth.trims_to_mib
    return gives_mib if holds.source != "declared" and gives_mib > tolerance(holds.mib) else 0


def _floor(
    consumer: ConsumerConfig, state: ConsumerState, figures: Figures, *, hopeful: bool
) -> int:
    """What it keeps after an unload: as declared, else as was seen. One that is unloaded already
    gives back nothing of what it has kept since."""
    floor = 0 if hopeful else figures.residue_mib or 0
    if consumer.floor_mib is not None:
        floor = consumer.floor_mib
    return floor if state.loaded else max(floor, figures.kept_mib or 0)
