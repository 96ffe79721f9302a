"""What a request holds of the broker on its way to the GPU, and gives up in one piece."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from gpumanager.config import Config, ConsumerConfig
from gpumanager.consumers.registry import Registry
from gpumanager.errors import NoConsumer
from gpumanager.jobs.routing import Choice
from gpumanager.model import Job
from gpumanager.scheduling.interface import Scheduler, Ticket


class Shares(Protocol):
    """What each key may have in the queue."""

    def enter(self, name: str) -> None:
        """Count a job of the key's in the queue. Raises QueueFull over its share."""

    def leave(self, name: str) -> None:
        """It is out of the queue, and off the GPU."""


class Place:
    """One request's: its consumer, which no reload removes or moves meanwhile, its share of what
    its key may have in the queue, and its ticket, once it was taken. `config` are the consumer's
    settings as of when the place was opened: they stay the request's own to its end. Safe from any
    thread."""

    def __init__(
        self, name: str, config: ConsumerConfig, scheduler: Scheduler, shares: Shares
    ) -> None:
        self.name = name
        self.config = config
        self._scheduler = scheduler
        self._shares = shares
        self._lock = threading.Lock()
        self._held: list[Callable[[], object]] = []

    def when_given_up(self, undo: Callable[[], object]) -> None:
        """Have `undo`, which never raises, called then; the latest first."""
        self._held.append(undo)

    def take_ticket(self, job: Job) -> Ticket:
        """Join the queue. Raises QueueFull if the job's key has too many in it, and what
        `Scheduler.enqueue` raises."""
        if job.key is not None:
            self._shares.enter(job.key)
            self.when_given_up(partial(self._shares.leave, job.key))
        ticket = self._scheduler.enqueue(job)
        self.when_given_up(ticket.close)
        return ticket

    def give_up(self) -> None:
        """Leave the queue, or give the GPU back, and let go of the consumer. Idempotent, never
        raises."""
        with self._lock:
            held, self._held = self._held, []
        for undo in reversed(held):
            undo()


class Places:
    """Opens them."""

    def __init__(self, registry: Registry, scheduler: Scheduler, shares: Shares) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._shares = shares

    def chosen(self, choose: Callable[[], Choice]) -> tuple[Choice, Place]:
        """What `choose` chooses, and a place with that consumer, by one and the same config: where
        a reload comes in between, it is asked again. Raises what it raises."""
        while True:
            config = self._registry.now.config
            choice = choose()
            try:
                admitted_by = self._registry.enter(choice.consumer).config
            except NoConsumer:
                if self._registry.now.config is config:
                    raise
                continue
            if admitted_by is config:
                return choice, self._place(choice.consumer, config)
            self._registry.leave(choice.consumer)

    def open(self, name: str) -> Place:
        """A place with one consumer. Raises NoConsumer if it is not in the config (any more)."""
        return self._place(name, self._registry.enter(name).config)

    def _place(self, name: str, config: Config) -> Place:
        place = Place(name, config.consumers[name], self._scheduler, self._shares)
        place.when_given_up(partial(self._registry.leave, name))
        return place
