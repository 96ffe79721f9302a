"""What becomes of a running job that nobody wants any more: its client left, or it was cancelled.

Servers differ. Many abort when their client goes; others work on, and the next job would collide
with them. `on_disconnect` says which kind a consumer is.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import Call, ConsumerConfig
from gpumanager.errors import BrokerError, ClientGone
from gpumanager.upstream.exchange import Exchange

log = logging.getLogger(__name__)

BUSY_POLL_S = 0.5
TELL_TIMEOUT_S = 15.0
"""A little more than the call that stops a job may take."""


class StopsJobs(Protocol):
    """The calls that stop a consumer's running job, or ask for it. They raise BrokerError."""

    def cancel(self, name: str) -> None:
        """Tell the consumer to stop."""

    def busy(self, name: str) -> bool | None:
        """Whether it works on something; None if it does not tell."""


class Departure:
    """For one job of one consumer, by its `on_disconnect`:

    - `native`: its connection is closed, and it stops.
    - `none`: its answer is read to its end and dropped. Where its probe can tell whether it is
      `busy`, its connection is closed instead, and the GPU held until it is not.
    - a call: it is told, and its answer read to its end.

    All of it is bounded by the job's total time-out.
    """

    def __init__(
        self,
        name: str,
        consumer: ConsumerConfig,
        exchange: Exchange,
        calls: StopsJobs,
        clock: Clock,
    ) -> None:
        self._name = name
        self._consumer = consumer
        self._exchange = exchange
        self._calls = calls
        self._clock = clock
        self._deadline = clock.monotonic() + consumer.timeouts.total
        self._asked = consumer.probe is not None and consumer.probe.busy is not None
        self._told = isinstance(consumer.on_disconnect, Call)
        self._native = consumer.on_disconnect == "native"
        self._lock = threading.Lock()
        self._settled = False
        self._teller: threading.Thread | None = None

    @property
    def finish_answer(self) -> bool:
        """The answer is to be read to its end, even with nobody to take it."""
        return not self._native and not (self._asked and not self._told)

    def client_left(self) -> None:
        """Called on the watcher's thread: must not block."""
        if self._told:
            self._tell()
        elif not self.finish_answer:
            self._exchange.abort(ClientGone("the client left", consumer=self._name))

    def cancelled(self, error: BrokerError) -> None:
        """Called on the thread that cancels: must not block."""
        if self.finish_answer:
            self._exchange.discard(error)
            if self._told:
                self._tell()
        else:
            self._exchange.abort(error)

    def settle(self) -> None:
        """Return when the consumer is at rest. Called by the job's own thread, before the GPU is
        given back: from here on a call to stop would hit the next job."""
        with self._lock:
            self._settled = True
            teller = self._teller
        if teller is not None:
            teller.join(TELL_TIMEOUT_S)
        if self._native or self._told or not self._asked or not self._exchange.aborted:
            return
        pause = threading.Event()
        while self._clock.monotonic() < self._deadline:
            try:
                if not self._calls.busy(self._name):
                    return
            except BrokerError:
                pass  # too busy to say, which is an answer
            pause.wait(BUSY_POLL_S)
        log.warning("still busy", extra={"consumer": self._name})

    def _tell(self) -> None:
        with self._lock:
            if self._settled or self._teller is not None:
                return
            name = f"cancel-{self._name}"
            self._teller = threading.Thread(target=self._cancel, name=name, daemon=True)
            self._teller.start()

    def _cancel(self) -> None:
        try:
            self._calls.cancel(self._name)
        except BrokerError as error:
            log.warning("cancel failed", extra={"consumer": self._name, "reason": error.message})
