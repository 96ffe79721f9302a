"""Having a consumer loaded, and started again before that, if the broker has stopped it.

Runs on the thread of the job that holds the GPU, outside any lock; every wait has a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerTimeout
from gpumanager.model import Job, resident_name
from gpumanager.residency.evictor import Controls, Stops
from gpumanager.scheduling.interface import Ticket
from gpumanager.telemetry.events import Emit, Loaded, Resumed

READY_POLL_S = 0.25


class Loader:
    """`loading` is entered while a consumer is being loaded, so that the estimates know."""

    def __init__(
        self,
        registry: Registry,
        learned: Learned,
        controls: Controls,
        stops: Stops,
        clock: Clock,
        emit: Emit,
        loading: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._registry = registry
        self._learned = learned
        self._controls = controls
        self._stops = stops
        self._clock = clock
        self._emit = emit
        self._loading = loading

    def bring_back(self, ticket: Ticket) -> None:
        """Start the ticket's consumer again, if the broker has stopped it, and wait until it is
        ready. Raises BrokerError, and the error the ticket was cancelled with."""
        now, target = self._registry.now, ticket.job.consumer
        stopped_by = now.states[target].stopped_by
        if stopped_by is None:
            return
        began = self._clock.monotonic()
        with self._loading(target), self._registry.busy(target):
            resumed = self._stops.bring_back(target, stopped_by)
            if not resumed:
                self._await_ready(target, now.settings(ticket.job), ticket)
        self._registry.mark_started(target, resumed=resumed)
        self._emit(Resumed(consumer=target, ms=self._note(target, began)))

    def load(self, job: Job) -> None:
        """Make the `load` call of the job's consumer, if it has one and is not loaded. Raises
        BrokerError."""
        now = self._registry.now
        consumer = now.settings(job)
        model = job.model if consumer.tells_models_apart else None
        if consumer.load is not None and not now.states[job.consumer].has_loaded(model):
            self._call(job.consumer, consumer, self._controls.load, model)

    def warm(self, job: Job) -> None:
        """The same with its `warm` call."""
        now = self._registry.now
        consumer = now.settings(job)
        model = job.model if consumer.tells_models_apart else None
        if consumer.warm is not None and not now.states[job.consumer].has_loaded(model):
            self._call(job.consumer, consumer, self._controls.warm, model)

    def _await_ready(self, target: str, consumer: ConsumerConfig, ticket: Ticket) -> None:
        limit = consumer.ready_timeout
        deadline = self._clock.monotonic() + limit
        while True:
            try:
                self._controls.probe(target, consumer)
            except BrokerError as error:
                if self._clock.monotonic() >= deadline:
                    raise ConsumerTimeout(
                        f"{target} was started, but not ready within {limit:g} s: {error.message}",
                        consumer=target,
                    ) from error
                ticket.pause(READY_POLL_S)
            else:
                return

    def _call(
        self,
        target: str,
        consumer: ConsumerConfig,
        call: Callable[[str, ConsumerConfig, str | None], None],
        model: str | None,
    ) -> None:
        began, resident = self._clock.monotonic(), resident_name(target, model)
        with self._loading(resident), self._registry.busy(target):
            call(target, consumer, model)
        self._registry.set_loaded(target, True, model)
        self._emit(Loaded(consumer=target, model=model, ms=self._note(resident, began)))

    def _note(self, resident: str, began: float) -> int:
        """Learn from it; returns how long it took, in ms."""
        seconds = self._clock.monotonic() - began
        self._learned.loaded(resident, seconds)
        return round(seconds * 1000)
