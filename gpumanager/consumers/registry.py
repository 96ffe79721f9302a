"""What is known of the consumers and the card: one lock around immutable snapshots.

Writers replace one consumer's state under the lock; readers take the current mapping without
one, since a published mapping is never changed again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

from gpumanager.clock import Clock
from gpumanager.errors import NoConsumer
from gpumanager.model import CONTEXT_MIB, ConsumerState, GpuState, ProbeReport, StoppedBy


class InUse(Exception):
    """A consumer cannot be taken out of the config or moved: somebody works with it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"consumer {name} is in use")
        self.name = name


FIRST_QUARANTINE_S = 60.0
LONGEST_QUARANTINE_S = 600.0
"""For how long one that gave nothing back is not asked again, the first time and at most; twice as
long each time."""


class Registry:
    """The live state of every consumer, and of the GPU. Safe from any thread.

    `assumed_loaded` gives, by consumer name, whether to take it for loaded as long as nothing
    better is known.
    """

    def __init__(self, assumed_loaded: Mapping[str, bool], clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._assumed_loaded = dict(assumed_loaded)
        self._consumers: Mapping[str, ConsumerState] = MappingProxyType(
            {name: self._fresh(loaded) for name, loaded in assumed_loaded.items()}
        )
        self._gpu = GpuState()
        self._users = Counter[str]()
        self._removed: set[str] = set()

    # -- who works with whom, and another config -------------------------------------------

    def enter(self, name: str) -> None:
        """Somebody begins to work with a consumer (a job from its route on, an operator's call,
        an eviction): until `leave` no reload removes or moves it. Raises NoConsumer if one has
        removed it already."""
        with self._lock:
            if name in self._removed or name not in self._consumers:
                raise NoConsumer(f"consumer {name} is not in the config any more", consumer=name)
            self._users[name] += 1

    def leave(self, name: str) -> None:
        """The counterpart of `enter`."""
        with self._lock:
            self._users[name] -= 1

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """`enter`, and `leave` at the end."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def reshape(
        self, fresh: Mapping[str, bool], removed: Iterable[str], swap: Callable[[], object]
    ) -> None:
        """Take in the consumers of another config, and call `swap`, which puts that config in
        force, all in one piece: nobody enters in between.

        `fresh` are consumers that are new, or at another address than before: nothing is known of
        them but whether to take them for loaded. Raises InUse, with nothing changed and `swap`
        not called, if somebody works with one of those, or of the `removed`.
        """
        with self._lock:
            removed = tuple(removed)
            for name in (*removed, *fresh):
                state = self._consumers.get(name)
                if self._users[name] > 0 or (state is not None and state.stopped_by is not None):
                    raise InUse(name)
            changed = {}
            for name, loaded in fresh.items():
                before = self._consumers.get(name)
                # What was asked of the one before must not be taken for an answer of this one.
                version = 0 if before is None else before.residency_version + 1
                changed[name] = replace(self._fresh(loaded), residency_version=version)
            self._assumed_loaded.update(fresh)
            # Those that are removed keep their last state, for readers of the config before.
            self._consumers = MappingProxyType({**self._consumers, **changed})
            self._removed = (self._removed | set(removed)) - set(fresh)
            swap()

    # -- reading ---------------------------------------------------------------------------

    def _fresh(self, loaded: bool) -> ConsumerState:
        return ConsumerState(loaded=loaded, assumed=self._since(loaded))

    def _since(self, loaded: bool) -> float | None:
        """Since when it is assumed to be loaded, if it is assumed from now on."""
        return self._clock.monotonic() if loaded else None

    def snapshot(self) -> Mapping[str, ConsumerState]:
        """Every consumer's state by name, as it was at one instant."""
        return self._consumers

    def get(self, name: str) -> ConsumerState:
        """The state of one consumer; KeyError for a name that is not configured."""
        return self._consumers[name]

    @property
    def gpu(self) -> GpuState:
        """The latest sample of the card."""
        return self._gpu

    def set_gpu(self, state: GpuState) -> None:
        """Publish a sample, unless a younger one was faster."""
        with self._lock:
            if (self._gpu.sampled_at or 0.0) <= (state.sampled_at or 0.0):
                self._gpu = state

    # -- jobs ------------------------------------------------------------------------------

    def job_started(self, name: str) -> ConsumerState:
        """A real job begins: it counts as use, and from here on the model takes memory, which is
        an assumption until the job has ended well. Returns the state before."""
        now = self._clock.monotonic()
        return self._change(
            name,
            lambda state: replace(
                state,
                active=state.active + 1,
                cold=not state.loaded,
                total_requests=state.total_requests + 1,
                last_used=now,
                loaded=True,
                assumed=state.assumed if state.loaded else now,
                unloaded_at=None,
                resident_mib=state.resident_mib if state.loaded else None,
                residency_version=state.residency_version + 1,
            ),
        )

    def job_finished(
        self,
        name: str,
        *,
        worked: bool = True,
        unloaded: ConsumerState | None = None,
        process_gone: bool = False,
    ) -> None:
        """The counterpart of `job_started`.

        `worked`: the consumer did what it was asked, which shows that it is loaded; `unloaded`:
        the job loaded nothing, so back to what was so before it; `process_gone`: nothing listens
        there. What the consumer reported before the job is a lower bound of what it holds now.
        """
        now = self._clock.monotonic()

        def change(state: ConsumerState) -> ConsumerState:
            loaded, resident, outdated = state.loaded, state.resident_mib, True
            assumed, unloaded_at = None if worked else state.assumed, state.unloaded_at
            quarantine, leaks = state.quarantine, state.leaks
            if process_gone:
                loaded, resident, outdated, quarantine, leaks = False, 0, False, "", 0
                assumed = None
            elif unloaded is not None:
                loaded, resident = unloaded.loaded, unloaded.resident_mib
                assumed, unloaded_at = unloaded.assumed, unloaded.unloaded_at
                outdated = unloaded.report_outdated
            return replace(
                state,
                active=state.active - 1,
                last_used=now,
                loaded=loaded,
                assumed=assumed,
                unloaded_at=unloaded_at,
                resident_mib=resident,
                report_outdated=outdated,
                quarantine=quarantine,
                leaks=leaks,
                residency_version=state.residency_version + 1,
            )

        self._change(name, change)

    # -- residency -------------------------------------------------------------------------

    def set_loaded(self, name: str, loaded: bool) -> None:
        """The broker itself loaded or unloaded the consumer."""
        unloaded_at = None if loaded else self._clock.monotonic()
        self._change(
            name,
            lambda state: replace(
                state,
                loaded=loaded,
                assumed=None,
                unloaded_at=unloaded_at,
                resident_mib=None if loaded else 0,
                report_outdated=False,
                on_cpu=(),
                residency_version=state.residency_version + 1,
            ),
        )

    def drop_assumption(self, name: str) -> None:
        """It cannot be loaded, as was assumed: others hold the memory. Does nothing if it was
        confirmed meanwhile, or works on a job."""

        def change(state: ConsumerState) -> ConsumerState:
            if state.assumed is None or state.active:
                return state
            version = state.residency_version + 1
            return replace(state, loaded=False, assumed=None, residency_version=version)

        self._change(name, change)

    def confirm(self, name: str) -> None:
        """The card shows that it is loaded."""
        self._change(name, lambda state: replace(state, assumed=None))

    def mark_stopped(self, name: str, stopped_by: StoppedBy) -> None:
        """The broker stopped the consumer: that it does not answer says nothing from now on."""
        now = self._clock.monotonic()
        self._change(
            name,
            lambda state: replace(
                state,
                healthy=None,
                last_error="",
                loaded=False,
                assumed=None,
                unloaded_at=now,
                resident_mib=0,
                report_outdated=False,
                on_cpu=(),
                stopped_by=stopped_by,
                quarantine="",
                leaks=0,
                residency_version=state.residency_version + 1,
            ),
        )

    def mark_started(self, name: str, *, resumed: bool, seen_version: int | None = None) -> None:
        """It was started again; `resumed`: it goes on where it was, with its model. Does nothing
        if `seen_version` is given, and is not its `residency_version` any more."""
        loaded = resumed or self._assumed_loaded[name]
        assumed = None if resumed else self._since(loaded)

        def change(state: ConsumerState) -> ConsumerState:
            if seen_version not in (None, state.residency_version):
                return state
            return replace(
                state,
                healthy=True,
                loaded=loaded,
                assumed=assumed,
                unloaded_at=None,
                resident_mib=None,
                stopped_by=None,
                residency_version=state.residency_version + 1,
            )

        self._change(name, change)

    def stopped_by(self) -> Mapping[str, StoppedBy]:
        """The consumers that the broker has stopped."""
        return {
            name: state.stopped_by
            for name, state in self._consumers.items()
            if state.stopped_by is not None
        }

    def quarantine(self, name: str, reason: str, ends_mib: int = CONTEXT_MIB) -> float:
        """It did not release memory that it was asked to: it is not asked again for a while,
        longer each time, or until it is seen to hold no more than `ends_mib`, or its process
        ends. Returns for how many seconds."""
        now = self._clock.monotonic()

        def change(state: ConsumerState) -> ConsumerState:
            seconds = min(LONGEST_QUARANTINE_S, FIRST_QUARANTINE_S * 2**state.leaks)
            return replace(
                state,
                quarantine=reason,
                quarantine_until=now + seconds,
                quarantine_mib=ends_mib,
                leaks=state.leaks + 1,
            )

        self._change(name, change)
        return self._consumers[name].quarantine_until - now

    def release(self, name: str) -> None:
        """It released its memory after all, or an operator wants it asked: no quarantine."""
        if self._consumers[name].leaks:
            self._change(name, lambda state: replace(state, quarantine="", leaks=0))

    def came_back(self, name: str) -> None:
        """All of its memory was seen to be back: what it holds from now on was loaded since."""
        self._change(name, lambda state: replace(state, unloaded_at=None))

    def end_quarantines(self) -> None:
        """Those whose time is over may be asked again."""
        now = self._clock.monotonic()
        for name, state in self._consumers.items():
            if state.quarantine and now >= state.quarantine_until:
                self._change(name, lambda state: replace(state, quarantine=""))

    def pin(self, name: str, pinned: bool) -> None:
        """An operator's word, for as long as the broker runs: never evict it, or do so again."""
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
        now = self._clock.monotonic()

        def change(state: ConsumerState) -> ConsumerState:
            if state.stopped_by is not None and (
                seen_version != state.residency_version or state.stopped_by.method == "checkpoint"
            ):
                # From just before it was stopped; or only its CUDA calls were.
                return replace(state, last_probe=now)
            if state.stopped_by is not None:  # somebody else has started it
                state = self._as_assumed(name, state)
            state = replace(state, healthy=True, last_error="", last_probe=now, stopped_by=None)
            state = replace(state, tells=report.loaded is not None)
            if seen_version != state.residency_version or state.active:
                return state
            state = replace(state, on_cpu=report.on_cpu)
            loaded = state.loaded if report.loaded is None else report.loaded
            if report.loaded is not None:
                state = replace(state, assumed=None)
            if report.resident_mib is None:
                resident = state.resident_mib if loaded == state.loaded else None
                return replace(state, loaded=loaded, resident_mib=resident)
            much = report.resident_mib > CONTEXT_MIB and not state.is_releasing(now)
            if report.loaded is None and much:
                loaded = True  # it cannot say so, but its memory does
                state = replace(state, assumed=None)
            return replace(
                state, loaded=loaded, resident_mib=report.resident_mib, report_outdated=False
            )

        before = self._change(name, change)
        return before.healthy is not True and self._consumers[name].healthy is True

    def probe_failed(self, name: str, error: str, *, process_gone: bool = False) -> bool:
        """Take in a failed probe; True if it changed `healthy`.

        `process_gone`: nothing listens there any more, so its memory is free; what will be
        loaded when it comes back is what was assumed at the start.
        """
        now = self._clock.monotonic()

        def change(state: ConsumerState) -> ConsumerState:
            if state.stopped_by is not None and not (
                process_gone and state.stopped_by.method == "checkpoint"  # that one had to go on
            ):
                return replace(state, last_probe=now)
            state = replace(state, healthy=False, last_error=error, last_probe=now, stopped_by=None)
            if not process_gone or state.active:
                return state
            version = state.residency_version + 1
            return replace(
                state,
                loaded=False,
                assumed=None,
                unloaded_at=None,
                resident_mib=0,
                on_cpu=(),
                quarantine="",
                leaks=0,
                residency_version=version,
            )

        before = self._change(name, change)
        return before.healthy is not False and self._consumers[name].healthy is False

    def process_returned(self, name: str, *, seen_version: int) -> None:
        """A consumer that was gone answers again: a fresh process, so back to the assumption,
        unless a job, a load or an unload came in between."""

        def change(state: ConsumerState) -> ConsumerState:
            if seen_version != state.residency_version or state.active:
                return state
            return self._as_assumed(name, state)

        self._change(name, change)

    def _as_assumed(self, name: str, state: ConsumerState) -> ConsumerState:
        """A fresh process, of which nothing is known."""
        loaded = self._assumed_loaded[name]
        return replace(
            state,
            loaded=loaded,
            assumed=self._since(loaded),
            unloaded_at=None,
            resident_mib=None,
        )

    def _change(self, name: str, change: Callable[[ConsumerState], ConsumerState]) -> ConsumerState:
        """Publish one consumer's changed state; returns the one before."""
        with self._lock:
            before = self._consumers[name]
            after = change(before)
            if (after.healthy, after.stopped_by) != (before.healthy, before.stopped_by):
                after = replace(after, health_since=self._clock.monotonic())
            self._consumers = MappingProxyType({**self._consumers, name: after})
        return before
