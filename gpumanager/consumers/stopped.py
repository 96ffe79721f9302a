"""Which consumers the broker has stopped or unloaded, as data that outlives it: after a restart one
that cannot tell whether it is loaded must not be sent a job without being loaded first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gpumanager.config import ConsumerConfig
from gpumanager.consumers.registry import Registry
from gpumanager.host.processes import still_there, with_birth
from gpumanager.model import ConsumerState, StoppedBy
from gpumanager.telemetry.events import Event, Evicted, Loaded, Resumed

UNLOADED = "http"
"""The eviction method that leaves a consumer running."""


class Stopped:
    """Safe from any thread. `find` gives the processes that listen for a consumer."""

    def __init__(self, registry: Registry, find: Callable[[str], Sequence[int]]) -> None:
        self._registry = registry
        self._find = find

    def now(self) -> Mapping[str, StoppedBy]:
        """The consumers that are stopped; and those, by `UNLOADED`, that were unloaded, have to be
        loaded before a job, and cannot tell."""
        snapshot = self._registry.now
        found: dict[str, StoppedBy] = {}
        for name, consumer in snapshot.consumers.items():
            state = snapshot.states[name]
            if state.stopped_by is not None:
                found[name] = state.stopped_by
            elif _has_to_be_loaded(consumer, state):
                found[name] = StoppedBy(UNLOADED, tuple(with_birth(self._find(name))))
        return found

    def restore(self, stopped: Mapping[str, StoppedBy]) -> None:
        """Take over what was so before the restart. One that was unloaded, and runs in another
        process by now, is as its start has left it."""
        for name, stopped_by in stopped.items():
            if name not in self._registry.now.consumers:
                continue
            if stopped_by.method != UNLOADED:
                self._registry.mark_stopped(name, stopped_by)
            elif not stopped_by.processes or still_there(stopped_by.processes):
                self._registry.set_loaded(name, False)

    def concerned(self, event: Event) -> bool:
        """Whether what happened may have changed what `now` says."""
        if not isinstance(event, Evicted | Loaded | Resumed):
            return False
        consumer = self._registry.now.consumers.get(event.consumer)
        if consumer is None:
            return False
        stopped = isinstance(event, Evicted) and event.method != UNLOADED
        return stopped or _can_be_loaded(consumer)


def _can_be_loaded(consumer: ConsumerConfig) -> bool:
    return consumer.load is not None and consumer.unload is not None


def _has_to_be_loaded(consumer: ConsumerConfig, state: ConsumerState) -> bool:
    return (
        _can_be_loaded(consumer)
        and not state.loaded
        and not state.tells
        and state.stopped_by is None
        and state.healthy is not False
    )
