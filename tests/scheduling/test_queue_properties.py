"""Arbitrary interleavings of arriving, leaving, cancelling, timing out, failing, finishing and
shutting down, held against a model: order, exclusion and counters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from gpumanager.errors import BrokerError, Cancelled, QueueFull, QueueTimeout, ShuttingDown
from gpumanager.model import Job
from gpumanager.scheduling.policy import Affinity, FirstComeFirstServed, Policy
from gpumanager.scheduling.queue import Queue
from gpumanager.scheduling.ticket import QueueTicket
from tests.support.clock import FakeClock

pytestmark = pytest.mark.untraced

MAX_WAIT = 10.0


class LineMachine(RuleBasedStateMachine):
    """The model: `waiting` and `running` as plain lists of tickets, in order."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.waiting: list[QueueTicket] = []
        self.running: list[QueueTicket] = []
        self.ended: set[int] = set()
        self.cancelled: dict[int, BrokerError] = {}
        self.deadlines: dict[int, float] = {}
        self.told: list[int] = []
        self.grants: list[int] = []
        self.draining = False

    @initialize(
        policy=st.sampled_from(
            [FirstComeFirstServed(), FirstComeFirstServed(), FirstComeFirstServed(3), Affinity()]
        ),
        max_queue=st.integers(1, 5),
    )
    def build(self, policy: Policy, max_queue: int) -> None:
        self.limit, self.max_queue = policy.limit, max_queue
        self.line = Queue(policy, max_queue=max_queue, max_wait=MAX_WAIT, clock=self.clock)

    def tell(self, number: int, error: BrokerError) -> None:
        assert error is not None
        self.told.append(number)

    def grant(self) -> None:
        while self.waiting and len(self.running) < self.limit:
            ticket = self.waiting.pop(0)
            self.running.append(ticket)
            self.grants.append(ticket.number)

    @rule(target=tickets, patience=st.sampled_from([None, 0.0, 3.0, 99.0]))
    def arrive(self, patience: float | None) -> Any:
        job = Job("mvoice", "tts", max_wait=patience)
        full = len(self.running) >= self.limit and len(self.waiting) >= self.max_queue
        if self.draining or full:
            with pytest.raises(ShuttingDown if self.draining else QueueFull):
                self.line.enqueue(job)
            return multiple()
        ticket = self.line.enqueue(job)
        longest = MAX_WAIT if patience is None else min(patience, MAX_WAIT)
        self.deadlines[ticket.number] = self.clock.monotonic() + longest
        ticket.when_cancelled(partial(self.tell, ticket.number))
        self.waiting.append(ticket)
        self.grant()
        return ticket

    @rule(ticket=tickets)
    def wait(self, ticket: QueueTicket) -> None:
        """Only where it cannot block: granted, cancelled, ended or overdue."""
        number = ticket.number
        if number in self.cancelled:
            with pytest.raises(type(self.cancelled[number])):
                ticket.wait()
        elif ticket in self.waiting:
            if self.clock.monotonic() >= self.deadlines[number]:
                with pytest.raises(QueueTimeout):
                    ticket.wait()
                self.end(ticket)
        elif ticket in self.running:
            ticket.wait()
        else:
            with pytest.raises(RuntimeError, match="closed"):
                ticket.wait()

    @rule(ticket=consumes(tickets))
    def close(self, ticket: QueueTicket) -> None:
        """The client left, the job finished, or it failed: to the line it is the same."""
        ticket.close()
        self.end(ticket)

    @rule(ticket=tickets)
    def close_and_keep(self, ticket: QueueTicket) -> None:
        ticket.close()
        self.end(ticket)

    @rule(ticket=tickets, by_number=st.booleans())
    def cancel(self, ticket: QueueTicket, by_number: bool) -> None:
        error = Cancelled("by the operator")
        done = self.line.cancel(ticket.number, error) if by_number else ticket.cancel(error)
        assert done == (ticket.number not in self.ended)
        if done:
            self.cancelled.setdefault(ticket.number, error)
            if ticket in self.waiting:
                self.end(ticket)

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def drain(self) -> None:
        self.line.drain()
        self.draining = True
        for ticket in list(self.waiting):
            self.cancelled[ticket.number] = ShuttingDown("")
            self.end(ticket)

    def end(self, ticket: QueueTicket) -> None:
        self.ended.add(ticket.number)
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        if ticket in self.running:
            self.running.remove(ticket)
        self.grant()

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "line"):
            return
        stats, entries = self.line.stats(), self.line.queue()
        assert stats.in_flight == len(self.running) <= self.limit
        assert stats.queue_depth == len(self.waiting) <= self.max_queue
        assert stats.total_jobs == len(self.grants)
        assert (stats.oldest_queued is None) == (not self.waiting)
        assert [e.ticket for e in entries] == [t.number for t in self.running + self.waiting]
        assert self.grants == sorted(self.grants)
        assert len(self.told) == len(set(self.told))
        assert self.line.wait_idle(0) == (not self.running)


TestLine = LineMachine.TestCase
TestLine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
