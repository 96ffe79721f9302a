"""Whether a consumer works on a job of somebody else, who uses it beside the broker, and waiting
until it does not. The broker's own jobs are over when an eviction begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig, EvictionMethod
from gpumanager.errors import BrokerError, ConsumerTimeout
from gpumanager.model import MemoryReading
from gpumanager.scheduling.interface import Ticket

BUSY_LIMIT_S = 120.0
"""The longest wait for somebody else's job to end."""

BUSY_POLL_S = 0.5

IDLE_PERCENT = 10
"""A card that is used less than this has nobody who works on it."""

QUIET_LIMIT_S = 10.0
"""The longest wait for that: whose work it is cannot be told, and a game never rests."""


class Asks(Protocol):
    """What is asked of a consumer. Raises BrokerError."""

    def busy(self, name: str, consumer: ConsumerConfig) -> bool | None:
        """Whether it says that it works on something; None if it does not tell."""


class Rest:
    """`measure` returns a fresh reading of the card, or None where it cannot be measured."""

    def __init__(
        self, asks: Asks, measure: Callable[[], MemoryReading | None], clock: Clock
    ) -> None:
        self._asks = asks
        self._measure = measure
        self._clock = clock

    def is_busy(self, name: str, consumer: ConsumerConfig) -> bool:
        """Whether it surely works on something, by its own word."""
        if not tells(consumer):
            return False
        try:
            return self._asks.busy(name, consumer) is True
        except BrokerError:
            return False

    def wait(
        self, name: str, consumer: ConsumerConfig, method: EvictionMethod, ticket: Ticket
    ) -> None:
        """Before `method` is carried out: return when nobody's job would suffer from it. Raises
        ConsumerTimeout if the consumer works on and on: what it works on is not the broker's to
        kill; else what asking it raises, or the error the ticket was cancelled with.

        One that drains or refuses sees to it itself. One that cannot say whether it works is given
        until the card is hardly used, for a while.
        """
        call = consumer.unload
        if method.http and (call is None or call.when_busy in ("drains", "refuses")):
            return
        if tells(consumer):
            self._until_it_says_so(name, consumer, method, ticket)
        elif method.http:
            self._until_the_card_is_quiet(ticket)

    def _until_it_says_so(
        self, name: str, consumer: ConsumerConfig, method: EvictionMethod, ticket: Ticket
    ) -> None:
        deadline = self._clock.monotonic() + BUSY_LIMIT_S
        while self._busy(name, consumer, method):
            if self._clock.monotonic() >= deadline:
                raise ConsumerTimeout(f"{name} is busy with a job of somebody else", consumer=name)
            ticket.pause(BUSY_POLL_S)

    def _busy(self, name: str, consumer: ConsumerConfig, method: EvictionMethod) -> bool:
        try:
            return self._asks.busy(name, consumer) is True
        except BrokerError:
            if method.http:
                raise
            return False  # it hangs, which is a reason to stop it

    def _until_the_card_is_quiet(self, ticket: Ticket) -> None:
        deadline = self._clock.monotonic() + QUIET_LIMIT_S
        while self._clock.monotonic() < deadline:
            reading = self._measure()
            used = None if reading is None else reading.utilization_percent
            if used is None or used < IDLE_PERCENT:
                return
            ticket.pause(BUSY_POLL_S)


def tells(consumer: ConsumerConfig) -> bool:
    """Whether the consumer can say that it works on something."""
    return consumer.probe is not None and consumer.probe.busy is not None
