"""What becomes of a running job that nobody wants any more: its client left, it was cancelled, or
its time was up.

Servers differ. Many abort when their client goes; others work on, and the next job would collide
with them. `on_disconnect` says which kind a consumer is.
"""

from __future__ import annotations

import threading
from typing import Protocol

from gpumanager.clock import Clock
from gpumanager.config import Call, ConsumerConfig
from gpumanager.errors import BrokerError, ClientGone, ConsumerUnreachable
from gpumanager.telemetry.events import CancelFailed, Emit, StillBusy
from gpumanager.upstream.exchange import Exchange

BUSY_POLL_S = 0.5
TELL_TIMEOUT_S = 15.0
"""A little more than the call that stops a job may take."""

END_AFTER_TOLD_S = 30.0
"""What a job is given to end whose consumer was told to stop it after a time-out."""


class StopsJobs(Protocol):
    """The calls that stop a consumer's running job, or ask for it. They raise BrokerError."""

    def cancel(self, name: str, consumer: ConsumerConfig) -> None:
        """Tell the consumer to stop."""

    def busy(self, name: str, consumer: ConsumerConfig) -> bool | None:
        """Whether it works on something; None if it does not tell."""


class Cancellation:
    """For one call to one consumer, by its `on_disconnect`:

    - `native`: its connection is closed, and it stops.
    - `none`: its answer is read to its end and dropped. Where its probe can tell whether it is
      `busy`, its connection is closed instead, and the GPU held until it is not.
    - a call: it is told, and its answer read to its end.

    After a time-out the answer cannot be read any more, but its end can be seen: the consumer
    closes the connection, which is kept for that. All of it is bounded by the job's total
    time-out.
    """

    def __init__(
        self,
        name: str,
        consumer: ConsumerConfig,
        exchange: Exchange,
        calls: StopsJobs,
        clock: Clock,
        emit: Emit,
    ) -> None:
        self.exchange = exchange
        self._name = name
        self._consumer = consumer
        self._calls = calls
        self._clock = clock
        self._emit = emit
        self._deadline = clock.monotonic() + consumer.timeouts.total
        self._asked = consumer.probe is not None and consumer.probe.busy is not None
        self._told = isinstance(consumer.on_disconnect, Call)
        self._native = consumer.on_disconnect == "native"
        self._lock = threading.Lock()
        self._settled = False
        self._tells = False
        self._teller: threading.Thread | None = None
        if not self._native and not self._asked:
            exchange.keep_for_its_end()

    @property
    def finish_answer(self) -> bool:
        """The answer is to be read to its end, even with nobody to take it."""
        return not self._native and not (self._asked and not self._told)

    # -- any thread ------------------------------------------------------------------------

    def client_left(self) -> None:
        """Called on the watcher's thread: must not block."""
        if self._told:
            self._tell()
        elif not self.finish_answer:
            self.exchange.abort(ClientGone("the client left", consumer=self._name))

    def cancelled(self, error: BrokerError) -> None:
        """Called on the thread that cancels: must not block."""
        if self.finish_answer:
            self.exchange.discard(error)
            if self._told:
                self._tell()
        else:
            self.exchange.abort(error)

    # -- the job's own thread --------------------------------------------------------------

    def settled_already(self) -> bool:
        """Whether `settle` has nothing to wait for: nothing more comes from the consumer, and it
        is at rest, as far as can be known. Then nobody is told to stop from here on: it would hit
        the next job."""
        if not self.exchange.consumer_done:
            return False
        if self._works_on():
            return False
        with self._lock:
            if self._tells:
                return False
            self._settled = True
        return True

    def settle(self) -> None:
        """Return when the consumer is at rest. From here on nobody is told to stop."""
        exchange = self.exchange
        if not exchange.consumer_done:  # nobody took the answer to its end
            self.client_left()
            if self.finish_answer:
                exchange.drain()
        if self._told and exchange.timed_out and exchange.reached:
            self._tell()
        with self._lock:
            self._settled = True
        if self._tells:
            self._see_it_told()
        if self._works_on():
            self._await_rest()

    def _works_on(self) -> bool:
        """Whether the consumer may be at work though the exchange has ended: it was not the
        consumer that ended it."""
        exchange = self.exchange
        broken = exchange.aborted or exchange.timed_out
        return broken and exchange.reached and not self._native

    def _await_rest(self) -> None:
        deadline = self._deadline
        if self._told:
            deadline = max(deadline, self._clock.monotonic() + END_AFTER_TOLD_S)
        if self._asked:
            at_rest = self._until_not_busy(deadline)
        else:
            at_rest = self.exchange.await_its_end(deadline - self._clock.monotonic())
        if not at_rest:
            self._emit(StillBusy(consumer=self._name))

    def _until_not_busy(self, deadline: float) -> bool:
        pause = threading.Event()
        while True:
            try:
                if not self._calls.busy(self._name, self._consumer):
                    return True
            except ConsumerUnreachable as error:
                if error.nothing_listens:
                    return True
            except BrokerError:
                pass  # too busy to say, which is an answer
            if self._clock.monotonic() >= deadline:
                return False
            pause.wait(BUSY_POLL_S)

    # -- telling it to stop ----------------------------------------------------------------

    def _tell(self) -> None:
        with self._lock:
            if self._settled or self._tells:
                return
            self._tells = True
            teller = threading.Thread(target=self._cancel, name=f"cancel-{self._name}", daemon=True)
            try:
                teller.start()
            except RuntimeError:
                return  # no thread to be had: the job's own will do it
            self._teller = teller

    def _see_it_told(self) -> None:
        if self._teller is None:
            self._cancel()
        else:
            self._teller.join(TELL_TIMEOUT_S)

    def _cancel(self) -> None:
        try:
            self._calls.cancel(self._name, self._consumer)
        except BrokerError as error:
            self._emit(CancelFailed(consumer=self._name, reason=error.message))
