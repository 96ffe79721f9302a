"""Having a consumer loaded, and started again before that, if the broker has stopped it.

Runs on the thread of the job that holds the GPU, outside any lock; every wait has a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from gpumanager.clock import Clock
from gpumanager.config import Config
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerTimeout
from gpumanager.residency.evictor import Controls, Stops
from gpumanager.scheduling.interface import Ticket
from gpumanager.telemetry.events import Emit, Loaded, Resumed

READY_POLL_S = 0.25


class Loader:
    """`loading` is entered while a consumer is being loaded, so that the estimates know."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        learned: Learned,
        controls: Controls,
        stops: Stops,
        clock: Clock,
        emit: Emit,
        loading: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._config = config
        self._registry = registry
        self._learned = learned
        self._controls = controls
        self._stops = stops
        self._clock = clock
        self._emit = emit
        self._loading = loading

    def bring_back(self, target: str, ticket: Ticket) -> None:
        """Start the target again, if the broker has stopped it, and wait until it is ready. Raises
        BrokerError, and the error the ticket was cancelled with."""
        stopped_by = self._registry.get(target).stopped_by
        if stopped_by is None:
            return
        began = self._clock.monotonic()
        with self._loading(target), self._registry.busy(target):
            resumed = self._stops.bring_back(target, stopped_by)
            if not resumed:
                self._await_ready(target, ticket)
        self._registry.mark_started(target, resumed=resumed)
        self._emit(Resumed(consumer=target, ms=self._note(target, began)))

    def load(self, target: str) -> None:
        """Make its `load` call, if it has one and is not loaded. Raises BrokerError."""
        if self._config.consumers[target].load is not None:
            self._call(target, self._controls.load)

    def warm(self, target: str) -> None:
        """The same with its `warm` call."""
        if self._config.consumers[target].warm is not None:
            self._call(target, self._controls.warm)

    def _await_ready(self, target: str, ticket: Ticket) -> None:
        limit = self._config.consumers[target].ready_timeout
        deadline = self._clock.monotonic() + limit
        while True:
            try:
                self._controls.probe(target)
            except BrokerError as error:
                if self._clock.monotonic() >= deadline:
                    raise ConsumerTimeout(
                        f"{target} was started, but not ready within {limit:g} s: {error.message}",
                        consumer=target,
                    ) from error
                ticket.pause(READY_POLL_S)
            else:
                return

    def _call(self, target: str, call: Callable[[str], None]) -> None:
        if self._registry.get(target).loaded:
            return
        began = self._clock.monotonic()
        with self._loading(target), self._registry.busy(target):
            call(target)
        self._registry.set_loaded(target, True)
        self._emit(Loaded(consumer=target, ms=self._note(target, began)))

    def _note(self, target: str, began: float) -> int:
        """Learn from it; returns how long it took, in ms."""
        seconds = self._clock.monotonic() - began
        self._learned.loaded(target, seconds)
        return round(seconds * 1000)
