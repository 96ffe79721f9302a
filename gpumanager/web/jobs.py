"""One job from the line to the consumer and back: the only place where the scheduler, the
registry and the proxy meet."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
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
from gpumanager.events import EventLog
from gpumanager.learning import Learned
from gpumanager.model import Job
from gpumanager.registry import Registry
from gpumanager.scheduling.interface import Ticket
from gpumanager.upstream.exchange import Exchange
from gpumanager.upstream.proxy import Proxy
from gpumanager.watcher import Watcher
from gpumanager.web.completion import LARGEST_ANSWER_BYTES, Completions, job_id
from gpumanager.web.departure import Departure, StopsJobs
from gpumanager.web.place import Place
from gpumanager.web.record import RequestRecord, record_of
from gpumanager.web.relay import RelayedResponse
from gpumanager.web.shortage import LARGEST_REQUEST_BYTES, Shortages

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
    """A job's hold on the GPU, to be given back once, by whoever sees its end first.

    Once `keep` was called, only `release` gives it back: the job goes on after its answer.
    """

    def __init__(
        self,
        place: Place,
        ticket: Ticket,
        registry: Registry,
        learned: Learned,
        record: RequestRecord,
        clock: Clock,
        events: EventLog,
    ) -> None:
        self._events = events
        self._place = place
        self._ticket = ticket
        self._registry = registry
        self._learned = learned
        self._record = record
        self._clock = clock
        self._lock = threading.Lock()
        self._done = False
        self._kept = False
        self.began = clock.monotonic()
        self.before = registry.job_started(ticket.job.consumer)
        self.status: int | None = None
        self.failure: str | None = None
        self.loaded_nothing = False
        self.process_gone = False

    def keep(self) -> None:
        with self._lock:
            self._kept = True

    def give_back(self) -> None:
        with self._lock:
            if self._kept:
                return
        self.release()

    def release(self) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
        name = self._ticket.job.consumer
        seconds = self._clock.monotonic() - self.began
        self._record.run_s = seconds
        # First what the next job's eviction looks at, then the GPU.
        worked = self.failure is None and self.status is not None and self.status < 400
        self._registry.job_finished(
            name,
            worked=worked,
            unloaded=self.before if self.loaded_nothing else None,
            process_gone=self.process_gone,
        )
        self._place.give_up()
        if not worked:
            self._learned.failed(name)
        else:
            self._learned.ran(name, seconds, cold=not self.before.loaded)
        self._note(seconds)

    def _note(self, seconds: float) -> None:
        ticket, job = self._ticket, self._ticket.job
        self._events.note(
            "job",
            {
                "consumer": job.consumer,
                "kind": job.kind,
                "ticket": ticket.number,
                "client": job.client,
                "request_id": job.request_id,
                "key": self._record.key,
                "traceparent": self._record.traceparent,
                "status": self.status,
                "failure": self.failure,
                "wait_ms": _ms(ticket.waited_s),
                "prepare_ms": _ms(ticket.prepared_s),
                "run_ms": _ms(seconds),
            },
        )


class JobRunner:
    """Runs a prepared exchange under the scheduler."""

    def __init__(
        self,
        registry: Registry,
        learned: Learned,
        admission: Admission,
        breakers: Breakers,
        proxy: Proxy,
        calls: StopsJobs,
        completions: Completions,
        watcher: Watcher,
        clock: Clock,
        events: EventLog,
        shortages: Shortages,
        *,
        look: Callable[[], object],
        after_job: Callable[[str], object] = lambda name: None,  # noqa: ARG005
    ) -> None:
        self._events = events
        self._calls = calls
        self._admission = admission
        self._breakers = breakers
        self._registry = registry
        self._learned = learned
        self._proxy = proxy
        self._completions = completions
        self._watcher = watcher
        self._clock = clock
        self._shortages = shortages
        self._look = look
        self._after_job = after_job

    def run(
        self,
        environ: WSGIEnvironment,
        kind: str,
        place: Place,
        exchange: Exchange,
        max_wait: float | None = None,
    ) -> RelayedResponse:
        """Wait for the GPU, send, and return as soon as the answer's head is there.

        `max_wait` is the longest the client itself will wait in the queue, in seconds.
        Raises a BrokerError if it does not come to that; the GPU is given back by then. After
        that the response, and behind it the guard, see to it.
        """
        name, consumer = place.name, place.config
        record = record_of(environ)
        client = ClientWatch(environ, self._watcher)
        record.stack.callback(client.stop)
        until_held = ExitStack()
        holds: list[_Hold] = []

        def begin() -> None:
            self._admission.begin(name)
            holds.append(
                _Hold(
                    place, ticket, self._registry, self._learned, record, self._clock, self._events
                )
            )
            record.stack.callback(self._after_job, name)
            record.stack.callback(holds[0].give_back)

        def begin_early() -> bool:
            try:
                begin()
            except BrokerError:
                return False  # the job's own thread will be told the same
            self._proxy.send_ahead(exchange)
            return True

        try:
            record.stack.callback(until_held.close)
            until_held.callback(place.give_up)
            ticket = place.take_ticket(
                Job(name, kind, record.client, record.request_id, max_wait, key=record.key)
            )
            ticket.when_granted(begin_early)
            self._wait(ticket, client, record)
        except BrokerError as error:
            if isinstance(error, _CONSUMERS_FAULTS):
                self._breakers.failed(name)  # it did not load
            raise
        except Exception as error:
            log.exception("scheduler failed", extra={"request_id": record.request_id})
            raise SchedulerError("the scheduler failed", consumer=name) from error
        try:
            if not holds:
                begin()
        except BrokerError:
            place.give_up()
            raise
        hold = holds[0]
        until_held.pop_all()  # the hold sees to the ticket now, maybe for longer than the request
        followed = self._may_be_followed(consumer, exchange)
        departures: list[Departure] = []

        def send(exchange: Exchange) -> None:
            record.stack.callback(exchange.close)
            departure = Departure(name, consumer, exchange, self._calls, self._clock)
            departures.append(departure)
            if followed:
                client.when_gone(None)  # it goes on in any case, so its id has to be known
            else:
                client.when_gone(departure.client_left)
                ticket.when_cancelled(departure.cancelled)
            self._proxy.send(exchange)

        try:
            send(exchange)
            shortage = self._shortages.in_answer(name, consumer, exchange)
            if shortage is not None:
                client.when_gone(lambda: ticket.cancel(_gone(name)))
                again = exchange.again() if consumer.out_of_memory.retry else None
                if again is None:
                    self._shortages.not_retried(shortage)
                elif ticket.relieve():  # the same request once more, all others having made room
                    exchange = again
                    send(exchange)
                    second = self._shortages.in_answer(name, consumer, exchange)
                    if second is None and exchange.status < 500:
                        self._shortages.healed(shortage)
            if exchange.status < 400 and not followed:
                self._see_what_it_holds(name, hold)
            job = self._taken(consumer, exchange) if followed else None
        except BaseException as error:
            hold.loaded_nothing = not exchange.reached
            hold.process_gone = isinstance(error, ConsumerUnreachable) and error.nothing_listens
            hold.failure = error.code if isinstance(error, BrokerError) else "internal_error"
            if departures:
                departures[-1].settle()
            hold.give_back()
            self._judge(name, error)
            raise
        finally:
            record.upstream_s = self._clock.monotonic() - hold.began
        departure = departures[-1]
        self._breakers.succeeded(name)
        # A job that failed over there, out of memory perhaps, may have loaded nothing. Where the
        # card is measured, taking it for not loaded costs an eviction at worst.
        measured = self._registry.gpu.reading is not None
        hold.loaded_nothing = exchange.status >= 500 and measured and not hold.before.loaded
        hold.status = exchange.status
        if job is not None:
            request = exchange.request_text(LARGEST_REQUEST_BYTES)
            self._follow(name, consumer, job, request, ticket, hold)

        def give_back() -> None:
            departure.settle()
            hold.give_back()

        def broke(error: BrokerError) -> None:
            hold.failure = error.code
            self._judge(name, error)

        if exchange.consumer_done:
            give_back()  # before the answer is even begun
        return RelayedResponse(
            exchange,
            give_back,
            on_break=broke,
            finish_answer=departure.finish_answer,
        )

    # -- asynchronous jobs -----------------------------------------------------------------

    def _may_be_followed(self, consumer: ConsumerConfig, exchange: Exchange) -> bool:
        """Whether the consumer only takes such a job, and works on it after its answer."""
        method, path = exchange.request_line(consumer.base_path)
        return consumer.done is not None and consumer.done.matches(method, path)

    def _taken(self, consumer: ConsumerConfig, exchange: Exchange) -> str | None:
        """The id of the job, if the consumer has taken it."""
        if consumer.done is None or exchange.status >= 300:
            return None
        answer = exchange.read_ahead(LARGEST_ANSWER_BYTES)
        return None if answer is None else job_id(consumer.done, answer)

    def _follow(
        self,
        name: str,
        consumer: ConsumerConfig,
        job: str,
        request: bytes,
        ticket: Ticket,
        hold: _Hold,
    ) -> None:
        hold.keep()

        def ended(said: bytes | None, process_gone: bool) -> None:
            try:
                self._see_what_it_holds(name, hold)
                if said is not None:
                    shortage = self._shortages.in_result(name, consumer, said, request)
                    if shortage is not None:
                        hold.failure = "out_of_memory"
                        self._shortages.not_retried(shortage)  # its answer has gone out
            finally:
                hold.process_gone = process_gone
                hold.release()
                self._after_job(name)

        self._completions.follow(name, consumer, job, ticket, ended)

    def _see_what_it_holds(self, name: str, hold: _Hold) -> None:
        """Short jobs slip through between two samples of the card: where little is known of the
        consumer yet, or it was loaded just now, look while it surely holds its model."""
        reading = self._registry.gpu.reading
        if reading is None or reading.measured_mib(name) is None:
            return
        if not hold.before.loaded or not self._learned.knows_enough(name):
            self._look()

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
        finally:
            record.waited_s = ticket.waited_s
        record.prepared_s = ticket.prepared_s


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _gone(name: str) -> ClientGone:
    return ClientGone("the client left", consumer=name)
