"""What a request holds of the broker on its way to the GPU, and gives up in one piece."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from gpumanager.config import Config, ConsumerConfig
from gpumanager.consumers.registry import Registry
from gpumanager.errors import ClientGone, NoConsumer
from gpumanager.jobs.client import ClientWatch
from gpumanager.jobs.deadlines import Deadlines
from gpumanager.jobs.routing import Choice
from gpumanager.jobs.shares import Shares
from gpumanager.model import Job
from gpumanager.scheduling.interface import Scheduler, Ticket


class Place:
    """One request's: its consumer, which no reload removes or moves meanwhile, its share of what
    its requester may have in the queue, and its ticket, once it was taken. `config` are the
    consumer's settings as of when the place was opened: they stay the request's own to its end.
    `leave`, which never raises, lets go of the consumer. Safe from any thread."""

    def __init__(
        self,
        name: str,
        config: ConsumerConfig,
        scheduler: Scheduler,
        shares: Shares,
        deadlines: Deadlines,
        leave: Callable[[], object],
    ) -> None:
        self.name = name
        self.config = config
        self.ticket: Ticket | None = None
        self._scheduler = scheduler
        self._shares = shares
        self._deadlines = deadlines
        self._lock = threading.Lock()
        self._held = [leave]

    def wait_turn(
        self,
        job: Job,
        client: ClientWatch,
        begin: Callable[[], bool] | None = None,
        joined: Callable[[], object] | None = None,
    ) -> Ticket:
        """Join the queue, and return when it is the job's turn. If its client leaves before, it
        does, too. `begin` is for `Ticket.when_granted`; `joined` is called once it has its place.
        Raises what `take_ticket` and `Ticket.wait` raise."""
        ticket = self.take_ticket(job)
        if joined is not None:
            joined()
        if begin is not None:
            ticket.when_granted(begin)
        client.when_gone(lambda: ticket.cancel(self.client_left()))
        ticket.wait()
        return ticket

    def client_left(self) -> ClientGone:
        """The error of a job whose client has left."""
        return ClientGone("the client left", consumer=self.name)

    def take_ticket(self, job: Job) -> Ticket:
        """Join the queue. Raises QueueTimeout if its turn would not come in time, QueueFull if the
        job's requester has too many in it, and what `Scheduler.enqueue` raises."""
        if job.max_wait is not None:
            self._deadlines.check(job)
        leave = self._shares.enter(job)
        if leave is not None:
            self._held.append(leave)
        self.ticket = ticket = self._scheduler.enqueue(job)
        self._held.append(ticket.close)
        if job.max_wait is not None:
            self._deadlines.joined()
        return ticket

    def give_up(self) -> None:
        """Leave the queue, or give the GPU back, and let go of the consumer, in that order.
        Idempotent, never raises."""
        with self._lock:
            held, self._held = self._held, []
        for undo in reversed(held):
            undo()


class Places:
    """Opens a place for each request, by the config and the queue of the moment."""

    def __init__(
        self, registry: Registry, scheduler: Scheduler, shares: Shares, deadlines: Deadlines
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._shares = shares
        self._deadlines = deadlines

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
        leave = partial(self._registry.leave, name)
        return Place(
            name, config.consumers[name], self._scheduler, self._shares, self._deadlines, leave
        )
