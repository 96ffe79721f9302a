"""One job from the line to the consumer and back: the only place where the scheduler, the
registry and the proxy meet."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpumanager.admission import Admission
from gpumanager.breaker import Breakers
from gpumanager.clock import Clock
from gpumanager.config import ConsumerConfig
from gpumanager.errors import (
    BrokerError,
    ClientGone,
    ConsumerTimeout,
    ConsumerUnreachable,
    SchedulerError,
)
from gpumanager.model import Job
from gpumanager.registry import Registry
from gpumanager.scheduling.interface import Scheduler, Ticket
from gpumanager.upstream.exchange import Exchange
from gpumanager.upstream.proxy import Proxy
from gpumanager.watcher import Watcher
from gpumanager.web.departure import Departure, StopsJobs
from gpumanager.web.record import RequestRecord, record_of
from gpumanager.web.relay import RelayedResponse

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = logging.getLogger(__name__)

_CONSUMERS_FAULTS = (ConsumerUnreachable, ConsumerTimeout)


class ClientWatch:
    """Notices that the client left, and does what fits the stage the request has reached."""

    def __init__(self, environ: WSGIEnvironment, watcher: Watcher) -> None:
        self._lock = threading.Lock()
        self._gone = False
        self._action: Callable[[], object] | None = None
        disconnected = environ.get("waitress.client_disconnected")
        self._watch = None if disconnected is None else watcher.watch(disconnected, self._left)

    def when_gone(self, action: Callable[[], object] | None) -> None:
        """From now on do `action` when the client leaves: at once, if it has left already."""
        with self._lock:
            self._action = action
            gone = self._gone
        if gone and action is not None:
            action()

    def stop(self) -> None:
        """Look no more."""
        if self._watch is not None:
            self._watch.stop()

    def _left(self) -> None:
        with self._lock:
            self._gone = True
            action = self._action
        if action is not None:
            action()


class _Hold:
    """A job's hold on the GPU, to be given back once, by whoever sees its end first."""

    def __init__(
        self, ticket: Ticket, registry: Registry, record: RequestRecord, clock: Clock
    ) -> None:
        self._ticket = ticket
        self._registry = registry
        self._record = record
        self._clock = clock
        self._lock = threading.Lock()
        self._done = False
        self.began = clock.monotonic()
        self.before = registry.job_started(ticket.job.consumer)
        self.loaded_nothing = False
        self.process_gone = False

    def give_back(self) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
        self._record.run_s = self._clock.monotonic() - self.began
        # First what the next job's eviction looks at, then the GPU.
        self._registry.job_finished(
            self._ticket.job.consumer,
            unloaded=self.before if self.loaded_nothing else None,
            process_gone=self.process_gone,
        )
        self._ticket.close()


class JobRunner:
    """Runs a prepared exchange under the scheduler."""

    def __init__(
        self,
        scheduler: Scheduler,
        registry: Registry,
        admission: Admission,
        breakers: Breakers,
        proxy: Proxy,
        calls: StopsJobs,
        watcher: Watcher,
        clock: Clock,
    ) -> None:
        self._calls = calls
        self._admission = admission
        self._breakers = breakers
        self._scheduler = scheduler
        self._registry = registry
        self._proxy = proxy
        self._watcher = watcher
        self._clock = clock

    def run(
        self,
        environ: WSGIEnvironment,
        kind: str,
        name: str,
        consumer: ConsumerConfig,
        exchange: Exchange,
        max_wait: float | None = None,
    ) -> RelayedResponse:
        """Wait for the GPU, send, and return as soon as the answer's head is there.

        `max_wait` is the longest the client itself will wait in line, in seconds.
        Raises a BrokerError if it does not come to that; the GPU is given back by then. After
        that the response, and behind it the guard, see to it.
        """
        record = record_of(environ)
        client = ClientWatch(environ, self._watcher)
        record.stack.callback(client.stop)
        try:
            ticket = self._scheduler.enqueue(
                Job(name, kind, record.client, record.request_id, max_wait)
            )
            record.stack.callback(ticket.close)
            self._wait(ticket, client, record)
        except BrokerError as error:
            if isinstance(error, _CONSUMERS_FAULTS):
                self._breakers.failed(name)  # it did not load
            raise
        except Exception as error:
            log.exception("scheduler failed", extra={"request_id": record.request_id})
            raise SchedulerError("the scheduler failed", consumer=name) from error
        try:
            self._admission.begin(name)
        except BrokerError:
            ticket.close()
            raise
        hold = _Hold(ticket, self._registry, record, self._clock)
        departure = Departure(name, consumer, exchange, self._calls, self._clock)
        record.stack.callback(hold.give_back)
        try:
            client.when_gone(departure.client_left)
            ticket.when_cancelled(departure.cancelled)
            self._proxy.send(exchange)
        except BaseException as error:
            hold.loaded_nothing = not exchange.reached
            hold.process_gone = isinstance(error, ConsumerUnreachable) and error.nothing_listens
            departure.settle()
            hold.give_back()
            self._judge(name, error)
            raise
        finally:
            record.upstream_s = self._clock.monotonic() - hold.began
        self._breakers.succeeded(name)
        # A job that failed over there, out of memory perhaps, may have loaded nothing. Where the
        # card is measured, taking it for not loaded costs an eviction at worst.
        measured = self._registry.gpu.reading is not None
        hold.loaded_nothing = exchange.status >= 500 and measured and not hold.before.loaded
        record.stack.callback(exchange.close)

        def give_back() -> None:
            departure.settle()
            hold.give_back()

        return RelayedResponse(
            exchange,
            give_back,
            on_break=lambda error: self._judge(name, error),
            finish_answer=departure.finish_answer,
        )

    def _judge(self, name: str, error: BaseException) -> None:
        """Tell the breaker what the failure of a call that has begun says of its consumer."""
        if isinstance(error, _CONSUMERS_FAULTS):
            self._breakers.failed(name)
        else:
            self._breakers.abandoned(name)

    def _wait(self, ticket: Ticket, client: ClientWatch, record: RequestRecord) -> None:
        client.when_gone(lambda: ticket.cancel(_gone(ticket.job.consumer)))
        try:
            ticket.wait()
        except BaseException:
            ticket.close()
            raise
        finally:
            record.waited_s = ticket.waited_s
        record.prepared_s = ticket.prepared_s


def _gone(name: str) -> ClientGone:
    return ClientGone("the client left", consumer=name)
