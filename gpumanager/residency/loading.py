"""Having a consumer loaded, and started again before that, if the broker has stopped it.

Runs on the thread of the job that holds the GPU, outside any lock; every wait has a bound.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig
from gpumanager.consumers.learning import Learned
from gpumanager.consumers.registry import Registry
from gpumanager.errors import BrokerError, ConsumerTimeout
from gpumanager.model import resident_name
from gpumanager.residency.evictor import Controls, Stops
from gpumanager.scheduling.interface import Ticket
from gpumanager.telemetry.events import Emit, Loaded, LoadGivenUp, Resumed
from gpumanager.upstream.calls import GivingUp

READY_POLL_S = 0.25

WANTED_POLL_S = 0.25
"""How often it is looked at whether anybody still waits for a load that was begun for one who has
left."""

log = logging.getLogger(__name__)


class Loader:
    """`loading` is entered while a consumer is being loaded, so that the estimates know; `upcoming`
    tells what the jobs need that wait in the queue."""

    def __init__(
        self,
        registry: Registry,
        learned: Learned,
        controls: Controls,
        stops: Stops,
        clock: Clock,
        emit: Emit,
        loading: Callable[[str], AbstractContextManager[None]],
        upcoming: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._registry = registry
        self._learned = learned
        self._controls = controls
        self._stops = stops
        self._clock = clock
        self._emit = emit
        self._loading = loading
        self._upcoming = upcoming

    def bring_back(self, ticket: Ticket) -> bool:
        """Start the ticket's consumer again, if the broker has stopped it, and wait until it is
        ready; False if it had not. Raises BrokerError, and the error the ticket was cancelled with.
        """
        now, target = self._registry.now, ticket.job.consumer
        stopped_by = now.states[target].stopped_by
        if stopped_by is None:
            return False
        began = self._clock.monotonic()
        with self._loading(target), self._registry.busy(target):
            resumed = self._stops.bring_back(target, stopped_by)
            if not resumed:
                self._await_ready(target, now.settings(ticket.job), ticket)
        self._registry.mark_started(target, resumed=resumed)
        self._emit(Resumed(consumer=target, ms=self._note(target, began)))
        return True

    def load(self, ticket: Ticket) -> bool:
        """Make the `load` call of the ticket's consumer, if it has one and is not loaded; False if
        there was no call to make. Raises BrokerError, and the error the ticket was cancelled with.
        """
        consumer, model, loaded = self._as_it_is(ticket)
        if consumer.load is None or loaded:
            return False
        self._call(ticket, consumer, self._controls.load, model)
        return True

    def warm(self, ticket: Ticket) -> None:
        """The same with its `warm` call."""
        consumer, model, loaded = self._as_it_is(ticket)
        if consumer.warm is not None and not loaded:
            self._call(ticket, consumer, self._controls.warm, model)

    def _as_it_is(self, ticket: Ticket) -> tuple[ConsumerConfig, str | None, bool]:
        """The settings of the ticket's consumer, the model that it is to load, if it loads models
        one by one, and whether that is done already."""
        job, now = ticket.job, self._registry.now
        consumer = now.settings(job)
        model = consumer.apart(job.model)
        return consumer, model, now.states[job.consumer].has_loaded(model)

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
        ticket: Ticket,
        consumer: ConsumerConfig,
        call: Callable[[str, ConsumerConfig, str | None, GivingUp], None],
        model: str | None,
    ) -> None:
        target, began = ticket.job.consumer, self._clock.monotonic()
        resident = resident_name(target, model)
        watch = _Watch(resident, self._upcoming)
        if consumer.unload is not None:  # else it would be neither loaded nor not
            ticket.when_cancelled(watch.left)
        try:
            with self._loading(resident), self._registry.busy(target):
                call(target, consumer, model, watch.giving_up)
        except BrokerError:
            if watch.giving_up.error is not None:
                self._undo(target, consumer, model)
            raise
        finally:
            watch.over()
        self._registry.set_loaded(target, True, model)
        self._emit(Loaded(consumer=target, model=model, ms=self._note(resident, began)))

    def _undo(self, target: str, consumer: ConsumerConfig, model: str | None) -> None:
        """What was loaded of it so far is of no use to anybody."""
        with self._registry.busy(target):
            try:
                self._controls.unload(target, consumer, model)
            except BrokerError as error:
                extra = {"consumer": target, "reason": error.message}
                log.warning("a load that was given up was not undone", extra=extra)
        self._registry.set_loaded(target, False, model)
        self._emit(LoadGivenUp(consumer=target, model=model))

    def _note(self, resident: str, began: float) -> int:
        """Learn from it; returns how long it took, in ms."""
        seconds = self._clock.monotonic() - began
        self._learned.loaded(resident, seconds)
        return round(seconds * 1000)


class _Watch:
    """Whether anybody still wants what is being loaded. As long as whom it is loaded for waits,
    somebody does; after that, as long as jobs in the queue do: they share the load."""

    def __init__(self, resident: str, upcoming: Callable[[], Sequence[str]]) -> None:
        self.giving_up = GivingUp()
        self._resident = resident
        self._upcoming = upcoming
        self._done = threading.Event()

    def left(self, error: BrokerError) -> None:
        """It is not wanted any more by whom it is loaded for."""
        threading.Thread(
            target=self._until_nobody_wants_it, args=(error,), name="load-watch", daemon=True
        ).start()

    def over(self) -> None:
        """The load is."""
        self._done.set()

    def _until_nobody_wants_it(self, error: BrokerError) -> None:
        while self._resident in self._upcoming():
            if self._done.wait(WANTED_POLL_S):
                return
        if not self._done.is_set():
            self.giving_up.give_up(error)
