"""Samples the card's memory into the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gpumanager.clock import Clock
from gpumanager.consumers.footprint import Seen
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.gpu.device import GpuMemory, GpuUnavailable
from gpumanager.gpu.inventory import keeps_mib
from gpumanager.model import (
    CONTEXT_MIB,
    ConsumerState,
    GpuState,
    Growth,
    MemoryReading,
    model_key,
    resident_name,
)
from gpumanager.telemetry import events

BUSY_INTERVAL_S = 0.5
"""While a job runs its consumer's peak is looked for, so samples are taken at least so often."""


class Sampler:
    """`sample` is the body of a periodic worker; `interval` in seconds. `look` is for those who
    have to know now, from any thread."""

    def __init__(
        self,
        memory: GpuMemory,
        registry: Registry,
        learned: Learned,
        clock: Clock,
        emit: events.Emit,
        *,
        interval: float,
    ) -> None:
        self._memory = memory
        self._registry = registry
        self._learned = learned
        self._clock = clock
        self._emit = emit
        self._interval = interval

    def look(self) -> MemoryReading | None:
        """Take one sample now; None where the card cannot be measured."""
        known, asked_at = self._registry.now, self._clock.monotonic()
        before = known.gpu
        try:
            reading = self._memory.read()
        except GpuUnavailable as error:
            # The last good reading is put aside: nobody may take it for the present.
            last = before.last if before.reading is None else before.reading
            after = replace(before, reading=None, err=str(error), last=last)
        else:
            # What it shows was so then, or later: a reading from before an eviction must not look
            # younger than it.
            after = GpuState(reading, asked_at, reading.fault or "")
        self._learn(after.reading, known.states)
        self._registry.set_gpu(after)
        if after.err != before.err:
            lost = events.GpuUnavailable(reason=after.err) if after.err else None
            self._emit(lost or events.GpuAvailable())
        return after.reading

    def sample(self) -> float:
        """Take one sample; returns the seconds until the next."""
        self.look()
        if any(state.active for state in self._registry.now.states.values()):
            return min(self._interval, BUSY_INTERVAL_S)
        return self._interval

    def _learn(self, reading: MemoryReading | None, before: Mapping[str, ConsumerState]) -> None:
        """What loaded consumers hold is a lower bound of what they need, what unloaded ones hold
        an upper bound of what they keep; and one that did not release its memory in time, but
        most of it since, may be asked again. `before` is how they were before the reading."""
        self._learned.forget_the_old()
        for name, seen in self._registry.now.states.items():
            mib, state = None if reading is None else reading.measured_mib(name), seen
            if name in before and before[name].residency_version == state.residency_version:
                state = replace(state, growth=self._watch_growth(name, state, mib))
            if state.on_cpu:
                self._learned.spilled(name)
            else:
                self._learn_held(name, state, reading)
            known = before.get(name)
            if known is not None and known.residency_version == state.residency_version:
                # Else a reading from before an unload could be taken for the next job's.
                self._learn_of_models(name, state, mib)
            if mib is None:
                continue
            if state.assumed is not None and mib > CONTEXT_MIB:
                self._registry.confirm(name)
            if (
                not state.loaded
                and not state.active
                and not state.busy
                and state.stopped_by is None
            ):
                self._learned.kept(name, mib, self._clock.monotonic())
            if state.quarantine and mib <= state.quarantine_mib:
                self._registry.release(name)

    def _watch_growth(self, name: str, state: ConsumerState, mib: int | None) -> Growth:
        """Between its jobs: whether what it holds grows with them. Returns what is so now."""
        measured = mib is not None  # its own figure is another one: the two cannot be compared
        if mib is None and not state.report_outdated:
            # That it holds nothing after an unload is only taken for granted.
            surely = state.loaded or state.stopped_by is not None
            mib = state.resident_mib if surely else state.resident_mib or None
        if state.active or state.busy or state.on_cpu or mib is None:
            return state.growth
        growths, at, jobs = (
            self._learned.growths,
            self._clock.now().timestamp(),
            state.total_requests,
        )
        if state.loaded:
            what = measured, frozenset(state.items)
            was, now = growths.at_rest(name, mib, jobs, at, what)
        else:
            was, now = growths.unloaded(name, mib, jobs, at)
        self._registry.note_growth(name, now)
        if now.verdict == "leaks" and (was.verdict, was.over) != (now.verdict, now.over):
            if now.over == "jobs":
                self._learned.leaks(name)
            self._emit(
                events.Leaking(
                    consumer=name,
                    over=now.over or "jobs",
                    each_mib=round(now.mib_per_job) if now.over == "jobs" else now.mib_per_load,
                    grown_mib=now.grown_mib,
                )
            )
        return now

    def _learn_held(self, name: str, state: ConsumerState, reading: MemoryReading | None) -> None:
        if not state.loaded:
            return
        mib, working = None if reading is None else reading.measured_mib(name), state.active > 0
        if mib is None:
            if state.resident_mib and not state.report_outdated and not working:
                self._learned.held(name, state.resident_mib, "reported", working=False)
        elif mib or (working and not _hides_a_model(reading)):
            # At work and holding nothing here: it is on another card, or on the CPU.
            # What it has leaked is not what its jobs need: it would be back after an unload.
            needed = max(0, mib - state.growth.leaked_mib)
            self._learned.held(name, needed, working=working)

    def _learn_of_models(self, name: str, state: ConsumerState, mib: int | None) -> None:
        """What the job's model needs: its share of what its consumer holds, or all of that where
        the consumer does not tell its models apart."""
        snapshot = self._registry.now
        consumer = snapshot.config.consumers.get(name)
        if consumer is None or not consumer.counts_by_model:
            return
        held = {} if mib is None or state.at_work is None else {state.at_work: mib}
        if consumer.tells_models_apart:
            if mib is not None:
                state = self._registry.measured(name, mib, keeps_mib(snapshot, name))
            held = _held_by_models(state, mib)
        for model, share in held.items():
            resident, working = resident_name(name, model), state.model(model).active > 0
            on_cpu = model in map(model_key, state.on_cpu)
            if share and not on_cpu and (working or not state.active):
                source: Seen = "reported" if mib is None else "measured"
                needed = max(0, share - state.growth.leaked_mib)
                self._learned.held(resident, needed, source, working=working)


def _held_by_models(state: ConsumerState, mib: int | None) -> dict[str, int]:
    """What is known of it: of the model that works, or at rest of the one that did last; nothing
    while memory of another one may be on its way back."""
    models = {name: each for name, each in state.models.items() if each.loaded}
    if any(each.unloaded_at is not None for each in state.models.values()) or not models:
        return {}
    if mib is None:
        return {} if state.active else {n: each.reported_mib or 0 for n, each in models.items()}
    last = state.at_work or max(models, key=lambda name: models[name].last_used or 0.0)
    return {last: models[last].held_mib} if last in models else {}


def _hides_a_model(reading: MemoryReading | None) -> bool:
    """Whether a process that is nobody's holds enough to be one of a consumer that shows none."""
    foreign = () if reading is None or reading.holdings is None else reading.holdings.foreign
    return any(process.mib > CONTEXT_MIB for process in foreign)
