"""What is known of the consumers and the card: one lock around immutable snapshots.

Writers replace one consumer's state under the lock; readers take the current mapping without
one, since a published mapping is never changed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

from gpumanager.clock import Clock
from gpumanager.model import ConsumerState, GpuState, ProbeReport


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
            {name: ConsumerState(loaded=loaded) for name, loaded in assumed_loaded.items()}
        )
        self._gpu = GpuState()

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
        """Publish a sample."""
        self._gpu = state

    # -- jobs ------------------------------------------------------------------------------

    def job_started(self, name: str) -> None:
        """A real job begins: it counts as use, and from here on the model takes memory."""
        now = self._clock.monotonic()
        self._change(
            name,
            lambda state: replace(
                state,
                active=state.active + 1,
                total_requests=state.total_requests + 1,
                last_used=now,
                loaded=True,
                resident_mib=state.resident_mib if state.loaded else None,
                residency_version=state.residency_version + 1,
            ),
        )

    def job_finished(self, name: str) -> None:
        """The counterpart of `job_started`."""
        now = self._clock.monotonic()
        self._change(
            name,
            lambda state: replace(
                state,
                active=state.active - 1,
                last_used=now,
                residency_version=state.residency_version + 1,
            ),
        )

    # -- residency -------------------------------------------------------------------------

    def set_loaded(self, name: str, loaded: bool) -> None:
        """The broker itself loaded or unloaded the consumer."""
        self._change(
            name,
            lambda state: replace(
                state,
                loaded=loaded,
                resident_mib=None if loaded else 0,
                residency_version=state.residency_version + 1,
            ),
        )

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
        """Take in a probe's answer; True if it changed `healthy`.

        `seen_version` is the `residency_version` from before the probe was sent. Where it
        changed meanwhile, or a job runs, the answer's word on the residency may be out of date:
        it could have been given just before the job loaded the model.
        """
        now = self._clock.monotonic()

        def change(state: ConsumerState) -> ConsumerState:
            state = replace(state, healthy=True, last_error="", last_probe=now)
            if seen_version != state.residency_version or state.active:
                return state
            loaded = state.loaded if report.loaded is None else report.loaded
            resident = state.resident_mib if loaded == state.loaded else None
            if report.resident_mib is not None:
                resident = report.resident_mib
            return replace(state, loaded=loaded, resident_mib=resident)

        return self._change(name, change).healthy is not True

    def probe_failed(self, name: str, error: str, *, process_gone: bool = False) -> bool:
        """Take in a failed probe; True if it changed `healthy`.

        `process_gone`: nothing listens there any more, so its memory is free; what will be
        loaded when it comes back is what was assumed at the start.
        """
        now = self._clock.monotonic()

        def change(state: ConsumerState) -> ConsumerState:
            state = replace(state, healthy=False, last_error=error, last_probe=now)
            if not process_gone or state.active:
                return state
            version = state.residency_version + 1
            return replace(state, loaded=False, resident_mib=0, residency_version=version)

        return self._change(name, change).healthy is not False

    def process_returned(self, name: str) -> None:
        """A consumer that was gone answers again: a fresh process, so back to the assumption."""
        loaded = self._assumed_loaded[name]
        self._change(name, lambda state: replace(state, loaded=loaded, resident_mib=None))

    def _change(self, name: str, change: Callable[[ConsumerState], ConsumerState]) -> ConsumerState:
        """Publish one consumer's changed state; returns the one before."""
        with self._lock:
            before = self._consumers[name]
            self._consumers = MappingProxyType({**self._consumers, name: change(before)})
        return before
