"""What the broker does in quiet times: unload who has been idle for long, and load again who is to
be resident."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

from gpumanager.clock import Clock
from gpumanager.consumers.registry import Registry
from gpumanager.consumers.snapshot import Snapshot
from gpumanager.errors import BrokerError, NoConsumer
from gpumanager.model import BACKGROUND, ConsumerState, Job, parts_of, resident_name
from gpumanager.scheduling.interface import Moves, Scheduler, Ticket
from gpumanager.telemetry.events import Emit, HousekeepingFailed

INTERVAL_S = 1.0
PATIENCE_S = 1.0
"""Longest wait in the queue: if a job came first after all, it is quiet no longer."""


class Housekeeper:
    """`tidy` is the body of a periodic worker. Whatever it does, it waits for in the queue."""

    def __init__(
        self,
        registry: Registry,
        scheduler: Scheduler,
        moves: Moves,
        clock: Clock,
        emit: Emit,
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._moves = moves
        self._clock = clock
        self._emit = emit
        self._started = clock.monotonic()
        self._seen_idle: dict[str, float] = {}
        self._restored_after: dict[str, float] = {}

    @property
    def needed(self) -> bool:
        """Whether the config asks for anything of it."""
        config = self._registry.now.config
        return bool(config.default_resident) or any(
            consumer.idle_unload is not None for consumer in config.consumers.values()
        )

    def tidy(self) -> float:
        """Do the one thing that is due, if the queue is empty; returns the seconds until the next
        look."""
        if not self._scheduler.queue():
            now = self._registry.now
            for name in _residents(now):
                if self._is_idle(name, now):
                    self._unload(name)
                    return INTERVAL_S
            for name in now.config.default_resident:
                if self._is_missed(name, now):
                    self._restore(name)
                    return INTERVAL_S
        return INTERVAL_S

    def _is_idle(self, name: str, snapshot: Snapshot) -> bool:
        """Loaded, and without a job for longer than its `idle_unload`; one that had none yet, for
        longer than it was seen loaded. A consumer whose models are known is never idle itself."""
        owner, model = parts_of(name)
        consumer, state = snapshot.consumers[owner], snapshot.states[owner]
        limit, used = consumer.idle_unload, state.last_used
        if state.is_pinned(consumer.pinned):
            limit = None
        elif model is not None:
            used = state.model(model).last_used
            if consumer.pins(model, state.model(model).pinned):
                limit = None
        loaded = state.has_loaded(model) and (model is not None or not state.loaded_models)
        if limit is None or not _is_at_rest(state) or not loaded or state.quarantine:
            self._seen_idle.pop(name, None)
            return False
        now = self._clock.monotonic()
        since = self._seen_idle.setdefault(name, now)
        return now - max(since, used or since) >= limit

    def _is_missed(self, name: str, snapshot: Snapshot) -> bool:
        """Not loaded, and nobody had a job for longer than `restore_after`. Tried once in each
        quiet time, and never at the cost of another one that is to be resident."""
        quiet_since, state = self._quiet_since(), snapshot.states[name]
        if (
            state.loaded
            or not _is_at_rest(state)
            or state.healthy is False
            or self._restored_after.get(name) == quiet_since
            or self._clock.monotonic() - quiet_since < snapshot.config.restore_after
        ):
            return False
        try:
            with self._registry.using(name):
                victims = self._moves.preview(Job(name, "restore")).victims
        except NoConsumer:  # a reload has just removed it
            return False
        going = {parts_of(victim.name)[0] for victim in victims}
        return going.isdisjoint(snapshot.config.default_resident)

    def _quiet_since(self) -> float:
        used = [state.last_used for state in self._registry.now.states.values()]
        return max((each for each in used if each is not None), default=self._started)

    def _unload(self, name: str) -> None:
        def unless_used(ticket: Ticket) -> None:
            # A job may have come first after all, or another config.
            if self._is_idle(name, self._registry.now):
                self._moves.unload(name, ticket, patient=False)

        owner, model = parts_of(name)
        job = Job(
            owner,
            "idle-unload",
            max_wait=PATIENCE_S,
            makes_room=False,
            urgency=BACKGROUND,
            model=model,
        )
        self._in_turn(job, unless_used)
        self._seen_idle.pop(name, None)

    def _restore(self, name: str) -> None:
        self._restored_after[name] = self._quiet_since()
        job = Job(name, "restore", max_wait=PATIENCE_S, runs=False, urgency=BACKGROUND)
        self._in_turn(job, lambda ticket: self._moves.load(name, ticket))

    def _in_turn(self, job: Job, act: Callable[[Ticket], object]) -> None:
        """Wait in the queue, and act; what goes wrong is only told of."""
        try:
            with (
                self._registry.using(job.consumer),
                closing(self._scheduler.enqueue(job)) as ticket,
            ):
                ticket.wait()
                act(ticket)
        except BrokerError as error:
            self._emit(
                HousekeepingFailed(consumer=job.consumer, kind=job.kind, reason=error.message)
            )


def _residents(snapshot: Snapshot) -> Iterator[str]:
    """All that may have been idle for long: the models of those that tell them apart, and all
    consumers."""
    for name, consumer in snapshot.consumers.items():
        yield name
        if consumer.tells_models_apart:
            for model in snapshot.states[name].loaded_models:
                yield resident_name(name, model)


def _is_at_rest(state: ConsumerState) -> bool:
    return not state.active and not state.busy
