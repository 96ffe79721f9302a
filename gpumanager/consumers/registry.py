"""What the broker knows at the moment, and the one lock of all who change it.

Writers put a whole new snapshot in the place of the one before. Readers take `Registry.now`, once
for each thing they do, without a lock: what they hold is of one moment and never changes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from gpumanager.clock import Clock
from gpumanager.config import Config, ConsumerConfig
from gpumanager.consumers import shares, transitions
from gpumanager.consumers.learning import Figures
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.errors import NoConsumer
from gpumanager.model import (
    CONTEXT_MIB,
    ConsumerState,
    GpuState,
    Growth,
    ModelListing,
    ProbeReport,
    StoppedBy,
)

_UNKNOWN = ConsumerState(loaded=False)


class InUse(Exception):
    """A consumer cannot be taken out of the config or moved: somebody works with it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"consumer {name} is in use")
        self.name = name


def assumed_loaded(consumer: ConsumerConfig) -> bool:
    """Whether to take a consumer for loaded before it has told: yes, unless it can only be
    unloaded, which is how servers that load with their first job look."""
    return consumer.unload is None or consumer.load is not None


class Registry:
    """Holds the snapshot in force, `now`. Safe from any thread.

    `assumes` says of a consumer whether to take it for loaded as long as nothing better is known.
    What happens to a consumer that a reload has just removed is passed over.
    """

    now: Snapshot

    def __init__(
        self,
        config: Config,
        clock: Clock,
        assumes: Callable[[ConsumerConfig], bool] = assumed_loaded,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._assumes = assumes
        self._users = Counter[str]()
        at = clock.monotonic()
        states = {
            name: transitions.fresh(assumes(consumer), at)
            for name, consumer in config.consumers.items()
        }
        self.now = Snapshot(config, MappingProxyType(states))

    def get(self, name: str) -> ConsumerState:
        """The state of one consumer; KeyError for a name that is not configured."""
        return self.now.states[name]

    # -- who works with whom, and another config -------------------------------------------

    def enter(self, name: str) -> Snapshot:
        """Somebody begins to work with a consumer (a job from its route on, an operator's call,
        an eviction): until `leave` no reload removes or moves it. Returns the snapshot of this
        moment. Raises NoConsumer if a reload has removed it already."""
        with self._lock:
            if name not in self.now.config.consumers:
                raise NoConsumer(f"consumer {name} is not in the config any more", consumer=name)
            self._users[name] += 1
            return self.now

    def leave(self, name: str) -> None:
        """The counterpart of `enter`."""
        with self._lock:
            self._users[name] -= 1

    @contextmanager
    def using(self, name: str) -> Iterator[Snapshot]:
        """`enter`, and `leave` at the end."""
        snapshot = self.enter(name)
        try:
            yield snapshot
        finally:
            self.leave(name)

    def reshape(self, config: Config, fresh: Iterable[str] = ()) -> None:
        """Put another config in force.

        Nothing is known of its new consumers, nor of the `fresh` ones, as those at another address
        than before, but whether to take them for loaded. Raises InUse, with nothing changed, if
        somebody works with one of those, or with one that the config does not have any more.
        """
        with self._lock:
            states, now = self.now.states, self._clock.monotonic()
            before, after = self.now.config.consumers, config.consumers
            anew = {*fresh, *(name for name in after if name not in before)}
            for name in (*(name for name in before if name not in after), *anew):
                state = states.get(name)
                if self._users[name] > 0 or (state is not None and state.stopped_by is not None):
                    raise InUse(name)
            changed = {}
            for name in anew:
                known = states.get(name)
                # What was asked of the one before must not be taken for an answer of this one.
                version = 0 if known is None else known.residency_version + 1
                loaded = self._assumes(after[name])
                changed[name] = transitions.fresh(loaded, now, residency_version=version)
            kept = [name for name in after if name not in anew]
            told, slots = self.now.listings, self.now.slots
            listings = {name: told[name] for name in kept if name in told}
            slots = {name: slots[name] for name in kept if name in slots}
            self.now = replace(
                self.now,
                config=config,
                states=MappingProxyType({**states, **changed}),
                listings=MappingProxyType(listings),
                slots=MappingProxyType(slots),
            )

    # -- the card, and what is learned -----------------------------------------------------

    def set_gpu(self, state: GpuState) -> None:
        """Publish a sample of the card, unless a younger one was faster."""
        with self._lock:
            if (self.now.gpu.sampled_at or 0.0) <= (state.sampled_at or 0.0):
                self.now = replace(self.now, gpu=state)

    def learn(self, learned: Mapping[str, Figures]) -> None:
        """Publish what was learned of the consumers; a mapping that is never changed again."""
        with self._lock:
            self.now = replace(self.now, learned=learned)

    def listed(self, name: str, listing: ModelListing) -> None:
        """Publish the models that a consumer says it offers."""
        with self._lock:
            if name in self.now.config.consumers and self.now.listings.get(name) != listing:
                listings = MappingProxyType({**self.now.listings, name: listing})
                self.now = replace(self.now, listings=listings)

    def told_slots(self, name: str, count: int | None) -> None:
        """Publish how many jobs a consumer says that it works on at once; None: it does not say.
        That stands until it says something else: it is not asked for a job."""
        with self._lock:
            slots = self.now.slots
            if name in self.now.config.consumers and slots.get(name) != count:
                others = {other: each for other, each in slots.items() if other != name}
                said = {} if count is None else {name: count}
                self.now = replace(self.now, slots=MappingProxyType({**others, **said}))

    # -- jobs ------------------------------------------------------------------------------

    def job_started(self, name: str, model: str | None = None) -> ConsumerState:
        """A real job begins: it counts as use, and from here on its model takes memory, which is
        an assumption until the job has ended well. Returns the state before."""
        now, consumer = self._clock.monotonic(), self.now.config.consumers.get(name)
        tells = consumer is not None and consumer.tells_models_apart
        return self._change(
            name, lambda state: transitions.job_started(state, now, model, tells=tells)
        )[0]

    def job_finished(
        self,
        name: str,
        *,
        worked: bool = True,
        unloaded: ConsumerState | None = None,
        process_gone: bool = False,
        model: str | None = None,
        context: int | None = None,
        called: str | None = None,
    ) -> None:
        """The counterpart of `job_started`; `context` is how many tokens the job asked for, and
        `called` what it calls its model itself.

        `worked`: the consumer did what it was asked, which shows that it is loaded; `unloaded`:
        the job loaded nothing, so back to what was so before it; `process_gone`: nothing listens
        there.
        """
        now = self._clock.monotonic()
        self._change(
            name,
            lambda state: transitions.job_finished(
                state,
                now,
                worked=worked,
                unloaded=unloaded,
                process_gone=process_gone,
                model=model,
                context=context,
                called=called,
            ),
        )

    # -- residency -------------------------------------------------------------------------

    def set_loaded(self, name: str, loaded: bool, model: str | None = None) -> None:
        """The broker itself loaded or unloaded the consumer, or one model of it."""
        now = self._clock.monotonic()
        self._change(name, lambda state: transitions.set_loaded(state, loaded, now, model))

    def measured(self, name: str, held_mib: int, base_mib: int) -> ConsumerState:
        """The card shows how much its processes hold; `base_mib` of that without any model. Returns
        its state with each model's share."""
        state, now = self.now.states[name], self._clock.monotonic()
        if shares.measured(state, held_mib, base_mib, now) is state:  # nearly always
            return state
        return self._change(name, lambda state: shares.measured(state, held_mib, base_mib, now))[1]

    def drop_assumption(self, name: str) -> None:
        """It cannot be loaded, as was assumed: others hold the memory. Does nothing if it was
        confirmed meanwhile, or works on a job."""
        self._change(name, transitions.drop_assumption)

    def confirm(self, name: str) -> None:
        """The card shows that it is loaded."""
        self._change(name, lambda state: replace(state, assumed=None))

    def mark_stopped(self, name: str, stopped_by: StoppedBy) -> None:
        """The broker stopped the consumer: that it does not answer says nothing from now on."""
        now = self._clock.monotonic()
        self._change(name, lambda state: transitions.stopped(state, stopped_by, now))

    def mark_started(self, name: str, *, resumed: bool, seen_version: int | None = None) -> None:
        """It was started again; `resumed`: it goes on where it was, with its model. Does nothing
        if `seen_version` is given, and is not its `residency_version` any more."""
        now, assumed = self._clock.monotonic(), self._assumed(name)

        def change(state: ConsumerState) -> ConsumerState:
            if seen_version not in (None, state.residency_version):
                return state
            return transitions.started(state, now, resumed=resumed, assumed_loaded=assumed)

        self._change(name, change)

    def quarantine(self, name: str, reason: str, ends_mib: int = CONTEXT_MIB) -> float:
        """It did not release memory that it was asked to: it is not asked again for a while,
        longer each time, or until it is seen to hold no more than `ends_mib`, or its process
        ends. Returns for how many seconds."""
        now = self._clock.monotonic()
        _, after = self._change(
            name, lambda state: transitions.quarantined(state, reason, ends_mib, now)
        )
        return after.quarantine_until - now

    def note_growth(self, name: str, growth: Growth) -> None:
        """Publish whether what it holds grows."""
        if self.now.states[name].growth != growth:
            self._change(name, lambda state: replace(state, growth=growth))

    def release(self, name: str) -> None:
        """It released its memory after all, or an operator wants it asked: no quarantine."""
        if self.now.states[name].leaks:
            self._change(name, lambda state: replace(state, quarantine="", leaks=0))

    def came_back(self, name: str, model: str | None = None) -> None:
        """All of its memory, or its model's, was seen to be back: what it holds from now on was
        loaded since."""
        if model is not None:
            self._change(name, lambda state: transitions.came_back(state, model))
        else:
            self._change(name, lambda state: replace(state, unloaded_at=None))

    def end_quarantines(self) -> None:
        """Those whose time is over may be asked again."""
        now = self._clock.monotonic()
        for name, state in self.now.states.items():
            if state.quarantine and now >= state.quarantine_until:
                self._change(name, lambda state: replace(state, quarantine=""))

    def pin(self, name: str, pinned: bool, model: str | None = None) -> None:
        """An operator's word, for as long as the broker runs: never evict it, or one model of it,
        or do so again."""
        if model is not None:
            self._change_model(name, model, pinned=pinned)
        else:
            self._change(name, lambda state: replace(state, pinned=pinned))

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """The broker has it load or unload: a probe that times out meanwhile proves nothing."""
        self._change(name, lambda state: replace(state, busy=state.busy + 1))
        try:
            yield
        finally:
            self._change(name, lambda state: replace(state, busy=state.busy - 1))

    # -- probes ----------------------------------------------------------------------------

    def probe_succeeded(self, name: str, report: ProbeReport, *, seen_version: int) -> bool:
        """Take in a probe's answer; True if it is healthy from now on. Of a process that was
        stopped by a checkpoint it says nothing: that ends with a restore (`mark_started`).

        `seen_version` is the `residency_version` from before the probe was sent. Where it
        changed meanwhile, or a job runs, the answer's word on the residency may be out of date:
        it could have been given just before the job loaded the model.
        """
        now, assumed = self._clock.monotonic(), self._assumed(name)
        before, after = self._change(
            name,
            lambda state: transitions.probe_succeeded(
                state, report, now, seen_version=seen_version, assumed_loaded=assumed
            ),
        )
        return before.healthy is not True and after.healthy is True

    def probe_failed(self, name: str, error: str, *, process_gone: bool = False) -> bool:
        """Take in a failed probe; True if it changed `healthy`.

        `process_gone`: nothing listens there any more, so its memory is free; what will be
        loaded when it comes back is what was assumed at the start.
        """
        now = self._clock.monotonic()
        before, after = self._change(
            name,
            lambda state: transitions.probe_failed(state, error, now, process_gone=process_gone),
        )
        return before.healthy is not False and after.healthy is False

    def process_returned(self, name: str, *, seen_version: int) -> None:
        """A consumer that was gone answers again: a fresh process, so back to the assumption,
        unless a job, a load or an unload came in between."""
        now, assumed = self._clock.monotonic(), self._assumed(name)

        def change(state: ConsumerState) -> ConsumerState:
            if seen_version != state.residency_version or state.active:
                return state
            return transitions.as_assumed(state, assumed, now)

        self._change(name, change)

    # -- inside ----------------------------------------------------------------------------

    def _change_model(self, name: str, model: str, **changes: Any) -> None:
        self._change(
            name,
            lambda state: shares.with_models(
                state, {model: replace(state.model(model), **changes)}
            ),
        )

    def _assumed(self, name: str) -> bool:
        """Whether to take a process for loaded that has just started."""
        consumer = self.now.config.consumers.get(name)
        return consumer is not None and not consumer.start_ahead and self._assumes(consumer)

    def _change(
        self, name: str, change: Callable[[ConsumerState], ConsumerState]
    ) -> tuple[ConsumerState, ConsumerState]:
        """Publish one consumer's changed state; returns the one before, and the one after."""
        with self._lock:
            states = self.now.states
            before = states.get(name)
            if before is None:
                return _UNKNOWN, _UNKNOWN
            after = change(before)
            if (after.healthy, after.stopped_by) != (before.healthy, before.stopped_by):
                after = replace(after, health_since=self._clock.monotonic())
            self.now = replace(self.now, states=MappingProxyType({**states, name: after}))
        return before, after
